"""Runs a model for those who look at it, and leaves it as it was."""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch.utils._pytree import tree_map_only

from ctrlcompile.region import Visit
from ctrlcompile.variants import unrecorded


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts back random state and the module's buffers (BatchNorm's averages, say) in the end; calls are not timed."""
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    gpus = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    state = random.getstate()
    try:
        with unrecorded(), torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(state)
        with torch.no_grad():
            for owner, name, buffer, kept in buffers:
                owner._buffers[name] = buffer
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def call(model: nn.Module, inputs: Sequence[Any], named_inputs: Mapping[str, Any]) -> Any:
    """What the model returns. Raises ValueError where it does not run on these inputs."""
    try:
        return model(*inputs, **named_inputs)
    except (BackendCompilerFailed, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        given = [*map(_described, inputs), *(f"{name}={_described(value)}" for name, value in named_inputs.items())]
        cause: BaseException = error
        while isinstance(cause, TorchDynamoException) and (inner := cause.__cause__ or cause.__context__):
            cause = inner
        why = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ValueError(f"the model does not run on inputs ({', '.join(given)}): {why}") from error


def _described(value: Any) -> str:
    def shape(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    return str(tree_map_only(Tensor, shape, value))


def check_compiled(visits: Sequence[Visit], who: str) -> None:
    """Raises RuntimeError where no graph of this backend ran; `who` was asked for it."""
    if not visits:
        raise RuntimeError(
            "no graph of this model was compiled with backend='ctrlprune': pass the compiled model, "
            f"cc.{who}(torch.compile(model, backend='ctrlprune'))(*inputs). Around an LSTM or a GRU PyTorch compiles "
            "nothing unless torch._dynamo.config.allow_rnn is True"
        )
