"""How blocks are rated against one another: by benefit per cost; before a batch norm, so that gates thin out evenly.

A batch norm takes away what a row would lose by thinning out, and with it what keeps the choice of the best blocks in
bounds. Two things go wrong there, and the rating mends both:

- A gate is not rated higher for being thin, so that gates would be emptied one after another (the layer collapse of
  Tanaka et al., "Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic Flow", 2020). What a gate
  is worth is therefore taken to grow as the logarithm of its density: a block gets the mean worth of its gate's active
  blocks, divided by the share of the gate's blocks that come no later than it. Densities are then in proportion to
  benefit per cost.
- Blocks of one row are rated alike, and so are those of one column, for how their channels happened to start. The best
  blocks are whole rows and columns, which leaves a narrow dense net, and that learns less than a wide sparse one. So
  blocks come in the order of what they are worth beside the others of their row and column: balanced (Sinkhorn & Knopp,
  "Concerning Nonnegative Matrices and Doubly Stochastic Matrices", 1967), and the best of each line first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout

TINY = torch.finfo(torch.float64).tiny
ROUNDS = 3  # of balancing; rows and columns agree to a few per cent then


def rate(worth: Tensor, active: Tensor, bar: Tensor, layout: Layout, saturating: Tensor) -> Tensor:
    """What blocks are picked by, best first; float32 [N].

    Args:
        worth: float32 [N], benefit per cost; below 0 where a block is out of the question.
        active: bool [N].
        bar: float32 [N], how many times more an inactive block has to be worth than an active one; before a batch norm
            both within its gate and between gates.
        layout: where each gate's blocks lie.
        saturating: bool [N], blocks of gates that a batch norm follows.
    """
    own = worth / torch.where(active, 1.0, bar)
    rated = torch.where(worth < 0, worth, own)
    here = (saturating & (worth > 0)).nonzero().flatten()
    if here.numel():
        gate = layout.gate_of[here]
        shown = active[here].float()
        mean = torch.bincount(gate, worth[here] * shown) / torch.bincount(gate, shown).clamp(min=1)
        place = _beside_others(own[here].double(), layout.row_of[here], layout.column_of[here])
        sizes = layout.lengths.float()[gate]
        rated[here] = (mean[gate] * sizes / (_before(place, gate) + 1)).float() / torch.where(shown > 0, 1.0, bar[here])
    return rated


def _beside_others(own: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """What blocks [n] are worth beside the others of their row and column, and the best of each line first."""
    lines = row, column
    sizes = [torch.bincount(line).clamp(min=1) for line in lines]
    for _ in range(ROUNDS):
        for line, size in zip(lines, sizes, strict=True):
            mean = torch.bincount(line, own) / size
            own = own / mean.clamp(min=TINY)[line]
    return own / ((_before(own, row) + 1) * (_before(own, column) + 1))


def _before(values: Tensor, group: Tensor) -> Tensor:
    """How many of its group (int64 [n]) are better than each value, or as good and earlier; int64 [n]."""
    order = values.argsort(descending=True, stable=True)
    before = torch.empty_like(order)
    before[order] = rank_within(group[order])
    return before


def rank_within(group: Tensor) -> Tensor:
    """How many entries of the same group come before each; int64, for groups numbered from 0."""
    grouped = group.sort(stable=True)
    sizes = torch.bincount(group)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(group)
    rank[grouped.indices] = torch.arange(group.numel(), device=group.device) - starts[grouped.values]
    return rank
