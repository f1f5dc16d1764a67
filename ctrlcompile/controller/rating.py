"""How blocks are rated against one another: by benefit per cost; before a batch norm, so that gates thin out evenly.

A batch norm takes away what a row would lose by thinning out, and with it what keeps the choice of the best blocks in
bounds. Two things go wrong there, and the rating mends both:

- A gate is not rated higher for being thin, so that gates would be emptied one after another (the layer collapse of
  Tanaka et al., "Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic Flow", 2020). What a gate
  is worth is therefore taken to grow as the logarithm of its density: a block gets the mean worth of its gate, divided
  by the share of the gate's blocks that come before it. Densities are then in proportion to benefit per cost.
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
        bar: float32 [N], how many times more an inactive block has to be worth than an active one.
        layout: where each gate's blocks lie.
        saturating: bool [N], blocks of gates that a batch norm follows.
    """
    worth = torch.where(active | (worth < 0), worth, worth / bar)
    if not saturating.any():
        return worth
    shown = active & (worth > 0)
    of_gates = layout.sums(torch.stack((worth * shown, shown.float())))
    level = (of_gates[0] / of_gates[1].clamp(min=1))[layout.gate_of]
    level = torch.where(active, level, level / bar) / _share(_beside_others(worth, layout), layout.gate_of)
    return torch.where(saturating & (worth > 0), level, worth)


def _beside_others(worth: Tensor, layout: Layout) -> Tensor:
    """What blocks are worth beside the others of their row and column, [N]; below 0 where out of the question."""
    rated = worth > 0
    balanced = worth.double().clamp(min=0)
    lines = layout.row_of, layout.column_of
    sizes = [torch.bincount(line, weights=rated).clamp(min=1) for line in lines]
    for _ in range(ROUNDS):
        for line, size in zip(lines, sizes, strict=True):
            mean = torch.bincount(line, weights=balanced) / size
            balanced = balanced / mean.clamp(min=TINY)[line]
    return torch.where(rated, balanced / (_share(balanced, lines[0]) * _share(balanced, lines[1])), -1.0)


def _share(values: Tensor, group: Tensor) -> Tensor:
    """Share [N], float32, of the blocks of its group (int64 [N]) that are as good as a block or better."""
    order = values.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = rank_within(group[order])
    return (ranks + 1) / torch.bincount(group)[group]


def rank_within(group: Tensor) -> Tensor:
    """How many entries of the same group come before each; int64, for groups numbered from 0."""
    grouped = group.sort(stable=True)
    sizes = torch.bincount(group)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(group)
    rank[grouped.indices] = torch.arange(group.numel(), device=group.device) - starts[grouped.values]
    return rank
