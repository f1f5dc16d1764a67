"""Builds kernels beside the training: one at a time, in one thread, in turns with it, given up after a time."""

import atexit
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TypeAlias

from ctrlcompile.blocks import Block
from ctrlcompile.kernels import build, cpu_product
from ctrlcompile.variants import Types

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # of turns: a build of 1 s takes 20 s of training

Recipe: TypeAlias = tuple[Block, Types]  # the sides of a kernel's blocks, outputs and inputs, and its types


@dataclass
class Build:
    """One kernel: `done` is set when its build has ended, well or with an `error`."""

    recipe: Recipe
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class Builder:
    """The thread, started with the first build, and all builds so far.

    Attributes:
        finished: kernels that are there.
    """

    def __init__(self) -> None:
        self.finished: set[Recipe] = set()
        self._builds: dict[Recipe, Build] = {}
        self._queue: queue.SimpleQueue[Build | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> int:
        """How many builds were begun."""
        return len(self._builds)

    def build(self, recipe: Recipe) -> Build:
        """The build of a kernel, begun now where it was not before."""
        if recipe not in self._builds:
            self._builds[recipe] = Build(recipe)
            self._queue.put(self._builds[recipe])
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ctrlcompile builds", daemon=True)
                self._thread.start()
                atexit.register(self._stop)
        return self._builds[recipe]

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            block, types = task.recipe
            started = time.perf_counter()
            try:
                with build.beside_training(TIMEOUT_S):
                    cpu_product.build_rows(types.x_dtype, types.weight_dtype, block, types.activation)
                self.finished.add(task.recipe)
                log.info("built a kernel for blocks of %dx%d in %.1f s", *block, time.perf_counter() - started)
            except Exception as error:  # whatever it was, the variant in force goes on
                task.error = error
            task.done.set()

    def _stop(self) -> None:
        self._queue.put(None)
        deadline = time.monotonic() + 5
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            build.stop_compiling()  # over again: the next in the queue may just be starting
            self._thread.join(0.05)
