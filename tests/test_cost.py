"""What a step costs: dense as PyTorch counts it, used as the gated operators count themselves, at every size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.meter import meter

from .small_models import MLP, prune_

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """Gated projections around attention, which no gate can change."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(40, 120), nn.Linear(40, 40)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 20)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def dense_flops(model: nn.Module, x: torch.Tensor) -> int:
    """Of forward and backward of the plain model, on the meta device: what does not depend on a CPU's kernels."""
    plain = type(model)().to("meta")
    with FlopCounterMode(display=False) as counter:
        plain(torch.empty_like(x, device="meta")).sum().backward()
    return counter.get_total_flops()


class Gated(nn.Module):
    """The MLP by the gated operators themselves, so that PyTorch's counter sees what they compute."""

    def __init__(self, model: MLP) -> None:
        super().__init__()
        self.layers = [(layer, cc.gates(model)[f"{name}.weight"]) for name, layer in model.named_children()]

    def forward(self, x):
        (fc1, one), (fc2, two) = self.layers
        x = ops.linear(x, fc1.weight, fc1.bias, one.signals, list(one.lists), one.probes, *one.block, "relu")[0]
        return ops.linear(x, fc2.weight, fc2.bias, two.signals, list(two.lists), two.probes, *two.block, "none")[0]


def test_a_steps_cost_is_what_the_counter_counts_at_every_size_and_mask():
    model = MLP()
    gates = cc.gates(model, 8)
    counter = meter.counter(gates.values())
    run = torch.compile(model, backend="ctrlprune")
    for lead in ((3, 5), (4, 7), (2, 9)):
        x = torch.randn(*lead, 40)
        run(x).sum().backward()
        counter()
        prune_(gates.values())
        for gate in gates.values():
            gate.probe_((~gate.mask).flatten().nonzero().flatten()[: gate.probes.numel()])
        run(x).sum().backward()
        cost = counter()
        assert cost.dense == dense_flops(model, x) == cost.fixed + sum(cost.gated.values())
        assert cost.fixed == 0
        rows = lead[0] * lead[1]
        assert cost.gated == {
            gates["fc1.weight"]: 2 * 2 * rows * 40 * 68,  # no gradient of the input is asked for
            gates["fc2.weight"]: 3 * 2 * rows * 68 * 36,
        }
        with FlopCounterMode(display=False) as counted:
            Gated(model)(x).sum().backward()
        assert cost.used == pytest.approx(counted.get_total_flops(), rel=1e-6)


def test_attention_counts_as_fixed():
    model = Attention()
    counter = meter.counter(cc.gates(model, 8).values())
    run = torch.compile(model, backend="ctrlprune")
    for lead in ((2, 6), (3, 10), (5, 8)):
        x = torch.randn(*lead, 40)
        run(x).sum().backward()
        cost = counter()
        assert cost.dense == cost.used == dense_flops(model, x)
        products = 2 * lead[0] * lead[1] * 40 * (2 * 120 + 3 * 40)
        assert cost.fixed == cost.dense - products > 0


def test_evaluation_and_other_models_cost_this_step_nothing():
    model, other = MLP(), MLP()
    counter = meter.counter(cc.gates(model, 8).values())
    cc.gates(other, 8)
    run, run_other = (torch.compile(m, backend="ctrlprune") for m in (model, other))
    x = torch.randn(3, 40)
    with torch.no_grad():
        run(x)
    run_other(x).sum().backward()
    assert counter().dense == 0
    run(x).sum().backward()
    run(x).sum().backward()
    twice = counter()
    assert twice.dense == 2 * dense_flops(model, x)
    assert counter().dense == 0


def test_a_region_of_two_optimizers_costs_both_of_them_its_whole_and_other_steps_nothing():
    model = MLP()
    gates = cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.9})
    x = torch.randn(3, 40)
    first = meter.counter([gates["fc1.weight"]])
    for _ in range(2):
        run(x).sum().backward()
        assert first().dense == dense_flops(model, x)
    second = meter.counter([gates["fc2.weight"]])  # made after its first step, as where a hook makes it
    assert second().dense == dense_flops(model, x), "of the step that has just been"
    for _ in range(2):
        run(x).sum().backward()
        assert first() == second()
    assert first().dense == second().dense == 0
