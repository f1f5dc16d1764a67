"""Layers and models that stay dense: they compute what Inductor computes, and a reason says why."""

import pytest
import torch
from torch import nn

import ctrlcompile as cc

from .small_models import MLP, assert_like_plain, compiled_and_pruned, masked_entries, prune_, random_mask

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"block": 8}


def test_other_layers_are_inductors_business():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.LayerNorm(40), nn.Linear(40, 40), nn.Dropout(0.0))
    run, _ = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(3, 4, 40))


def test_a_model_without_anything_to_gate_runs_as_inductor_runs_it():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    run = torch.compile(model, backend="ctrlprune")
    assert_like_plain(run, model, torch.randn(3, 12))
    assert cc.gates(run) == {}


def test_a_gate_made_by_hand_leaves_an_excluded_layer_dense_and_the_graph_as_it_is(caplog):
    model = MLP(64, 96, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"block": 8, "exclude": ["fc2*"], "budget": 0.8, "total_steps": 20}
    run = torch.compile(model, backend="ctrlprune", options=options)
    x = torch.randn(16, 64)
    run(x).square().mean().backward()
    with caplog.at_level("INFO", logger="ctrlcompile"):
        gates = cc.gates(model, 8)  # a look at the masks
        assert set(gates) == {"fc1.weight", "fc2.weight"}
        for _ in range(20):
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "lowering it again" not in caplog.text
    assert gates["fc1.weight"].density < 1 == gates["fc2.weight"].density
    gates["fc2.weight"].update_(random_mask(gates["fc2.weight"].grid))
    run(x).square().mean().backward()
    optimizer.step()
    assert not model.fc2.weight[masked_entries(gates["fc2.weight"])].any()


def test_a_look_at_the_gates_of_a_running_model_does_not_lower_it_again(caplog):
    model = MLP(64, 96, 64)
    model.fc2.weight.requires_grad_(False)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(16, 64)
    run(x).sum().backward()
    gate = cc.gates(model, 8)["fc2.weight"]
    with caplog.at_level("INFO", logger="ctrlcompile"):
        run(x).sum().backward()
        assert [row.gated for row in cc.explain(run)(x).rows] == [True, False]
        assert "lowering it again" not in caplog.text
        gate.update_(random_mask(gate.grid))
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        assert [row.gated for row in cc.explain(run)(x).rows] == [True, True]


def test_weights_of_complex_numbers_stay_dense():
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.cfloat), nn.Linear(64, 64, dtype=torch.cfloat))
    assert not cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(8, 64, dtype=torch.cfloat)
    mine = torch.autograd.grad(run(x).abs().square().mean(), list(model.parameters()))
    torch.testing.assert_close(mine, torch.autograd.grad(model(x).abs().square().mean(), list(model.parameters())))


class Transformed(nn.Module):
    """Layers inside `vmap` and `grad` of torch.func, and one outside."""

    def __init__(self):
        super().__init__()
        self.mapped, self.differentiated, self.fc = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x):
        slope = torch.func.grad(lambda row: self.differentiated(row).square().sum())(x[0])
        return self.fc(torch.func.vmap(self.mapped)(x)) + slope


def test_layers_inside_transformations_of_torch_func_stay_dense():
    torch.manual_seed(0)
    model = Transformed()
    run = torch.compile(model, backend="ctrlprune", options={"block": 8})
    x = torch.randn(6, 40)
    run(x).sum().backward()
    gates = cc.gates(model)
    gates = {"fc.weight": gates["fc.weight"]}
    prune_(gates.values())
    assert_like_plain(run, model, x, gates=gates)
    rows = {row.name: row.reason for row in cc.explain(run)(x).rows}
    assert rows.pop("fc.weight") == ""
    assert set(rows.values()) == {"inside a transformation of torch.func, such as vmap"}


@pytest.mark.filterwarnings("ignore:ctrlcompile leaves out of its budget")
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_whose_number_depends_on_values_stay_dense():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, chosen):
            y = self.fc1(x)
            return self.fc2(y[chosen.nonzero().squeeze(1)]).sum() + y.sum()

    model = Picks()
    run = torch.compile(model, backend="ctrlprune", options={"block": 8, "budget": 0.6, "total_steps": 6})
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(6):
        x, chosen = torch.randn(16, 64), torch.rand(16) < 0.5
        torch.testing.assert_close(run(x, chosen), model(x, chosen), rtol=1e-4, atol=1e-4)
        run(x, chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = cc.explain(run)(x, chosen).rows
    assert first.gated
    assert first.density < 1
    assert second.reason == "the size of its input depends on values in the same graph"


def test_a_model_made_in_inference_mode_and_a_bias_of_one_entry_stay_dense():
    with torch.inference_mode():
        made = MLP()
    run = torch.compile(made, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(6, 40)
    with torch.no_grad():
        torch.testing.assert_close(run(x), made(x))
    assert not cc.gates(made, 8)

    model = MLP()
    model.fc1.bias = nn.Parameter(torch.randn(1))
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, x, gates={"fc2.weight": gates["fc2.weight"]})
    assert cc.explain(run)(x).rows[0].reason == "its bias has not one entry per output"


def test_vmap_beside_a_gated_layer():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x):
            return torch.func.vmap(lambda row: row * row.sum())(self.fc(x))

    torch.manual_seed(0)
    model = Mapped()
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(6, 40), gates=gates)
