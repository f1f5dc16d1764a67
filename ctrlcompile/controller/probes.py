"""Which inactive blocks have their gradient measured in each step.

Each gate's blocks are visited in one shuffled order, round and round; blocks that are active when their turn comes are
passed over. A probe costs wgrad of one block, and all probes of a step at most `SPEND` of what the step may use. Where
more cost is to come back than those rounds know blocks for, as in short runs, what it would have used pays for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .budget import Ledger
from .contract import Gate
from .layout import Layout

RATE = 0.01  # of the inactive blocks, per step
SPEND = 0.004  # of the step's FLOPs
CHOICE = 2  # where active blocks leave a part of the plan: cost of what is probed until the next decision, times that
WGRAD = 1 / 2  # share of a block's FLOPs that wgrad has at most: 1/3, or 1/2 in a layer that needs no dgrad


class Probes(NamedTuple):
    """What one step probes: flat block ids, int64 [p], gate by gate, and how many of them are each gate's."""

    ids: Tensor
    counts: list[int]

    @classmethod
    def none(cls, layout: Layout) -> Probes:
        """No block of any gate."""
        return cls(layout.gate_of[:0], [0] * layout.lengths.numel())


@dataclass
class Rotation:
    """State of the rounds.

    Attributes:
        order: int64 [N], flat block ids, shuffled within each gate.
        cursor: per gate, the place in its order at which the next round goes on.
        credit: per gate, the fraction of a probe that the budget of past steps has left.
    """

    order: Tensor
    cursor: list[int]
    credit: list[float]

    @classmethod
    def of(cls, layout: Layout, seed: int = 0) -> Rotation:
        """The same orders for the same seed, on every replica."""
        generator = torch.Generator().manual_seed(seed)
        sizes = layout.lengths.tolist()
        order = [
            torch.randperm(n, generator=generator) + start for n, start in zip(sizes, layout.offsets, strict=False)
        ]
        return cls(torch.cat(order), [0] * len(sizes), [0.0] * len(sizes))

    def next(
        self,
        active: Tensor,
        cost: list[float],
        layout: Layout,
        *,
        steps: int,
        afford: float,
        unspent: float,
        capacity: list[int],
    ) -> list[Probes]:
        """What to probe in each of the next `steps` steps.

        Args:
            active: bool [N].
            cost: per gate, the share of the gateable FLOPs of one block.
            afford: share of the gateable FLOPs that a step's probes may cost.
            unspent: share of them that a step leaves to probes anyhow, for want of blocks known to be worth it.
            capacity: per gate, the most probes in a step.
        """
        waiting = ~active[self.order]
        counts = [int(n) for n in layout.sums(waiting.float()[None])[0].tolist()]
        inactive = sum(n * c for n, c in zip(counts, cost, strict=True))
        rate = 0.0
        if inactive > 0:
            rate = min(RATE, (afford + unspent) / WGRAD / inactive)
            rate = max(rate, min(1.0, CHOICE * unspent / inactive) / steps)
        turns: list[Sequence[Tensor]] = []
        for g, (places, ids) in enumerate(zip(layout.split(waiting), layout.split(self.order), strict=True)):
            self.credit[g] += rate * counts[g] * steps
            take = min(int(self.credit[g]), counts[g], capacity[g] * steps)
            self.credit[g] -= int(self.credit[g])
            picked = places.nonzero().flatten()
            if take:
                picked = picked.roll(-int(torch.searchsorted(picked, self.cursor[g])))[:take]
                self.cursor[g] = int(picked[-1]) + 1
            turns.append(ids[picked[:take]].tensor_split(steps))
        return [Probes(torch.cat(turn), [ids.numel() for ids in turn]) for turn in zip(*turns, strict=True)]


class Prober:
    """Plans probes up to the next decision, and hands each gate those of the coming step.

    Attributes:
        rotation: whose turn it is.
        current: what the coming step probes.
        coming: what the steps after it probe.
    """

    def __init__(self, gates: Sequence[Gate], layout: Layout) -> None:
        self.rotation = Rotation.of(layout)
        self.current = Probes.none(layout)
        self.coming: list[Probes] = []
        self._gates, self._layout = gates, layout
        self._capacity = [gate.probes.numel() for gate in gates]
        self._starts = torch.tensor(layout.offsets[:-1])
        self._rooms = torch.tensor([0, *self._capacity[:-1]]).cumsum(0)
        self._area = torch.cat([gate.block_area.flatten() for gate in gates])

    def plan(self, known: Tensor, ledger: Ledger, *, steps: int, wanted: float, unspent: float) -> None:
        """Plans `steps` steps.

        Args:
            known: bool [N], blocks of which probes tell nothing: active ones, and those useless whatever they compute.
            ledger: with the average step.
            wanted: share of the gateable FLOPs that a step is to use.
            unspent: share of them that it leaves to probes anyhow.
        """
        sizes = self._layout.lengths.tolist()
        self.coming = self.rotation.next(
            known,
            [flops / ledger.gated / size for flops, size in zip(ledger.average_gated, sizes, strict=True)],
            self._layout,
            steps=steps,
            afford=SPEND * (ledger.average_fixed / ledger.gated + max(0.0, wanted)),
            unspent=unspent,
            capacity=self._capacity,
        )

    def stop(self) -> None:
        """Probes nothing until the next plan."""
        self.coming = []
        self.hand_out()

    def fits(self, ids: Tensor, counts: Sequence[int]) -> bool:
        """Whether these could be the probes of a step: blocks of their gates, and no more than each has room for."""
        if len(counts) != len(self._capacity) or sum(counts) != ids.numel():
            return False
        gate_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        local = ids.cpu() - self._starts[gate_of]
        inside = bool(((local >= 0) & (local < self._layout.lengths[gate_of])).all())
        return inside and all(count <= room for count, room in zip(counts, self._capacity, strict=True))

    def hand_out(self, *, always: bool = False) -> None:
        """Hands all gates the blocks to probe in the coming step; `always`, or if there are or were any."""
        before, self.current = self.current, self.coming.pop(0) if self.coming else Probes.none(self._layout)
        ids, counts = self.current.ids, torch.tensor(self.current.counts)
        if not (ids.numel() or before.ids.numel() or always):
            return
        gate_of = self._layout.gate_of[ids]
        place = self._rooms[gate_of] + torch.arange(ids.numel()) - (counts.cumsum(0) - counts)[gate_of]
        probes = torch.full((sum(self._capacity),), -1, dtype=torch.int32)  # of all gates, one after the other
        probes[place] = (ids - self._starts[gate_of]).int()
        probes = probes.to(self._gates[0].probes.device, non_blocking=True)
        torch._foreach_copy_([gate.probes for gate in self._gates], probes.split(self._capacity))
        areas = torch.bincount(gate_of, self._area[ids], minlength=counts.numel()).tolist()
        for gate, area in zip(self._gates, areas, strict=True):
            gate.probed_area = float(area)
