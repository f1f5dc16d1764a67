"""Graphs before and after each pass: which operators go, which come, and that the original stays as it was."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.gate import registry
from ctrlcompile.passes import passes_for, run
from ctrlcompile.passes.fuse_activation import fuse_activation
from ctrlcompile.passes.gate_linear import gate_linear
from ctrlcompile.passes.gate_matmul import gate_matmul
from ctrlcompile.passes.gate_nodes import GATE_INPUTS
from ctrlcompile.passes.graph_edit import copy_graph
from ctrlcompile.passes.layer_nodes import is_layer, is_linear, is_matmul, obstacle

from ..small_models import prune_


class Captured:
    """Dynamo's graph of a model with its example inputs; run as it is."""

    def __init__(self, model: nn.Module, *inputs: torch.Tensor) -> None:
        def capture(gm, example_inputs):
            self.gm, self.inputs = gm, list(example_inputs)
            return gm.forward

        self.output = torch.compile(model, backend=capture)(*inputs)
        self.linears = [node.name for node in self.gm.graph.nodes if is_linear(node)]
        self.matmuls = [node.name for node in self.gm.graph.nodes if is_matmul(node)]

    def gated(self, block=(8, 8), names=None):
        chosen = self.linears if names is None else names
        return gate_linear(copy_graph(self.gm), self.inputs, blocks=dict.fromkeys(chosen, block))


def count(gm, target) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


def placeholders(gm) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == "placeholder"]


class TwoUses(nn.Module):
    """Three linear nodes, two weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40, bias=False)

    def forward(self, x):
        return self.a(self.b(self.a(x)))


def test_gate_linear_replaces_each_linear_and_adds_the_gates_inputs_once_per_weight():
    model = TwoUses()
    captured = Captured(model, torch.randn(6, 40))
    before = str(captured.gm.graph)
    gm = captured.gated()
    assert sum(map(is_linear, gm.graph.nodes)) == 0
    assert count(gm, ops.linear.default) == 3
    old, new = placeholders(captured.gm), placeholders(gm)
    assert new[: len(old)] == old
    assert len(new) == len(old) + 2 * len(GATE_INPUTS)
    assert str(captured.gm.graph) == before, "Dynamo's own graph is not edited"
    weights = [captured.inputs[position] for position in gm.meta["gated_weights"]]
    assert weights[0] is model.a.weight
    assert weights[1] is model.b.weight


def test_the_gated_graph_computes_what_the_masks_say():
    model = TwoUses()
    captured = Captured(model, torch.randn(6, 40))
    gm = captured.gated()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    extra = [tensor for gate in gates.values() for tensor in gate.inputs]
    (y,) = gm(*captured.inputs, *extra)
    torch.testing.assert_close(y, captured.gm(*captured.inputs)[0], rtol=1e-4, atol=1e-5)
    (dense,) = captured.gm(*captured.inputs)
    assert not torch.allclose(dense, captured.output), "masks changed the output at all"


def test_linears_that_are_not_named_stay_as_they_are():
    captured = Captured(TwoUses(), torch.randn(6, 40))
    gm = captured.gated(names=captured.linears[1:2])
    assert count(gm, ops.linear.default) == 1
    assert sum(map(is_linear, gm.graph.nodes)) == 2
    assert len(gm.meta["gated_weights"]) == 1


class Spelled(nn.Module):
    """A product of rows x [6, 40] with a Parameter [40, 36], and a bias [36], in the words of a user."""

    def __init__(self, body):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(40, 36) / 6), nn.Parameter(torch.randn(36))
        self.body = body

    def forward(self, x):
        return self.body(x, self.weight, self.bias)


SPELLINGS = {
    "operator": (lambda x, w, b: x @ w, set()),
    "dunder": (lambda x, w, b: x.__matmul__(w), set()),
    "matmul": (lambda x, w, b: torch.matmul(x, w), set()),
    "matmul_by_name": (lambda x, w, b: torch.matmul(x, other=w), set()),
    "matmul_all_by_name": (lambda x, w, b: torch.matmul(other=w, input=x), set()),
    "method": (lambda x, w, b: x.matmul(w), set()),
    "mm": (lambda x, w, b: torch.mm(x, w), set()),
    "mm_by_name": (lambda x, w, b: torch.mm(input=x, mat2=w), set()),
    "mm_method": (lambda x, w, b: x.mm(w), set()),
    "mm_method_by_name": (lambda x, w, b: x.mm(mat2=w), set()),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), {operator.add}),
    "addmm_by_name": (lambda x, w, b: torch.addmm(mat2=w, mat1=x, input=b), {operator.add}),
    "addmm_scaled_by_one": (lambda x, w, b: torch.addmm(b, x, w, beta=1, alpha=1.0), {operator.add}),
    "addmm_method": (lambda x, w, b: b.addmm(x, w), {operator.add}),
    "one_row": (lambda x, w, b: x[0] @ w, {operator.getitem}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gate_matmul_replaces_a_product_with_a_parameter_however_it_is_written(spelling):
    body, beside = SPELLINGS[spelling]
    model = Spelled(body)
    captured = Captured(model, torch.randn(6, 40))
    (name,) = captured.matmuls
    before = str(captured.gm.graph)
    gm = gate_matmul(copy_graph(captured.gm), captured.inputs, blocks={name: (8, 16)})
    assert str(captured.gm.graph) == before
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert {node.target for node in calls} == {ops.matmul.default, *beside}
    (call,) = (node for node in calls if node.target is ops.matmul.default)
    assert call.meta["layer"] == name
    (position,) = gm.meta["gated_weights"]
    assert captured.inputs[position] is model.weight
    gate = registry.get_or_create(model.weight, (8, 16), "weight", transposed=True)
    prune_([gate])
    (expected,) = captured.gm(*captured.inputs)
    torch.testing.assert_close(gm(*captured.inputs, *gate.inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, captured.output)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w, b: (x[:, :36] @ w.t())[:, :36],
        lambda x, w, b: w @ x[:4].t().repeat(1, 9)[:36],
        lambda x, w, b: torch.softmax(x @ x.t(), -1) @ x,
        lambda x, w, b: x @ torch.ones(40, 36),
        lambda x, w, b: x @ (2 * w),
        lambda x, w, b: torch.einsum("bi,io->bo", x, w),
        lambda x, w, b: torch.addmm(w, x.new_ones(40, 6), x[:, :36]),
    ],
)
def test_other_products_are_no_layers(body):
    captured = Captured(Spelled(body), torch.randn(6, 40))
    assert not any(map(is_layer, captured.gm.graph.nodes))


@pytest.mark.filterwarnings("ignore:This overload of addmm is deprecated")
def test_the_deprecated_order_of_addmm_is_left_alone():
    captured = Captured(Spelled(lambda x, w, b: torch.addmm(1, b, w, x.t().repeat(1, 6)[:36])), torch.randn(6, 40))
    assert not any(map(is_layer, captured.gm.graph.nodes))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x, w, b: torch.addmm(b, x, w, beta=0.5), "it scales its terms"),
        (lambda x, w, b: b.addmm(x, w, alpha=2), "it scales its terms"),
        (lambda x, w, b: torch.mm(x, w, out=x.new_empty(6, 36)), "where to put what it computes"),
        (lambda x, w, b: x[:, :36] @ b, "its weight is no matrix"),
    ],
)
def test_what_gate_matmul_would_change_is_an_obstacle(body, reason):
    with torch.no_grad():
        captured = Captured(Spelled(body), torch.randn(6, 40))
    (node,) = (node for node in captured.gm.graph.nodes if is_layer(node))
    assert reason in obstacle(node)


def test_an_addmm_of_another_type_than_its_bias_stays_of_that_type():
    model = Spelled(lambda x, w, b: torch.addmm(b, x, w))
    x = torch.randn(6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        captured = Captured(model, x)
        gm = gate_matmul(copy_graph(captured.gm), captured.inputs, blocks=dict.fromkeys(captured.matmuls, (8, 8)))
        gate = registry.get_or_create(model.weight, (8, 8), "weight", transposed=True)
        (y,) = gm(*captured.inputs, *gate.inputs)
    assert y.dtype == captured.output.dtype == torch.bfloat16
    rows, weight = (t.bfloat16().double() for t in (x, model.weight))
    limit = 2**-7 * (rows.abs() @ weight.abs() + model.bias.abs())  # of three roundings to 2**-8
    assert ((y.double() - rows @ weight - model.bias).abs() <= 1.01 * limit).all()


def test_a_weight_that_is_read_both_ways_has_one_gates_inputs():
    model = Spelled(lambda x, w, b: F.linear(x @ w, w))
    captured = Captured(model, torch.randn(6, 40))
    blocks = dict.fromkeys([*captured.linears, *captured.matmuls], (8, 8))
    gm, _ = run(copy_graph(captured.gm), captured.inputs, passes_for(blocks))
    assert len(placeholders(gm)) == len(placeholders(captured.gm)) + len(GATE_INPUTS)
    assert count(gm, ops.linear.default) == count(gm, ops.matmul.default) == 1
    gate = registry.get_or_create(model.weight, (8, 8), "weight")
    prune_([gate])
    found = gm(*captured.inputs, *gate.inputs)[0]
    torch.testing.assert_close(found, captured.gm(*captured.inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@pytest.mark.parametrize("product", [lambda x, w, b: x @ w, lambda x, w, b: torch.addmm(b, x, w)])
def test_an_activation_stays_behind_a_matmul(product, activation):
    model = Spelled(lambda x, w, b: activation(product(x, w, b)))
    captured = Captured(model, torch.randn(6, 40))
    gm, changes = run(copy_graph(captured.gm), captured.inputs, passes_for(dict.fromkeys(captured.matmuls, (8, 8))))
    assert count(gm, ops.matmul.default) == 1
    assert {change.name for change in changes if change.diff} == {"gate_matmul"}


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (nn.ReLU(), "relu"),
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    ],
)
def test_an_activation_moves_into_the_linear_before_it(activation, name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.activation = nn.Linear(40, 40), activation

        def forward(self, x):
            return self.activation(self.fc(x))

    model = Model()
    captured = Captured(model, torch.randn(6, 40))
    before = captured.gated()
    gm = fuse_activation(before, captured.inputs)
    (call,) = (node for node in gm.graph.nodes if node.target is ops.linear.default)
    assert call.args[-1] == name
    assert {node.target for node in gm.graph.nodes if node.op.startswith("call")} == {
        ops.linear.default,
        operator.getitem,
    }
    (gate,) = cc.gates(model, 8).values()
    torch.testing.assert_close(gm(*captured.inputs, *gate.inputs)[0], captured.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        lambda fc, x: (z := fc(x)) + F.relu(z),
        lambda fc, x: torch.tanh(fc(x)),
        lambda fc, x: F.relu(fc(x) + 1),
        lambda fc, x: F.relu(x) + fc(x),
        lambda fc, x: (F.relu(z := fc(x)), z),
    ],
)
def test_an_activation_stays_where_the_linears_output_is_needed_or_it_is_another(body):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(40, 40)

        def forward(self, x):
            return body(self.fc, x)

    captured = Captured(Model(), torch.randn(6, 40))
    before = captured.gated()
    operators = [node.target for node in before.graph.nodes]
    gm = fuse_activation(before, captured.inputs)
    assert [node.target for node in gm.graph.nodes] == operators
    (call,) = (node for node in gm.graph.nodes if node.target is ops.linear.default)
    assert call.args[-1] == "none"


def test_the_runner_logs_a_numbered_list_of_what_each_pass_changed(caplog):
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    captured = Captured(model, torch.randn(6, 40))
    with caplog.at_level("INFO", logger="ctrlcompile.passes"):
        gm, _ = run(copy_graph(captured.gm), captured.inputs, passes_for(dict.fromkeys(captured.linears, (8, 8))))
    first, second, third, fourth, fifth, sixth = (
        record.getMessage() for record in caplog.records if record.name == "ctrlcompile.passes"
    )
    assert first.startswith("1. gate_linear: ")
    assert "linear -2" in first
    assert second == "2. gate_matmul: no change"
    assert third == "3. gate_conv: no change"
    assert fourth.startswith("4. fuse_activation: ")
    assert "relu -1" in fourth
    assert fifth == "5. skip_heads: no change"
    assert sixth == "6. restore_layout: no change"
    assert count(gm, ops.linear.default) == 2
