"""The gated product of live rows and columns only: gathered into a smaller dense one, and spread out again.

A block row or column is dead where none of its blocks is active. `dense` is `dense_linear` or `dense_conv`, whose verbs
these are; as there, masked blocks among the live rows and columns are multiplied, and taken to be zero.
"""

from typing import Any, NamedTuple

from torch import Tensor

from . import reference
from .index_lists import Block


class Live(NamedTuple):
    """The outputs and the inputs of a weight that have an active block, int64, in order."""

    outputs: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, mask: Tensor, block: Block, shape: tuple[int, int]) -> "Live":
        """Of a mask `[R, C]` over a weight `[N, K]` in blocks."""
        alive = (mask.any(1), mask.any(0))
        entries = (
            line.repeat_interleave(side)[:size].nonzero().flatten()
            for line, side, size in zip(alive, block, shape, strict=True)
        )
        return cls(*entries)

    def share(self, shape: tuple[int, int]) -> float:
        """The part of a weight's entries that lies in live rows and columns."""
        return self.outputs.numel() * self.inputs.numel() / (shape[0] * shape[1])


class Compact(NamedTuple):
    """The verbs `forward` and `dgrad` of a family, by those of `dense`."""

    dense: Any
    live: Live

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lists: Any, block: Block, activation: str, *window: Any
    ) -> tuple[Tensor, Tensor]:
        """As `dense.forward`; a dead output is the activation of its bias."""
        live = self.live
        some = None if bias is None else bias[live.outputs]
        x_live = x.index_select(1, live.inputs)
        y, z = self.dense.forward(x_live, _live(weight, live).to(x.dtype), some, lists, block, activation, *window)
        dead = x.new_zeros(weight.shape[0]) if bias is None else bias.to(x.dtype)
        spread = _spread(y, live.outputs, reference.activate(dead, activation))
        return spread, _spread(z, live.outputs, dead) if z.dim() > 1 else z

    def dgrad(self, grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """As `dense.dgrad`, of which `before` comes last; a dead input has no gradient."""
        *others, before = rest
        live = self.live
        some = None if before is None else reference.Before.of(before.z.index_select(1, live.inputs), before.activation)
        live_weight = _live(weight, live).to(grad.dtype)
        found = self.dense.dgrad(grad.index_select(1, live.outputs), live_weight, *others, some)
        if before is not None and some is not None:
            before.sums.zero_().index_copy_(0, live.inputs, some.sums)
        return _spread(found, live.inputs, grad.new_zeros(weight.shape[1]))


def _live(weight: Tensor, live: Live) -> Tensor:
    return weight.index_select(0, live.outputs).index_select(1, live.inputs)


def _spread(values: Tensor, channels: Tensor, others: Tensor) -> Tensor:
    """`values` `[M, c, *size]` in some channels, in all others what `others` `[C]` holds; channels-last."""
    whole = values.new_empty(values.shape[0], *values.shape[2:], others.numel()).copy_(others).movedim(-1, 1)
    return whole.index_copy_(1, channels, values)
