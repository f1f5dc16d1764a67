"""Models small enough to compile in a second, and what tests ask of any of them."""

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import ctrlcompile as cc
from ctrlcompile.kernels.index_lists import expand


class MLP(nn.Module):
    """Two gated linears with an activation between; widths are no multiples of most blocks."""

    def __init__(self, inputs: int = 40, hidden: int = 68, outputs: int = 36, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def random_mask(grid: tuple[int, int], density: float | None = None) -> Tensor:
    """Random blocks, at a random density; at least one active and one not."""
    density = random.uniform(0.2, 0.8) if density is None else density
    mask = torch.rand(grid) < density
    flat = mask.view(-1)
    first, second = random.sample(range(flat.numel()), 2)
    flat[first], flat[second] = True, False
    return mask


def prune_(gates: Iterable[cc.Gate]) -> None:
    """A random mask for each gate."""
    for gate in gates:
        gate.update_(random_mask(gate.grid))


def masked_entries(gate: cc.Gate) -> Tensor:
    """Boolean `[out, in]`: True where the gate's blocks are switched off."""
    return expand(~gate.mask, gate.block, gate.shape)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(result: Tensor, exact: Tensor) -> float:
    """Root mean square error against float64."""
    return float((result.detach().double() - exact.detach()).square().mean().sqrt())
