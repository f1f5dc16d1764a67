"""Models small enough to compile in a second, and what tests ask of any of them."""

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import ctrlcompile as cc
from ctrlcompile.kernels.index_lists import expand

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-9, 1e-9), torch.bfloat16: (5e-2, 2e-2)}


class MLP(nn.Module):
    """Two gated linears with an activation between; widths are no multiples of most blocks."""

    def __init__(self, inputs: int = 40, hidden: int = 68, outputs: int = 36, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Conv1D(nn.Module):
    """A linear as HuggingFace's GPT-2 has it: an `addmm` with a weight stored [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.size()[:-1], self.weight.size(1))


class Products(nn.Module):
    """An MLP of products with weights stored [in, out], with and without a bias."""

    def __init__(self, inputs: int = 40, hidden: int = 68, outputs: int = 36) -> None:
        super().__init__()
        self.fc, self.projection = Conv1D(inputs, hidden), nn.Parameter(torch.randn(hidden, outputs) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) @ self.projection


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
    """Boolean, of the weight's shape: True where the gate's blocks are switched off."""
    return expand(~gate.mask, gate.block, gate.weight.shape)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(result: Tensor, exact: Tensor) -> float:
    """Root mean square error against float64."""
    return float((result.detach().double() - exact.detach()).square().mean().sqrt())


def no_worse(error: float, other: float, entries: int) -> bool:
    """Whether a root mean square error is at most 1.1 times another, up to chance: over so few entries, either's
    standard error is its part 1 / sqrt(2 * entries), and four of those of the ratio are allowed."""
    return error <= (1.1 + 4 / entries**0.5) * other


def compiled_and_pruned(model: nn.Module, block=8, **settings) -> tuple[nn.Module, dict[str, cc.Gate]]:
    """The compiled model and its gates, with random masks."""
    gates = cc.gates(model, block)
    prune_(gates.values())
    return torch.compile(model, backend="ctrlprune", **settings), gates


def assert_like_plain(run, model: nn.Module, *inputs: Tensor, gates: dict[str, cc.Gate] | None = None) -> None:
    """Output and gradients of `run` are those of the plain model; gradients of masked blocks are zero."""
    gates = cc.gates(model) if gates is None else gates
    results = []
    for call in (run, model):
        model.zero_grad()
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        y = call(*leaves)
        y.float().square().mean().backward()
        results.append({"output": y, "input": leaves[0].grad, **gradients(model)})
    mine, plain = results
    assert mine.keys() == plain.keys()
    for name, theirs in plain.items():
        if theirs is None:
            continue
        if name in gates:
            gone = masked_entries(gates[name])
            assert not mine[name][gone].any(), name
            theirs = theirs.masked_fill(gone, 0)
        rtol, atol = TOLERANCE.get(theirs.dtype, (1e-2, 1e-3))
        torch.testing.assert_close(mine[name], theirs, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
