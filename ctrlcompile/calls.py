"""Calls of our operators, for whoever looks: named by layer and shape in `torch.profiler`, handed to `observe`.

While nobody looks, a call pays for two comparisons.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctrlcompile.gate import Gate, registry

Observer = Callable[[str, tuple[Any, ...]], None]
Result = TypeVar("Result")

ROLES = {"linear": "forward", "linear_dgrad": "dgrad", "linear_wgrad": "wgrad"}  # operator -> what users call it


class _Observed:
    by: Observer | None = None


_observed = _Observed()


def visible(op: str, implementation: Callable[..., Result]) -> Callable[..., Result]:
    """An operator's implementation whose calls can be seen."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Result:
        if _observed.by is not None:
            _observed.by(op, arguments)
        if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            return implementation(*arguments)
        with torch.profiler.record_function(label(op, arguments)):
            return implementation(*arguments)

    return run


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Calls `observer(operator, arguments)` before each call of an operator of ours, in whichever thread it runs."""
    _observed.by = observer
    try:
        yield
    finally:
        _observed.by = None


def named(op: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a call by the names in the operator's schema."""
    schema = getattr(torch.ops.ctrlprune, op).default._schema
    return {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=True)}


def gate_of(arguments: Mapping[str, Any]) -> Gate | None:
    """The gate whose lists a call was given; None where they are no gate's."""
    return registry.with_lists(arguments["lists"][0])


def sizes(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """M, K, N of a call: rows of the input, its features, features of the output."""
    rows: Tensor = arguments["grad"] if "grad" in arguments else arguments["x"]
    n, k = arguments["weight"].shape
    return rows.numel() // rows.shape[-1], k, n


def label(op: str, arguments: tuple[Any, ...]) -> str:
    """What a call is called in a trace, such as `fc1.weight forward 512x768x3072 in 32x32 blocks, density 0.40`."""
    call = named(op, arguments)
    gate = gate_of(call)
    shape = "x".join(map(str, sizes(call)))
    what = f"{ROLES[op]} {shape} in {call['block_out']}x{call['block_in']} blocks"
    return what if gate is None else f"{gate.name} {what}, density {gate.density:.2f}"
