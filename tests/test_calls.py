"""Calls of our operators: readable in torch.profiler and its Chrome trace, handed to whoever observes."""

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

import ctrlcompile as cc
from ctrlcompile import calls, ops
from ctrlcompile.gate import registry

from .small_models import prune_


@pytest.fixture
def layer():
    """A gated linear and a function that takes it through forward and backward, in eager mode."""
    linear = nn.Linear(40, 48)
    gate = cc.gates(linear, block=(8, 16))["weight"]
    prune_([gate])
    gate.name = "blocks.0.fc1.weight"

    def step():
        x = torch.randn(3, 5, 40, requires_grad=True)
        y, _ = ops.linear(
            x, linear.weight, linear.bias, gate.signals, list(gate.lists), gate.probes, *gate.block, "relu"
        )
        y.sum().backward()

    return gate, step


def test_a_profiler_shows_layer_role_shape_and_density_of_every_product(layer, tmp_path):
    gate, step = layer
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    expected = [
        f"blocks.0.fc1.weight {role} 15x40x48 in 8x16 blocks, density {gate.density:.2f}"
        for role in ("forward", "dgrad", "wgrad")
    ]
    events = {event.name: event for event in profiler.events()}
    for name in expected:
        assert name in events
        assert "ctrlprune" in events[name].cpu_parent.name
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    traced = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert traced.issuperset(expected)


def test_a_convolution_is_labelled_with_its_positions_and_the_inputs_of_its_window():
    conv = nn.Conv2d(16, 24, 3)
    gate = cc.gates(conv, block=8)["weight"]
    gated = (gate.signals, list(gate.lists), gate.probes, *gate.block, "none", [1, 1], [0, 0, 0, 0], [1, 1], 1)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        ops.conv(torch.randn(2, 16, 6, 5, requires_grad=True), conv.weight, conv.bias, *gated)[0].sum().backward()
    names = {event.name for event in profiler.events()}
    assert names.issuperset(
        f"weight {role} {2 * 4 * 3}x{16 * 9}x24 in 8x8 blocks, density 1.00" for role in ("forward", "dgrad", "wgrad")
    )


def test_a_matmul_is_labelled_with_inputs_and_outputs_and_the_blocks_of_the_weight_as_stored():
    weight = nn.Parameter(torch.randn(40, 48))
    gate = registry.get_or_create(weight, (8, 16), "c_fc.weight", transposed=True)
    gated = (gate.signals, list(gate.lists), gate.probes, *gate.block)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        ops.matmul(torch.randn(3, 5, 40, requires_grad=True), weight, *gated).sum().backward()
    names = {event.name for event in profiler.events()}
    assert names.issuperset(
        f"c_fc.weight {role} 15x40x48 in 8x16 blocks, density 1.00" for role in ("forward", "dgrad", "wgrad")
    )


def test_lists_that_are_no_gates_are_named_by_shape(layer):
    gate, _ = layer
    weight, grad = torch.randn(48, 40), torch.randn(7, 48)
    lists = [part.clone() for part in gate.lists]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        ops.linear_dgrad(grad, weight, lists, *gate.block)
    assert "dgrad 7x40x48 in 8x16 blocks" in {event.name for event in profiler.events()}


def test_names_are_not_even_made_while_nobody_looks(layer, monkeypatch):
    def made(*_):
        raise AssertionError("a label was made without a profiler")

    monkeypatch.setattr(calls, "label", made)
    layer[1]()


def test_an_observer_gets_every_call_until_it_leaves(layer):
    gate, step = layer
    seen = []
    with calls.observe(lambda operator, values: seen.append((operator, calls.named(operator, values)))):
        step()
    step()
    assert sorted(operator for operator, _ in seen) == ["linear", "linear_dgrad", "linear_wgrad"]
    assert all(calls.gate_of(arguments) is gate for _, arguments in seen)
    assert all(calls.sizes(arguments) == (15, 40, 48) for _, arguments in seen)
