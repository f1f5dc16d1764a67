"""The outline of a graph: what pictures show, and nothing that only machines need."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ctrlcompile.passes import passes_for, run
from ctrlcompile.passes.graph_edit import copy_graph, scopes
from ctrlcompile.passes.layer_nodes import is_layer
from ctrlcompile.passes.outline import outline

from ..small_models import Products


class Small(nn.Module):
    """A batch norm with buffers, a tuple that is taken apart, an activation checkpoint, a slice."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(40), nn.Linear(40, 80), nn.Linear(40, 40)

    def forward(self, x, scale):
        a, b = self.first(self.norm(x)).chunk(2, 1)
        y = checkpoint(lambda h: torch.relu(self.second(h)), a, use_reentrant=False)
        return (y + b)[1:] * scale


def graph_of(model, *inputs):
    """Dynamo's graph."""
    found = []

    def capture(gm, example_inputs):
        found.append((gm, example_inputs))
        return gm.forward

    torch.compile(model, backend=capture, dynamic=False)(*inputs)
    ((gm, example_inputs),) = found
    return gm, example_inputs


def test_it_shows_the_operators_between_inputs_and_output_with_their_modules_and_shapes():
    gm, example_inputs = graph_of(Small(), torch.randn(8, 40), torch.randn(1))
    layers = [f"{scope.prefix}{node.name}" for scope in scopes(gm) for node in scope.gm.graph.nodes if is_layer(node)]
    _, changes = run(copy_graph(gm), example_inputs, passes_for(dict.fromkeys(layers, (8, 8))))
    before, after = changes[0].outlines[0], changes[-1].outlines[1]
    assert before == outline(gm)
    nodes = {node.name: node for node in before}

    def reads(node):
        return [nodes[name].operator for name in node.sources]

    shown = [(node.operator, node.module, node.shape, reads(node)) for node in before]
    assert shown == [
        ("input", "", "8 x 40", []),
        ("input", "", "1", []),
        ("batch_norm", "norm", "8 x 40", ["input"]),
        ("linear", "first", "8 x 80", ["batch_norm"]),
        ("chunk", "", "", ["linear"]),
        ("linear", "second", "8 x 40", ["chunk"]),
        ("relu", "", "8 x 40", ["linear"]),
        ("add", "", "8 x 40", ["relu", "chunk"]),
        ("getitem", "", "7 x 40", ["add"]),
        ("mul", "", "7 x 40", ["getitem", "input"]),
        ("output", "", "", ["mul"]),
    ]
    gated = [node for node in after if node.operator == "ctrlprune::linear"]
    assert [node.name for node in gated] == layers
    assert [(node.module, node.shape) for node in gated] == [("first", "8 x 80"), ("second", "8 x 40")]
    assert "relu" not in [node.operator for node in after], "it moved into the layer"
    assert len(after) == len(before) - 1


def test_a_gated_matmul_is_shown_with_its_shape_before_what_it_adds():
    gm, example_inputs = graph_of(Products(), torch.randn(8, 40))
    layers = [node.name for node in gm.graph.nodes if is_layer(node)]
    _, changes = run(copy_graph(gm), example_inputs, passes_for(dict.fromkeys(layers, (8, 8))))
    assert [(node.operator, node.module, node.shape) for node in changes[-1].outlines[1]] == [
        ("input", "", "8 x 40"),
        ("view", "fc", "8 x 40"),
        ("ctrlprune::matmul", "fc", "8 x 68"),
        ("add", "fc", "8 x 68"),
        ("view", "fc", "8 x 68"),
        ("relu", "", "8 x 68"),
        ("ctrlprune::matmul", "", "8 x 36"),
        ("output", "", ""),
    ]
    assert [node.name for node in changes[-1].outlines[1] if "ctrlprune" in node.operator] == layers
