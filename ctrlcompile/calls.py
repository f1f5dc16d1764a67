"""Calls of our operators, for whoever looks: named by layer and shape in `torch.profiler`, handed to `observe`.

While nobody looks, a call pays for two comparisons.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ctrlcompile.gate import Gate, registry
from ctrlcompile.kernels.index_lists import matrix_shape
from ctrlcompile.kernels.window import Window

Observer = Callable[[str, tuple[Any, ...]], None]
Result = TypeVar("Result")

_ROLES = {"": "forward", "_dgrad": "dgrad", "_wgrad": "wgrad"}
_LAYERS = ("linear", "matmul", "conv")
ROLES = {f"{layer}{end}": role for layer in _LAYERS for end, role in _ROLES.items()}  # operator -> its role
WINDOW = ("stride", "padding", "dilation", "groups")


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
    """The arguments of a call by the names in the operator's schema; PyTorch leaves out what is the default."""
    schema = getattr(torch.ops.ctrlprune, op).default._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=False)}
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema.arguments}


def gate_of(arguments: Mapping[str, Any]) -> Gate | None:
    """The gate whose lists a call was given; None where they are no gate's."""
    return registry.with_lists(arguments["lists"][0])


def window_of(arguments: Mapping[str, Any]) -> Window | None:
    """How the window of a call moves; None for all but a convolution's."""
    return Window.of(*(arguments[name] for name in WINDOW)) if "groups" in arguments else None


def block_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """The sides of a call's blocks by name, in the order of the weight's dimensions."""
    return {name: value for name, value in arguments.items() if name in ("block_out", "block_in")}


def is_transposed(arguments: Mapping[str, Any]) -> bool:
    """Whether a call reads its weight as [in, out]."""
    return next(iter(block_of(arguments))) == "block_in"


def sizes(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """M, K, N of a call: rows of the product, its inputs and its outputs.

    A convolution has a row for each position of its output, and an input for each tap of an input channel.
    """
    weight, window = arguments["weight"], window_of(arguments)
    n, k = matrix_shape(weight.shape)
    if is_transposed(arguments):
        n, k = k, n
    if "grad" in arguments:
        return math.prod(arguments["grad"].shape) // n, k, n
    shape = arguments["x"].shape
    if window is None:
        return math.prod(shape) // k, k, n
    return shape[0] * math.prod(window.output_size(shape[2:], weight.shape[2:])), k, n


def label(op: str, arguments: tuple[Any, ...]) -> str:
    """What a call is called in a trace, such as `fc1.weight forward 512x768x3072 in 32x32 blocks, density 0.40`."""
    call = named(op, arguments)
    gate = gate_of(call)
    shape = "x".join(map(str, sizes(call)))
    block = "x".join(map(str, block_of(call).values()))
    what = f"{ROLES[op]} {shape} in {block} blocks"
    return what if gate is None else f"{gate.name} {what}, density {gate.density:.2f}"
