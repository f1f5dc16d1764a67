"""What each block contributes: first-order benefit, smoothed, of active blocks and of probed ones.

For an active block the rise of the loss when it goes is, to first order, |Σ w·g| (Molchanov et al., "Importance
Estimation for Neural Network Pruning", 2019, eq. 5). An inactive block has no weight, only a gradient, seen when it is
probed. |Σ w·g| = ‖w‖·‖g‖·|cos|, so the benefit that it would have with the weight size and the alignment that are
typical of its gate is ‖g_B‖ · Σ|Σ w·g| / Σ‖g‖, the sums over the gate's active blocks. Norms are kept **relative to
the sum of the same step**: a norm seen a hundred steps ago is then still comparable, since what all blocks share (the
batch, the learning phase, a loss scale) has cancelled.

Before a batch norm the signed Σ w·g over a row is 0, whatever the row is worth, and so is that of the last block in it.
There the gates' whole Σ|Σ w·g| is shared out as if gradients had no particular direction: in proportion to ‖w‖·‖g‖/√n,
for n weights in a block, which is what blocks of dense layers look like in the first steps.

All blocks of all gates are one flat vector of N entries; each gate's `signals.grad` is a view into one buffer.
Steps are added up as they come, on the device of the weights and without waiting for it: a few passes over N numbers.
When a decision is due they are folded into averages, and the benefit of each block goes to the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Gate
from .layout import Layout

FAST, SLOW = 0, 1  # rows of the averages of |Σ w·g|: over a short and a long horizon
PROBE = 0.3  # share of the newest probe in the average of a block's probes
TINY = torch.finfo(torch.float32).tiny


class Inbox:
    """The buffer that the gates' signals arrive in: every `signals.grad` is a view into it."""

    def __init__(self, gates: Sequence[Gate], layout: Layout) -> None:
        self.gates = gates
        self.buffer = torch.zeros(2 * layout.offsets[-1], device=gates[0].signals.device)
        self.views = [  # contiguous, as autograd wants a gradient of a contiguous tensor to be
            self.buffer[2 * start : 2 * stop].view(2, *gate.grid)
            for gate, start, stop in zip(gates, layout.offsets, layout.offsets[1:], strict=False)
        ]
        for gate, view in zip(gates, self.views, strict=True):
            gate.signals.requires_grad_(True)
            if gate.signals.grad is not None:  # of the first step, whose hook makes the controller
                view.copy_(gate.signals.grad)
            gate.signals.grad = view

    def collect(self) -> Tensor:
        """What has arrived since it was last collected, [2, N]; the buffer is empty afterwards."""
        for gate, view in zip(self.gates, self.views, strict=True):
            if gate.signals.grad is not view:  # replaced (create_graph=True) or dropped (set_to_none) by someone else
                if gate.signals.grad is not None:
                    view.copy_(gate.signals.grad.detach())
                gate.signals.grad = view
        arrived = torch.cat([view.flatten(1) for view in self.views], 1)
        self.buffer.zero_()
        return arrived

    def close(self) -> None:
        """Gates stop reporting."""
        for gate in self.gates:
            gate.signals.grad = None
            gate.signals.requires_grad_(False)


@dataclass
class Signals:
    """What the gates have reported: sums since the last fold, and debiased exponential averages.

    Attributes:
        sums: float32 [2, N], |Σ w·g| and ‖g‖ of each block, added up over the steps since the last fold.
        steps: float32 [G], how many steps of each gate these are.
        total, weight: float32 [2, N], rows FAST and SLOW; an active block's average |Σ w·g| is total / weight.
        typical: float32 [2, G], Σ|Σ w·g| and Σ‖g‖ over the active blocks of a gate; their ratio is what counts.
        level: float32 [2], total and weight of the sum of all ‖g‖ in a step.
        probed: float32 [2, N], total and weight of each inactive block's ‖g‖ / sum of all ‖g‖ in the step.
        keep: float32 [2, 1], what the averages FAST and SLOW keep in a step: 1 − 1 / horizon.
    """

    sums: Tensor
    steps: Tensor
    total: Tensor
    weight: Tensor
    typical: Tensor
    level: Tensor
    probed: Tensor
    keep: Tensor

    @classmethod
    def of(cls, layout: Layout, horizons: tuple[float, float]) -> Signals:
        """Nothing reported yet, on the layout's device; `horizons` in steps, FAST and SLOW."""
        n, g, device = layout.gate_of.numel(), layout.lengths.numel(), layout.gate_of.device
        sums, total, weight, probed = torch.zeros(4, 2, n, device=device)
        typical, level = torch.zeros(2, g, device=device), torch.zeros(2, device=device)
        keep = torch.tensor([[1 - 1 / h] for h in horizons], device=device)
        return cls(sums, torch.zeros(g, device=device), total, weight, typical, level, probed, keep)

    def observe(self, arrived: Tensor, probes: Tensor, ran: Tensor, layout: Layout) -> None:
        """Takes in one step. A step with any NaN or infinite signal is ignored as a whole.

        Args:
            arrived: float32 [2, N], signed Σ w·g and Σ g²; used as scratch.
            probes: int64 [p], flat ids of the inactive blocks probed in it.
            ran: bool [G], gates that had a part in it.
        """
        arrived[0].abs_()
        arrived[1].sqrt_()
        sums = arrived.sum(1)
        valid = sums.sum().isfinite()
        self.sums += torch.where(valid, arrived, 0.0)
        self.steps += valid & ran
        share = torch.where(valid, arrived[1, probes] / sums[1].clamp(min=TINY), 0.0)
        rate = PROBE * (valid & ran[layout.gate_of[probes]])
        self.probed[:, probes] += rate * (torch.stack((share, torch.ones_like(share))) - self.probed[:, probes])

    def fold(self, active: Tensor, layout: Layout, presumed: Tensor | None = None) -> None:
        """Folds the steps since the last fold into the averages.

        Args:
            active: bool [N], the mask under which they were made.
            presumed: float32 [N], ‖w‖/√n of blocks whose |Σ w·g| is presumed, in proportion to this times ‖g‖; 0 where
                it is taken as measured.
        """
        shown = active.float()
        if presumed is not None:
            self._presume(presumed.nan_to_num(0.0, 0.0, 0.0), shown)
        mean = self.sums * (shown / self.steps.clamp(min=1)[layout.gate_of])
        rate = 1 - self.keep**self.steps  # [2, G]: as many steps as there were, each with their mean
        per_block = rate[:, layout.gate_of]
        self.total += per_block * (mean[0] - self.total)
        self.weight += per_block * (shown - self.weight)

        of_gates = layout.sums(mean)
        alive = of_gates[1] > 0
        self.typical += torch.where(alive, rate[SLOW], 0.0) * (of_gates - self.typical)
        everything = self.sums[1].sum() / self.steps.max().clamp(min=1)
        newest = torch.where(everything > 0, rate[SLOW].max(), 0.0)
        self.level += newest * (torch.stack((everything, torch.ones_like(everything))) - self.level)
        self.sums.zero_()
        self.steps.zero_()

    def _presume(self, presumed: Tensor, shown: Tensor) -> None:
        affected = presumed > 0
        share = presumed * self.sums[1] * shown
        total = (self.sums[0] * shown * affected).sum()
        self.sums[0] = torch.where(affected, share * (total / share.sum().clamp(min=TINY)), self.sums[0])

    def contribution(self, row: int) -> Tensor:
        """Average |Σ w·g| [N] of active blocks; 0 where nothing is known."""
        return self.total[row] / self.weight[row].clamp(min=TINY)

    def benefit(self, active: Tensor, layout: Layout) -> Tensor:
        """First-order benefit [N] of every block, in units of the loss: measured if active, else expected."""
        alignment = self.typical[0] / self.typical[1].clamp(min=TINY)
        scale = alignment * (self.level[0] / self.level[1].clamp(min=TINY))
        expected = self.probed[0] / self.probed[1].clamp(min=TINY) * scale[layout.gate_of]
        return torch.where(active, self.contribution(SLOW), expected)

    def reported(self) -> Tensor:
        """bool [G]: gates that have had a gradient so far; of a frozen weight nothing is known."""
        return self.typical[1] > 0

    def forget_(self, switched: Tensor) -> None:
        """Blocks `switched` (bool [N]) start afresh: what they were on the other side says little."""
        for average in (self.total, self.weight, self.probed):
            average.masked_fill_(switched, 0.0)

    def settled(self, active: Tensor, cost: Tensor, share: float) -> float:
        """How far the ranking of blocks has stopped changing, 0 to 1.

        The short and the long horizon each pick the best `share` of the active blocks by benefit per cost; 0 means that
        they agree no better than chance, 1 that they pick the same. This is the mask distance of You et al., "Drawing
        Early-Bird Tickets" (2020), §3, put on the scale between chance and identity. It counts only as far as the long
        horizon has filled, since two averages of the same few steps agree for no good reason.
        """
        count = int(active.sum())
        if count < 2:
            return 1.0
        picked = min(count - 1, max(1, round(share * count)))
        chosen = []
        for row in (FAST, SLOW):
            worth = torch.where(active, self.contribution(row) / cost.float().clamp(min=TINY), -1.0)
            chosen.append(worth > worth.kthvalue(worth.numel() - picked).values)
        agreed = float((chosen[0] & chosen[1]).sum()) / picked
        chance = picked / count
        filled = float(self.weight[SLOW].sum()) / count
        return max(0.0, (agreed - chance) / (1 - chance)) * min(1.0, filled)
