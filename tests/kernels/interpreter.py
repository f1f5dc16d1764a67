"""Runs the Triton kernels on the CPU, in Triton's interpreter.

In a process of its own, because Triton decides when it is imported whether kernels are interpreted or compiled, and
other tests compile. Memory that a kernel should have written, and did not, is NaN there.
"""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from typing import Any
from unittest import mock

import torch

from ctrlcompile.kernels.reference import Before


class Interpreter:
    """The verbs of a family of kernels, run in the other process; `tile` is used instead of the best guess if given."""

    def __init__(self, cache: str, family: str = "triton_linear") -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CTRLCOMPILE_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.family = family
        self.tile: Any = None

    def forward(self, *arguments: Any) -> Any:
        return self._call("forward", arguments)

    def dgrad(self, *arguments: Any) -> Any:
        return self._call("dgrad", arguments)

    def wgrad(self, *arguments: Any) -> Any:
        return self._call("wgrad", arguments)

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _call(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        pickle.dump((self.family, verb, arguments, self.tile), self._process.stdin)
        self._process.stdin.flush()
        result, theirs, error = pickle.load(self._process.stdout)
        if error:
            raise RuntimeError(f"in the interpreter: {error}")
        for mine, other in zip(arguments, theirs, strict=True):
            if isinstance(mine, Before):
                mine.sums.copy_(other.sums)  # written there
        return result


def serve() -> None:
    """Answers calls until the input ends."""
    from ctrlcompile.kernels import triton_tune

    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes to standard error
    while True:
        try:
            family, verb, arguments, tile = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        given = mock.patch.object(triton_tune, "choose", return_value=tile) if tile else contextlib.nullcontext()
        try:
            with given:
                kernels = importlib.import_module(f"ctrlcompile.kernels.{family}")
                answer = getattr(kernels, verb)(*arguments), arguments, None
        except Exception:
            answer = None, None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
