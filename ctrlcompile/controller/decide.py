"""Which blocks to keep, to switch off and to bring back.

A block is worth its cost while benefit ≥ price · cost. An inactive block has to be worth (1 + h) times that, and more
after each earlier return, so that blocks do not chatter; a block that was switched stays as it is for a dwell time,
which is also what a returned block, whose weights start at zero, has to prove itself in.

An inactive block is expected to be worth what is typical, so next to the least of the active ones it looks good, but
those are trained, and it has to learn first. What comes back in exchange is therefore bounded per optimizer step:
small nets that changed half of their blocks every hundred steps learned less than with random masks left alone. The
bound holds for nets of few blocks too: what a decision may exchange is saved up until it pays for a whole block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout
from .rating import rank_within, rate

HYSTERESIS = 0.5  # h
LIFE = 2500  # optimizer steps in which no more than the active cost comes back in exchange for what is switched off
EVEN = 0.5  # of the density asked for, that each gate keeps
SWAP_ENDS = 0.75  # of the run: what comes back later has no time to become useful
NEVER = -(2**30)
ROUNDING = 1e-9  # of sums of costs


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
        price: benefit per share of the gateable FLOPs at which the marginal block was kept, as it was rated.
        density: active share of the gateable FLOPs.
        exchanged: cost of what came back beyond what was missing to the cost asked for.
    """

    active: Tensor
    price: float
    density: float
    exchanged: float


@dataclass
class Exchange:
    """What may come back in exchange for blocks switched off.

    Attributes:
        saved: share of the gateable FLOPs, saved up by past decisions: at most the costliest block, or one decision's
            share where that is more.
    """

    saved: float = 0.0

    def grant(self, share: float, costliest: float) -> float:
        """What a decision may exchange: `share` more than was saved. Without a share nothing is exchanged."""
        self.saved = min(self.saved + share, max(share, costliest)) if share > 0 else 0.0
        return self.saved

    def spend(self, exchanged: float) -> None:
        """Takes off what a decision has exchanged."""
        self.saved = max(0.0, self.saved - exchanged)


def evenly(
    ask: float, floor: Tensor, active: Tensor, worth: Tensor, cost: Tensor, layout: Layout, *, apart: Tensor
) -> Tensor:
    """Blocks of each gate that no other may outbid: `floor` [G], and EVEN of its even share in what that leaves.

    What a layer is worth is told by its gradients, and some layers learn late. Blocks without `worth` [N] are not kept
    for this, nor are those of gates that stand `apart` [G]: before batch norms none outbids another (see `rating`).
    docs/trials.md has the trials.
    """
    gate = layout.gate_of

    def count(blocks: Tensor) -> Tensor:
        return torch.bincount(gate[blocks], minlength=floor.numel())

    least = floor.minimum(count(active))
    taken = float((torch.bincount(gate, cost) * least / layout.lengths).sum())
    share = EVEN * max(0.0, ask - taken) / (1 - taken) if taken < 1 else 0.0
    even = least + (share * (layout.lengths - least)).long()
    kept = even.minimum(count(active & (worth > 0))).maximum(least)
    return torch.where(apart, least, kept)


def swap_limit(step: int, steps: int, total_steps: int | None) -> float:
    """Share of the active cost that may come back in exchange, for `steps` steps; a cosine to 0 at SWAP_ENDS."""
    if total_steps is None:
        return steps / LIFE / 2
    return steps / LIFE * (1 + math.cos(math.pi * min(1.0, step / (SWAP_ENDS * total_steps)))) / 2


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
        ask: wanted cost of the active blocks, 0 to 1. It is reached from above: the marginal block is kept if active.
            An inactive block comes only where half of it fits, so that an `ask` that wavers by less changes nothing.
        dwell: steps that a switched block stays as it is.
        swap: cost that may come back in exchange for blocks switched off. What comes back because the wanted cost has
            risen is not limited.
        least: int64 [G], blocks that each gate keeps at least.
        held: bool [N], blocks that stay as they are (their gate has not reported).
        saturating: bool [N], blocks of gates that a batch norm follows.
    """
    active = blocks.active
    resting = (step - blocks.switched < dwell) | held
    worth = benefit / cost.float().clamp(min=1e-30)
    worth = torch.where(active | ~resting & (benefit > 0), worth, -1.0)
    worth, order = rate(worth, active, blocks.bar, layout, saturating).sort(descending=True, stable=True)
    active, cost, gate = active[order], cost[order], layout.gate_of[order]

    candidate = ~active & (worth > 0)
    rise = max(0.0, ask - float((cost * active).sum()))
    exchanged = (cost * candidate).cumsum(0) <= swap + rise + ROUNDING  # the best one waits until all of it is saved up
    filling = candidate & (cost <= 2 * rise)
    filling &= (cost * filling).cumsum(0) - cost / 2 <= rise
    eligible = active | (candidate & exchanged) | filling
    protected = active & resting[order]
    kept = _take(eligible, protected, cost, ask)
    if bool((torch.bincount(gate[kept], minlength=least.numel()) < least).any()):
        protected |= active & (rank_within(torch.where(active, gate, least.numel())) < least[gate])
        kept = _take(eligible, protected, cost, ask)

    result = torch.zeros_like(active)
    result[order] = kept
    priced = worth[kept & ~protected]
    price = max(0.0, float(priced[-1])) if priced.numel() else 0.0
    came = float((cost * (kept & ~active)).sum())
    return Decision(result, price, float((cost * kept).sum()), max(0.0, came - rise))


def _take(eligible: Tensor, protected: Tensor, cost: Tensor, ask: float) -> Tensor:
    """The protected blocks, and of the eligible ones the first, until they cost `ask`."""
    free = eligible & ~protected
    before = (cost * free).cumsum(0) - cost + (cost * protected).sum()
    return protected | (free & (before < ask - ROUNDING))
