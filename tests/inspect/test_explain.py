"""explain: a row per layer with its reason, and FLOPs that add up to what PyTorch counts."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import kernel_choice, variants
from ctrlcompile.meter import meter
from ctrlcompile.variants import DENSE

from ..small_models import Products, prune_

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """Gated, small, parametrized, unreached; a graph break, a convolution and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.wide, self.small = nn.Linear(64, 72), nn.Linear(72, 16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 64))
        self.unreached = nn.Linear(64, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.small(self.wide(self.conv(x)))
        torch._dynamo.graph_break()
        return self.dropout(self.normed(x))


@pytest.fixture
def explained():
    model, x = Mixed(), torch.randn(5, 4, 64)
    run = torch.compile(model, backend="ctrlprune", options={"block": 16})
    run(x)
    gates = cc.gates(run)
    prune_(gates.values())
    return model, run, x, gates, cc.explain(run)(x)


def test_every_layer_has_a_row_that_says_gated_or_why_not(explained):
    _, _, _, gates, found = explained
    rows = {row.name: row for row in found.rows}
    gate = gates["wide.weight"]
    wide = rows["wide.weight"]
    assert list(gates) == ["wide.weight"]
    assert (wide.gated, wide.reason, wide.block, wide.shape) == (True, "", (16, 16), (72, 64))
    assert wide.density == gate.density < 1
    assert "C++" in wide.kernel
    assert __file__.rsplit("/", 1)[1] in wide.source
    reasons = {name: row.reason for name, row in rows.items() if not row.gated}
    assert "too small" in reasons.pop("small.weight")
    assert "not in a compiled graph" in reasons.pop("unreached.weight")
    assert "fewer than a block" in reasons.pop("conv.weight")
    (normed,) = reasons.values()
    assert "parametrization" in normed
    assert found.regions == 2


def test_flops_add_up_to_pytorchs_own_count(explained):
    model, _, x, gates, found = explained
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert found.dense_flops == counter.get_total_flops()
    gate = gates["wide.weight"]
    wide = next(row for row in found.rows if row.name == "wide.weight")
    assert wide.dense_flops == 3 * 2 * 20 * 64 * 72
    assert wide.flops == pytest.approx(wide.dense_flops * gate.active_share)
    assert found.flops == pytest.approx(found.dense_flops - wide.dense_flops + wide.flops)


def test_the_table_shows_every_row_and_shares_that_sum_to_one(explained):
    text = str(explained[-1])
    for row in explained[-1].rows:
        assert row.name in text
    shares = [float(line.rsplit(None, 1)[1][:-1]) for line in text.splitlines() if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))


def test_explaining_changes_nothing_and_costs_no_budget(explained):
    model, run, x, gates, _ = explained
    counter = meter.counter(gates.values())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    cc.explain(run)(x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert counter().dense == 0
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_was_never_compiled_is_an_error():
    with pytest.raises(RuntimeError, match="pass the compiled model"):
        cc.explain(Mixed())(torch.randn(5, 4, 64))
    with pytest.raises(RuntimeError, match="pass the compiled model"):
        cc.explain(torch.compile(nn.Linear(8, 8), backend="eager"))(torch.randn(5, 8))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        cc.explain("model")


def test_after_an_error_in_the_model_explain_works_again(explained):
    _, run, x, _, _ = explained
    with pytest.raises(Exception):  # noqa: B017, PT011
        cc.explain(run)(torch.randn(5, 4, 63))
    assert cc.explain(run)(x).rows


def test_a_product_with_a_parameter_has_a_row_in_its_own_orientation_and_others_have_none():
    class Model(Products):
        def __init__(self):
            super().__init__(64, 72, 64)
            self.scaled, self.vector = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))

        def forward(self, x):
            y = torch.addmm(self.vector, super().forward(x).flatten(0, 1), self.scaled, beta=2)
            return torch.softmax(y @ y.t(), -1) @ y @ self.vector

    model, x = Model(), torch.randn(3, 5, 64)
    run = torch.compile(model, backend="ctrlprune", options={"block": (8, 16)})
    run(x)
    gates = cc.gates(model)
    prune_(gates.values())
    found = cc.explain(run)(x)
    rows = {row.name: row for row in found.rows}
    assert {name: row.gated for name, row in rows.items()} == {
        "fc.weight": True,
        "projection": True,
        "scaled": False,
        "vector": False,
    }
    assert rows["scaled"].reason == "it scales its terms"
    assert rows["vector"].reason == "its weight is no matrix"
    fc = rows["fc.weight"]
    assert (fc.shape, fc.transposed, fc.block) == ((64, 72), True, (8, 16))
    assert fc.dense_flops == 2 * 2 * 15 * 64 * 72, "the input needs no gradient"
    assert fc.flops == pytest.approx(fc.dense_flops * gates["fc.weight"].active_share)
    assert rows["vector"].dense_flops == 3 * 2 * 15 * 64
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert found.dense_flops == counter.get_total_flops()
    assert "64 x 72 (in x out)" in str(found)

    table = variants.open_table(gates["fc.weight"])
    table.nodes["dgrad"].variant = DENSE  # the kernel of a linear's dgrad computes x @ weight
    fc, plain = cc.explain(run)(x).rows[:2]
    assert fc.variants == {"forward": "dense", "dgrad": "block-sparse", "wgrad": "block-sparse"}
    linear = kernel_choice.kernel_sources(x.device, x.dtype, x.dtype, (8, 16), "none")
    kernels = {"forward": "dgrad", "dgrad": "forward", "wgrad": "wgrad"}
    assert plain.kernel_sources == {role: linear[kernel] for role, kernel in kernels.items()}


def test_a_linear_called_twice_has_a_row_for_each_call_and_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    run = torch.compile(Twice(), backend="ctrlprune", options={"block": 16})
    found = cc.explain(run)(torch.randn(5, 64))
    assert [row.name for row in found.rows] == ["fc.weight", "fc.weight"]
    assert found.dense_flops == sum(row.dense_flops for row in found.rows) == 2 * 5 * 64 * 64 * (2 + 3)
