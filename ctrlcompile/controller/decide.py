"""Which blocks to keep, to switch off and to bring back; and which inactive ones to look at next.

A block is worth its cost while benefit ≥ price · cost. An inactive block has to be worth (1 + h) times that, and more
after each earlier return, so that blocks do not chatter; a block that was switched stays as it is for a dwell time,
which is also what a returned block, whose weights start at zero, has to prove itself in.

An inactive block is expected to be worth what is typical, so next to the least of the active ones it looks good, but
those are trained, and it has to learn first. What comes back in exchange is therefore bounded per optimizer step:
small nets that changed half of their blocks every hundred steps learned less than with random masks left alone.

Before a batch norm Σ w·g over a row is 0 whatever the row is worth, and a gate that thins out is not rated higher for
it, so that gates would be emptied one after another (the layer collapse of Tanaka et al., "Pruning Neural Networks
without Any Data by Iteratively Conserving Synaptic Flow", 2020). There a block's benefit is divided by the share of its
gate's blocks that are rated as high or higher: what a gate is worth grows as the logarithm of its density, and gates
whose blocks are all alike get densities in proportion to the benefit per cost of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .signals import Layout

HYSTERESIS = 0.5  # h
LIFE = 2500  # optimizer steps in which no more than the active cost comes back in exchange for what is switched off
SWAP_ENDS = 0.75  # of the run: what comes back later has no time to become useful
NEVER = -(2**30)


@dataclass
class Blocks:
    """State of every block, flat.

    Attributes:
        active: bool [N].
        switched: int32 [N], step of the last switch, or NEVER.
        bar: float32 [N], how many times the price an inactive block has to be worth to come back.
    """

    active: Tensor
    switched: Tensor
    bar: Tensor

    @classmethod
    def of(cls, active: Tensor) -> Blocks:
        """Blocks that have never been switched."""
        switched = torch.full_like(active, NEVER, dtype=torch.int32)
        return cls(active, switched, torch.full_like(active, 1 + HYSTERESIS, dtype=torch.float32))

    def switch_(self, active: Tensor, step: int) -> None:
        """Switches to the mask `active` [N]; each return raises a block's bar for the next."""
        changed = active ^ self.active
        self.switched.masked_fill_(changed, step)
        self.bar[changed & active] *= 1 + HYSTERESIS
        self.active = active


@dataclass(frozen=True)
class Decision:
    """Masks [N] after a decision, and what it cost.

    Attributes:
        active: bool [N].
        price: benefit per share of the gateable FLOPs at which the marginal block was kept.
        density: active share of the gateable FLOPs.
    """

    active: Tensor
    price: float
    density: float


def swap_limit(step: int, interval: int, total_steps: int | None) -> float:
    """Share of the active cost that a decision may bring back in exchange; falls as a cosine to 0 at SWAP_ENDS."""
    if total_steps is None:
        return interval / LIFE / 2
    return interval / LIFE * (1 + math.cos(math.pi * min(1.0, step / (SWAP_ENDS * total_steps)))) / 2


def decide(
    blocks: Blocks,
    benefit: Tensor,
    cost: Tensor,
    layout: Layout,
    *,
    step: int,
    ask: float,
    dwell: int,
    swap: float,
    least: Tensor,
    held: Tensor,
    saturating: Tensor,
) -> Decision:
    """Picks the blocks that are worth most per cost until they cost `ask`.

    Args:
        benefit: float32 [N], units of the loss.
        cost: float64 [N], shares of the gateable FLOPs; sums to 1.
        ask: wanted cost of the active blocks, 0 to 1. It is reached from above: the marginal block is kept.
        dwell: steps that a switched block stays as it is.
        swap: share of `ask` that may come back in exchange for blocks switched off. What comes back because the
            wanted cost has risen is not limited.
        least: int64 [G], blocks that each gate keeps at least.
        held: bool [N], blocks that stay as they are (their gate has not reported).
        saturating: bool [N], blocks of gates that a batch norm follows.
    """
    active = blocks.active
    resting = (step - blocks.switched < dwell) | held
    worth = benefit / cost.float().clamp(min=1e-30)
    worth = torch.where(active, worth, torch.where(resting | (benefit <= 0), -1.0, worth / blocks.bar))
    worth = torch.where(saturating & (worth > 0), worth / _share(worth, layout), worth)
    worth, order = worth.sort(descending=True, stable=True)
    active, cost = active[order], cost[order]

    candidate = ~active & (worth > 0)
    offered = (cost * candidate).cumsum(0) - cost
    rise = max(0.0, ask - float((cost * active).sum()))
    eligible = active | (candidate & (offered < swap * ask + rise))
    protected = active & resting[order]
    kept = _take(eligible, protected, cost, ask)
    gate = layout.gate_of[order]
    if bool((torch.bincount(gate[kept], minlength=least.numel()) < least).any()):
        protected |= active & (_rank(active, gate) < least[gate])
        kept = _take(eligible, protected, cost, ask)

    result = torch.zeros_like(active)
    result[order] = kept
    priced = worth[kept & ~protected]
    price = max(0.0, float(priced[-1])) if priced.numel() else 0.0
    return Decision(result, price, float((cost * kept).sum()))


def _take(eligible: Tensor, protected: Tensor, cost: Tensor, ask: float) -> Tensor:
    """The protected blocks, and of the eligible ones the first, until they cost `ask`."""
    free = eligible & ~protected
    before = (cost * free).cumsum(0) - cost + (cost * protected).sum()
    return protected | (free & (before < ask - 1e-9))


def _share(worth: Tensor, layout: Layout) -> Tensor:
    """Share [N] of the blocks of its gate that are worth as much as a block or more."""
    order = worth.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = _rank(torch.ones_like(order, dtype=torch.bool), layout.gate_of[order])
    return (rank + 1) / layout.lengths[layout.gate_of]


def _rank(active: Tensor, gate: Tensor) -> Tensor:
    """Rank [N] of each active block among the active ones of its gate; blocks are listed best first."""
    key = torch.where(active, gate, gate.max() + 1)
    grouped = key.sort(stable=True)
    starts = torch.bincount(key).cumsum(0)
    starts = torch.cat((starts.new_zeros(1), starts))
    rank = torch.empty_like(key)
    rank[grouped.indices] = torch.arange(key.numel(), device=key.device) - starts[grouped.values]
    return rank
