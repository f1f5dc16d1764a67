"""A call of one of the three verbs that every family of kernels has, as its arguments.

A convolution's call has a window, a linear's has none. `by` takes a module with the verbs, or what looks like one.
`moving` is what is multiplied by the weight or makes its gradient, `last` what becomes of the sums, as
`cpp_rows.source` calls it, `image` the spatial size of the layer's input.
"""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .index_lists import Block, BlockLists
from .reference import Before, backward
from .window import Window


class Forward(NamedTuple):
    """`reference.linear` or `reference.conv`: x `[M, K]`, or `[N, I, *size]` channels-last."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lists: BlockLists
    block: Block
    activation: str
    window: Window | None = None

    @property
    def role(self) -> str:
        return "forward"

    def by(self, kernel: Any) -> tuple[Tensor, Tensor]:
        """y and z, as this kernel computes them."""
        window = () if self.window is None else (self.window,)
        result: tuple[Tensor, Tensor] = kernel.forward(
            self.x, self.weight, self.bias, self.lists, self.block, self.activation, *window
        )
        return result

    @property
    def moving(self) -> Tensor:
        return self.x

    @property
    def last(self) -> str:
        return self.activation

    @property
    def image(self) -> tuple[int, ...]:
        return tuple(self.x.shape[2:])


class Dgrad(NamedTuple):
    """`reference.linear_dgrad` or `reference.conv_dgrad`: grad_z `[M, N]`, or `[N, O, *out]` channels-last."""

    grad_z: Tensor
    weight: Tensor
    lists: BlockLists
    block: Block
    window: Window | None = None
    image: tuple[int, ...] = ()
    before: Before | None = None

    @property
    def role(self) -> str:
        return "dgrad"

    def by(self, kernel: Any) -> Tensor:
        """The gradient of the input, as this kernel computes it."""
        window = () if self.window is None else (self.window, self.image)
        result: Tensor = kernel.dgrad(self.grad_z, self.weight, self.lists, self.block, *window, self.before)
        return result

    @property
    def moving(self) -> Tensor:
        return self.grad_z

    @property
    def last(self) -> str:
        return "none" if self.before is None else backward(self.before.activation)


class Wgrad(NamedTuple):
    """`reference.linear_wgrad` or `reference.conv_wgrad`: grad_z and x as above."""

    grad_z: Tensor
    x: Tensor
    weight: Tensor
    lists: BlockLists
    probes: Tensor
    block: Block
    window: Window | None = None

    @property
    def role(self) -> str:
        return "wgrad"

    def by(self, kernel: Any) -> tuple[Tensor, Tensor]:
        """The gradient of the weight and its signals, as this kernel computes them."""
        window = () if self.window is None else (self.window,)
        result: tuple[Tensor, Tensor] = kernel.wgrad(
            self.grad_z, self.x, self.weight, self.lists, self.probes, self.block, *window
        )
        return result

    @property
    def moving(self) -> Tensor:
        return self.grad_z

    @property
    def last(self) -> str:
        return "none"

    @property
    def image(self) -> tuple[int, ...]:
        return tuple(self.x.shape[2:])


Verb: TypeAlias = Forward | Dgrad | Wgrad
