"""What each block contributes: first-order benefit, smoothed, of active blocks and of probed ones.

For an active block the rise of the loss when it goes is, to first order, |Σ w·g| (Molchanov et al., "Importance
Estimation for Neural Network Pruning", 2019, eq. 5). An inactive block has no weight, only a gradient, seen when it is
probed. |Σ w·g| = ‖w‖·‖g‖·|cos|, so the benefit that it would have with the weight size and the alignment that are
typical of its gate is ‖g_B‖ · Σ|Σ w·g| / Σ‖g‖, the sums over the gate's active blocks. Norms are kept **relative to
the mean norm of the same step**: a norm seen a hundred steps ago is then still comparable, since what all blocks share
(the batch, the learning phase, a loss scale) has cancelled.

All blocks of all gates are one flat vector of N entries; each gate's `signals.grad` is a view into one [2, N] buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Gate

FAST, SLOW, NORM = 0, 1, 2  # rows of the averages: |Σ w·g| over a short and a long horizon, relative ‖g‖
TINY = torch.finfo(torch.float32).tiny


@dataclass
class Layout:
    """Where each gate's blocks lie in the flat vectors."""

    offsets: list[int]  # length G + 1
    lengths: Tensor  # int64 [G]
    gate_of: Tensor  # int64 [N]
    area: Tensor  # float64 [N], share of the gate's weight that a block holds

    @classmethod
    def of(cls, gates: Sequence[Gate]) -> Layout:
        device = gates[0].signals.device
        sizes = [gate.grid[0] * gate.grid[1] for gate in gates]
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        lengths = torch.tensor(sizes, device=device)
        gate_of = torch.repeat_interleave(torch.arange(len(gates), device=device), lengths)
        areas = [gate.block_area.to(device, torch.float64).flatten() for gate in gates]
        return cls(offsets, lengths, gate_of, torch.cat([area / area.sum() for area in areas]))

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each gate's blocks: [K, N] -> [K, G]. Deterministic, also on a GPU."""
        lengths = self.lengths.expand(values.shape[0], -1)
        return torch.segment_reduce(values, "sum", lengths=lengths, axis=1, unsafe=True)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """One view [n] per gate of a flat vector [N]."""
        return [values[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]


class Inbox:
    """The buffer that the gates' signals arrive in: every `signals.grad` is a view into it."""

    def __init__(self, gates: Sequence[Gate], layout: Layout) -> None:
        self.gates = gates
        self.buffer = torch.zeros(2, layout.offsets[-1], device=layout.gate_of.device)
        self.views = [
            self.buffer[:, start : start + gate.grid[0] * gate.grid[1]].view(2, *gate.grid)
            for gate, start in zip(gates, layout.offsets, strict=False)
        ]
        for gate, view in zip(gates, self.views, strict=True):
            gate.signals.requires_grad_(True)
            gate.signals.grad = view

    def collect(self) -> Tensor:
        """What has arrived since the last `clear`, [2, N]. The caller reads it and then calls `clear`."""
        for gate, view in zip(self.gates, self.views, strict=True):
            if gate.signals.grad is not view:  # replaced (create_graph=True) or dropped (set_to_none) by someone else
                if gate.signals.grad is not None:
                    view.copy_(gate.signals.grad.detach())
                gate.signals.grad = view
        return self.buffer

    def clear(self) -> None:
        self.buffer.zero_()

    def close(self) -> None:
        """Gates stop reporting."""
        for gate in self.gates:
            gate.signals.grad = None
            gate.signals.requires_grad_(False)


@dataclass
class Signals:
    """Exponential averages of what the gates report.

    A block's average is `total` / `weight`, which debiases it and leaves it as it is while the block is unobserved: an
    active block is observed in every step, an inactive one when it is probed. A step in which any signal of a gate
    is NaN or infinite leaves that gate's averages as they were.

    Attributes:
        total, weight: float32 [3, N], rows FAST, SLOW, NORM.
        typical: float32 [2, G], Σ|Σ w·g| and Σ‖g‖ over the active blocks of each gate; their ratio is what counts.
        level: float32 [2], total and weight of the mean ‖g‖ that norms are relative to.
        rate: float32 [3, 1], share of the newest observation: 1 / horizon.
    """

    total: Tensor
    weight: Tensor
    typical: Tensor
    level: Tensor
    rate: Tensor

    @classmethod
    def of(cls, layout: Layout, horizons: tuple[float, float, float]) -> Signals:
        """Empty averages; `horizons` in steps, for FAST, SLOW and NORM."""
        n, g, device = layout.gate_of.numel(), layout.lengths.numel(), layout.gate_of.device
        total, weight = torch.zeros(3, n, device=device), torch.zeros(3, n, device=device)
        rate = torch.tensor([[1 / h] for h in horizons], device=device)
        return cls(total, weight, torch.zeros(2, g, device=device), torch.zeros(2, device=device), rate)

    def observe(self, arrived: Tensor, active: Tensor, ran: Tensor, layout: Layout) -> None:
        """Takes in the signals `arrived` [2, N] of one step, made under `active` [N] by the gates `ran` [G]."""
        contribution, norm = arrived[0].abs(), arrived[1].sqrt()
        sums = layout.sums(torch.stack((contribution, norm * active, norm, active.float())))
        seen = ran & (sums[0] + sums[2]).isfinite()
        sums = torch.where(seen, sums, 0.0)
        slow = self.rate[SLOW]

        alive = sums[1] > 0
        self.typical += torch.where(alive, slow, 0.0) * (sums[:2] - self.typical)
        mean = sums[2].sum() / sums[3].sum().clamp(min=1)
        some = mean > 0
        self.level += torch.where(some, slow, 0.0) * (torch.stack((mean, torch.ones_like(mean))) - self.level)

        valid = seen[layout.gate_of]
        shown = valid & active
        observed = valid & some & (active | (norm > 0))
        contribution = torch.where(shown, contribution, 0.0)
        relative = torch.where(observed, norm / mean, 0.0)
        keep = 1 - self.rate * valid
        self.total.mul_(keep).add_(torch.stack((contribution, contribution, relative)).mul_(self.rate))
        self.weight.mul_(keep).add_(torch.stack((shown, shown, observed)) * self.rate)

    def average(self, row: int) -> Tensor:
        """[N]; 0 where nothing has been observed."""
        return self.total[row] / self.weight[row].clamp(min=TINY)

    def benefit(self, active: Tensor, layout: Layout) -> Tensor:
        """First-order benefit [N] of every block, in units of the loss: measured if active, else expected."""
        alignment = self.typical[0] / self.typical[1].clamp(min=TINY)
        norm = self.average(NORM) * (self.level[0] / self.level[1].clamp(min=TINY))
        return torch.where(active, self.average(SLOW), norm * alignment[layout.gate_of])

    def reported(self) -> Tensor:
        """bool [G]: gates that have had a gradient so far; of a frozen weight nothing is known."""
        return self.typical[1] > 0

    def switch_(self, back: Tensor, gone: Tensor) -> None:
        """Blocks `back` (bool [N]) start with zero weights, so with no contribution that is known.

        Of blocks `gone`, the norm while they were active counts as much as one probe from now on, so that a few probes
        can tell a change.
        """
        self.total[:NORM].masked_fill_(back, 0.0)
        self.weight[:NORM].masked_fill_(back, 0.0)
        self.total[NORM] = torch.where(gone, self.average(NORM) * self.rate[NORM], self.total[NORM])
        self.weight[NORM] = torch.where(gone, self.rate[NORM] * (self.weight[NORM] > 0), self.weight[NORM])


def settled(signals: Signals, active: Tensor, cost: Tensor, share: float) -> float:
    """How far the ranking of blocks has stopped changing, 0 to 1.

    The short and the long horizon each pick the best `share` of the active blocks by benefit per cost; 0 means that
    they agree no better than chance, 1 that they pick the same. This is the mask distance of You et al., "Drawing
    Early-Bird Tickets" (2020), §3, put on the scale between chance and identity. It counts only as far as the long
    horizon has filled, since two averages of the same few steps agree for no good reason.
    """
    fast, slow = (signals.average(row)[active] / cost[active].clamp(min=1e-30) for row in (FAST, SLOW))
    count = fast.numel()
    if count < 2:
        return 1.0
    picked = min(count - 1, max(1, round(share * count)))
    chosen = [values > values.kthvalue(count - picked).values for values in (fast, slow)]
    overlap = float((chosen[0] & chosen[1]).sum()) / picked
    chance = picked / count
    filled = float(signals.weight[SLOW][active].mean())
    return max(0.0, (overlap - chance) / (1 - chance)) * min(1.0, filled)
