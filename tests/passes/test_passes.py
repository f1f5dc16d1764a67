"""Graphs before and after each pass: which operators go, which come, and that the original stays as it was."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.passes import passes_for, run
from ctrlcompile.passes.fuse_activation import fuse_activation
from ctrlcompile.passes.gate_linear import gate_linear
from ctrlcompile.passes.gate_nodes import GATE_INPUTS
from ctrlcompile.passes.graph_edit import copy_graph
from ctrlcompile.passes.layer_nodes import is_linear

from ..small_models import prune_


class Captured:
    """Dynamo's graph of a model with its example inputs; run as it is."""

    def __init__(self, model: nn.Module, *inputs: torch.Tensor) -> None:
        def capture(gm, example_inputs):
            self.gm, self.inputs = gm, list(example_inputs)
            return gm.forward

        self.output = torch.compile(model, backend=capture)(*inputs)
        self.linears = [node.name for node in self.gm.graph.nodes if is_linear(node)]

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
    first, second, third, fourth = (
        record.getMessage() for record in caplog.records if record.name == "ctrlcompile.passes"
    )
    assert first.startswith("1. gate_linear: ")
    assert "linear -2" in first
    assert second == "2. gate_conv: no change"
    assert third.startswith("3. fuse_activation: ")
    assert "relu -1" in third
    assert fourth == "4. restore_layout: no change"
    assert count(gm, ops.linear.default) == 2
