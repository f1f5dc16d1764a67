"""The products of a model's gated layers, as a training step computes them, so that each can be repeated by itself.

Seen as calls of our operators. What is new in each step (inputs, gradients) is kept as shape, strides and type only;
weights and index lists are the live ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlcompile import calls, kernel_choice, op_calls
from ctrlcompile.gate import Gate
from ctrlcompile.kernels import dense_conv
from ctrlcompile.kernels.reference import backward
from ctrlcompile.kernels.window import Window

ROLES = tuple(calls.ROLES.values())


class Layout(NamedTuple):
    """Everything about a tensor but its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def filled(self) -> Tensor:
        """A tensor laid out so, of random values."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        values = torch.randn(last + 1 if all(self.shape) else 0, dtype=self.dtype, device=self.device)
        return values.as_strided(self.shape, self.strides)


@dataclass(eq=False)
class Product:
    """One product of a gated layer: the gate, the role, and the arguments of the operator by name.

    `calls` counts how often the step computed it.
    """

    gate: Gate
    operator: str
    arguments: dict[str, Any]
    calls: int = 0

    @property
    def role(self) -> str:
        """forward, dgrad or wgrad."""
        return calls.ROLES[self.operator]

    @property
    def dtype(self) -> torch.dtype:
        """Of the input, or of the gradient that stands for it."""
        return self._moving().dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, K, N, as `calls.sizes` has them."""
        return calls.sizes(self.arguments)

    @property
    def window(self) -> Window | None:
        """How the window of a convolution moves; None for any other layer."""
        return calls.window_of(self.arguments)

    @property
    def kernel(self) -> str:
        """What computes it."""
        weight = self.arguments["weight"]
        types = (weight.device, self.dtype, weight.dtype)
        family = kernel_choice.family_of(self.window, weight.shape[2:])
        reason = kernel_choice.why_no_kernel(*types, self.gate.block, self._activation, family=family)
        return kernel_choice.kernel_name(*types) if reason is None else f"dense ({reason})"

    @property
    def dense_flops(self) -> float:
        """2 M K N."""
        m, k, n = self.sizes
        return 2.0 * m * k * n

    @property
    def flops(self) -> float:
        """Of the blocks that are computed: the active ones, and in wgrad the probed ones."""
        return self.dense_flops * self._computed_share()

    @property
    def bytes(self) -> float:
        """What has to be read and written at least once: input and output whole, of the weight the computed blocks."""
        m, _, n = self.sizes
        weight = self.arguments["weight"]
        weight_bytes = weight.numel() * weight.element_size()
        moved = (self._input_entries() + m * n) * self.dtype.itemsize + weight_bytes * self._computed_share()
        if self.role == "wgrad":
            return moved + weight_bytes  # the gradient, with zeros where nothing was computed
        if self.role == "dgrad":
            return moved + (self._input_entries() * self.dtype.itemsize if self.arguments.get("z") is not None else 0)
        return moved + (m * n * self.dtype.itemsize if op_calls.saves_z(self._activation) else 0)

    def ours(self, tensors: Callable[[Layout], Tensor]) -> Callable[[], object]:
        """The operator, ready to call on `tensors` of its layouts."""
        values = [tensors(v) if isinstance(v, Layout) else v for v in self.arguments.values()]
        return partial(getattr(torch.ops.ctrlprune, self.operator).default, *values)

    def dense(self, tensors: Callable[[Layout], Tensor]) -> Callable[[], object]:
        """The framework's own product of the same, ready to call."""
        weight, bias = self.arguments["weight"].to(self.dtype), self.arguments.get("bias")
        bias = None if bias is None else bias.to(self.dtype)
        if self.window is not None:
            return self._dense_conv(tensors, weight, bias, self.window)
        transposed = calls.is_transposed(self.arguments)
        weight = weight.t() if transposed else weight
        if self.role == "forward":
            return partial(F.linear, tensors(self.arguments["x"]), weight, bias)
        grad = tensors(self.arguments["grad"]).reshape(-1, weight.shape[0])
        if self.role == "dgrad":
            return partial(torch.mm, grad, weight)
        x = tensors(self.arguments["x"]).reshape(-1, weight.shape[1])
        return partial(torch.mm, x.t(), grad) if transposed else partial(torch.mm, grad.t(), x)

    def _dense_conv(
        self, tensors: Callable[[Layout], Tensor], weight: Tensor, bias: Tensor | None, window: Window
    ) -> Callable[[], object]:
        if self.role == "forward":
            return partial(dense_conv.product, tensors(self.arguments["x"]), weight, bias, window)
        grad = tensors(self.arguments["grad"])
        if self.role == "dgrad":
            return partial(dense_conv.input_gradient, grad, weight, window, tuple(self.arguments["input_size"]))
        return partial(dense_conv.weight_gradient, grad, tensors(self.arguments["x"]), weight, window)

    def _input_entries(self) -> int:
        if self.role != "dgrad":
            return math.prod(self.arguments["x"].shape)
        m, k, _ = self.sizes
        window = self.window
        if window is None:
            return m * k
        channels = self.gate.shape[1] * window.groups
        return self._moving().shape[0] * channels * math.prod(self.arguments["input_size"])

    @property
    def _activation(self) -> str:
        activation: str = self.arguments.get("activation", "none")
        return backward(activation) if self.role == "dgrad" and activation != "none" else activation

    def _moving(self) -> Layout:
        return self.arguments["x" if self.role == "forward" else "grad"]

    def _computed_share(self) -> float:
        return self.gate.active_share + (self.gate.probed_share if self.role == "wgrad" else 0)


@dataclass
class Products:
    """What `see` has seen, each product once: another weight, role, layout, window or activation makes one."""

    found: dict[tuple[Any, ...], Product] = field(default_factory=dict)

    def see(self, operator: str, values: tuple[Any, ...]) -> None:
        """Notes a call of one of our operators; `calls.observe` calls this."""
        arguments = calls.named(operator, values)
        gate = calls.gate_of(arguments)
        if gate is None:
            return
        kept = {name: _kept(name, value) for name, value in arguments.items()}
        layouts = tuple(value for value in kept.values() if isinstance(value, Layout | str))
        key = (gate, operator, layouts, calls.window_of(arguments))
        product = self.found.setdefault(key, Product(gate, operator, kept))
        product.calls += 1


def _kept(name: str, value: Any) -> Any:
    if name == "lists":
        return [tensor.detach() for tensor in value]
    if not isinstance(value, Tensor):
        return value
    if name in ("x", "grad", "z"):
        return Layout(tuple(value.shape), value.stride(), value.dtype, value.device)
    return value.detach()
