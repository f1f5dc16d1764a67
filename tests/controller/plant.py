"""Simulated models for the controller's tests: gates with real masks, and two kinds of signals to report through them.

`Plant` makes signals up, and meters its own FLOPs. `Net` is a real MLP in plain torch, trained with dense products of
masked weights, so that its signals are true gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ctrlcompile.controller.contract import StepCost
from ctrlcompile.controller.coupling import Coupled, Coupling, Members, Sets
from ctrlcompile.gate import PROBED_SHARE

WGRAD = 1 / 3


class FakeGate:
    """What `ctrlcompile.controller.contract.Gate` asks for, and a record of how it was used."""

    def __init__(self, name: str, shape: tuple[int, int], block: tuple[int, int], weight: Tensor | None = None) -> None:
        self.name, self.shape, self.block = name, shape, block
        self.grid = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
        rows = torch.full((self.grid[0],), float(block[0]))
        cols = torch.full((self.grid[1],), float(block[1]))
        rows[-1] -= self.grid[0] * block[0] - shape[0]
        cols[-1] -= self.grid[1] * block[1] - shape[1]
        self.block_area = rows[:, None] * cols
        self._mask = torch.ones(self.grid, dtype=torch.bool)
        self.probes = torch.full((max(1, self._mask.numel() // PROBED_SHARE),), -1, dtype=torch.int32)
        self.signals = torch.zeros(2, *self.grid, requires_grad=True)
        self.switches = torch.zeros(self.grid, dtype=torch.int64)
        self.weight = weight
        self.trained, self.normalised, self.transposed = True, False, False
        self.active_area = 1.0  # share of the weight
        self.probed_area = 0.0  # entries
        self.updates = 0

    @property
    def mask(self) -> Tensor:
        return self._mask.clone()

    @property
    def density(self) -> float:
        return float(self._mask.float().mean())

    def update_(self, mask: Tensor) -> None:
        assert mask.shape == self._mask.shape
        assert mask.dtype == torch.bool
        self.updates += 1
        self.switches += mask ^ self._mask
        self._mask.copy_(mask)
        self.probes.fill_(-1)
        self.probed_area = 0.0
        self.active_area = float((self.block_area * self._mask).sum() / self.block_area.sum())
        if self.weight is not None:
            with torch.no_grad():
                self.weight *= self.entries()

    def norms(self) -> Tensor:
        """As if all weights were 1, where there are none."""
        weight = torch.ones(self.shape) if self.weight is None else self.weight.detach()
        return self.blockwise(weight.square() * self.entries()).sqrt()

    def probed(self) -> Tensor:
        """bool [R, C]."""
        probed = torch.zeros(self._mask.numel(), dtype=torch.bool)
        probed[self.probes[self.probes >= 0].long()] = True
        assert not (probed & self._mask.flatten()).any(), "an active block is probed"
        assert self.probed_area == float(self.block_area.flatten()[probed].sum())
        return probed.view(self.grid)

    def entries(self) -> Tensor:
        """The mask, one entry per weight."""
        full = self._mask.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return full[: self.shape[0], : self.shape[1]]

    def blockwise(self, values: Tensor) -> Tensor:
        """Sums of a weight-shaped tensor over blocks, [R, C]."""
        pad = (0, self.grid[1] * self.block[1] - self.shape[1], 0, self.grid[0] * self.block[0] - self.shape[0])
        tiles = torch.nn.functional.pad(values, pad).view(self.grid[0], self.block[0], self.grid[1], self.block[1])
        return tiles.sum((1, 3))

    def report(self, contribution: Tensor, square: Tensor) -> None:
        """Accumulates as autograd does."""
        visible = self._mask | self.probed()
        reported = torch.stack((torch.where(self._mask, contribution, 0.0), torch.where(visible, square, 0.0)))
        self.signals.grad = reported if self.signals.grad is None else self.signals.grad.add_(reported)


class Meter:
    """Counts the FLOPs of a step of `rows` rows through the gates, probes included."""

    def __init__(self, gates: list[FakeGate], fixed: float) -> None:
        self.gates, self.fixed, self.rows = gates, fixed, 1.0
        self.spared = 0.0  # of the fixed FLOPs, what the model as it is pruned leaves out
        self.coupled: tuple[Coupled, ...] = ()

    def __call__(self) -> StepCost:
        gated = {gate: 6.0 * self.rows * gate.shape[0] * gate.shape[1] for gate in self.gates}
        whole, fixed = self.rows * self.fixed, self.rows * (self.fixed - self.spared)
        used = fixed + sum(
            f * (gate.active_area + WGRAD * gate.probed_area / gate.block_area.sum().item())
            for gate, f in gated.items()
        )
        return StepCost(whole + sum(gated.values()), fixed, gated, used, self.coupled)


def chained(gates: list[FakeGate]) -> Coupled:
    """Each gate feeds the next, channel by channel; blocks of the two may be of different sizes."""
    feeds: list[Members] = [None] * gates[0].grid[1]
    reads: list[Members] = []
    rows, columns = 0, gates[0].grid[1]
    for before, after in itertools.pairwise(gates):
        assert before.shape[0] == after.shape[1]
        (r, _), (_, c) = before.block, after.block
        touching = [
            [i * r < (j + 1) * c and j * c < (i + 1) * r for j in range(after.grid[1])] for i in range(before.grid[0])
        ]
        reads += [frozenset(columns + j for j, touches in enumerate(row) if touches) for row in touching]
        feeds += [frozenset(rows + i for i, row in enumerate(touching) if row[j]) for j in range(after.grid[1])]
        rows, columns = rows + before.grid[0], columns + after.grid[1]
    reads += [None] * gates[-1].grid[0]
    grids = zip(*(gate.grid for gate in gates), strict=True)
    return Coupling(*grids, Sets.from_members(feeds), Sets.from_members(reads)), tuple(gates)


class Plant:
    """Blocks with a lognormal usefulness that decays from a peak, observed through noise."""

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        *,
        block: tuple[int, int] = (8, 8),
        fixed_share: float = 0.1,
        noise: float = 0.5,
        spread: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.gates = {f"layer{i}": FakeGate(f"layer{i}", shape, block) for i, shape in enumerate(shapes)}
        whole = sum(6.0 * a * b for a, b in shapes)
        self.meter = Meter(list(self.gates.values()), whole * fixed_share / (1 - fixed_share))
        self.noise = noise
        self.useful = [(spread * self._normal(gate.grid)).exp() for gate in self.gates.values()]
        self.step = 0

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def train_step(self, rows: float = 1.0, spoil: Callable[[Tensor], None] | None = None) -> None:
        """One forward and backward pass; `spoil` may damage the signals of a gate in place."""
        self.step += 1
        self.meter.rows = rows
        scale = math.exp(-self.step / 300)
        for gate, useful in zip(self.gates.values(), self.useful, strict=True):
            contribution = scale * useful * (1 + self.noise * self._normal(gate.grid))
            square = (scale * useful * (1 + self.noise * self._normal(gate.grid))) ** 2
            if spoil is not None:
                spoil(contribution)
            gate.report(contribution, square)


class Net:
    """An MLP whose weights are gated: forward through masked weights, gradients by autograd."""

    def __init__(self, widths: list[int], *, block: tuple[int, int] = (8, 8), lr: float = 0.01, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = [
            (torch.randn(b, a, generator=generator) / a**0.5).requires_grad_() for a, b in itertools.pairwise(widths)
        ]
        shapes = [tuple(w.shape) for w in self.weights]
        self.gates = {
            f"fc{i}": FakeGate(f"fc{i}", (s[0], s[1]), block, w)
            for i, (s, w) in enumerate(zip(shapes, self.weights, strict=True))
        }
        self.meter = Meter(list(self.gates.values()), 0.05 * sum(6.0 * a * b for a, b in shapes))
        self.optimizer = torch.optim.Adam(self.weights, lr=lr)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights[:-1]:
            x = torch.relu(x @ weight.t())
        return x @ self.weights[-1].t()

    def train_step(self, x: Tensor, y: Tensor) -> float:
        loss = (self.forward(x) - y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        for gate, weight in zip(self.gates.values(), self.weights, strict=True):
            assert weight.grad is not None
            with torch.no_grad():
                gate.report(gate.blockwise(weight * weight.grad), gate.blockwise(weight.grad**2))
                weight.grad *= gate.entries()
        self.optimizer.step()
        with torch.no_grad():
            for gate, weight in zip(self.gates.values(), self.weights, strict=True):
                weight *= gate.entries()
        return float(loss.detach())
