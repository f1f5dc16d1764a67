"""Convolutions in the graph: which nodes are gated and how, what fuses, what keeps its layout, no copies between."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.kernels.window import Window
from ctrlcompile.passes.fuse_activation import fuse_activation
from ctrlcompile.passes.gate_conv import gate_conv
from ctrlcompile.passes.gate_matmul import gate_matmul
from ctrlcompile.passes.gate_nodes import GATE_INPUTS
from ctrlcompile.passes.graph_edit import copy_graph
from ctrlcompile.passes.layer_nodes import is_conv, is_matmul, obstacle, window_of
from ctrlcompile.passes.restore_layout import restore_layout

from ..small_models import prune_


class Captured:
    """Dynamo's graph of a function or a model with its example inputs."""

    def __init__(self, model, *inputs: torch.Tensor) -> None:
        def capture(gm, example_inputs):
            self.gm, self.inputs = gm, list(example_inputs)
            return gm.forward

        self.output = torch.compile(model, backend=capture)(*inputs)
        self.convs = [node for node in self.gm.graph.nodes if is_conv(node)]

    def gated(self):
        blocks = dict.fromkeys((node.name for node in self.convs), (8, 8))
        return gate_conv(copy_graph(self.gm), self.inputs, blocks=blocks)


def targets(gm) -> list:
    return [node.target for node in gm.graph.nodes if node.op.startswith("call")]


class Two(nn.Module):
    """Two convolutions of one weight, one of another, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(16, 16, 2)

    def forward(self, x):
        return self.up(self.b(self.a(torch.tanh(F.conv2d(x, self.a.weight, padding="same")))))


def test_each_convolution_becomes_ours_on_a_channels_last_image_with_inputs_once_per_weight():
    model = Two()
    captured = Captured(model, torch.randn(2, 16, 6, 6))
    before = str(captured.gm.graph)
    gm = captured.gated()
    assert targets(captured.gm).count(torch.conv2d) == 3
    assert torch.conv2d not in targets(gm)
    assert torch.conv_transpose2d in targets(gm)
    assert targets(gm).count(ops.conv.default) == 3
    assert targets(gm).count("contiguous") == 3
    assert str(captured.gm.graph) == before, "Dynamo's own graph is not edited"
    old, new = ([n for n in m.graph.nodes if n.op == "placeholder"] for m in (captured.gm, gm))
    assert len(new) == len(old) + 2 * len(GATE_INPUTS)
    weights = [captured.inputs[position] for position in gm.meta["gated_weights"]]
    assert weights[0] is model.a.weight
    assert weights[1] is model.b.weight


def test_the_gated_graph_computes_what_the_masks_say():
    model = Two()
    captured = Captured(model, torch.randn(2, 16, 6, 6))
    gm = captured.gated()
    gates = cc.gates(model, 8)
    prune_(gates.values())
    (y,) = gm(*captured.inputs, *(tensor for gate in gates.values() for tensor in gate.inputs))
    torch.testing.assert_close(y, captured.gm(*captured.inputs)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, captured.output), "masks changed the output at all"


@pytest.mark.parametrize(
    ("call", "window"),
    [
        (lambda x, w: F.conv2d(x, w), Window((1, 1), ((0, 0), (0, 0)), (1, 1))),
        (lambda x, w: F.conv2d(x, w, None, 2, 1), Window((2, 2), ((1, 1), (1, 1)), (1, 1))),
        (lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=(0, 2)), Window((2, 1), ((0, 0), (2, 2)), (1, 1))),
        (lambda x, w: torch.conv2d(x, w, dilation=2, padding="same"), Window((1, 1), ((2, 2), (1, 1)), (2, 2))),
        (lambda x, w: F.conv2d(x, w, dilation=[1, 3], padding="same"), Window((1, 1), ((1, 1), (1, 2)), (1, 3))),
        (lambda x, w: F.conv2d(x, w, padding="valid"), Window((1, 1), ((0, 0), (0, 0)), (1, 1))),
        (lambda x, w: F.conv2d(x.repeat(1, 2, 1, 1), w, groups=2), Window((1, 1), ((0, 0), (0, 0)), (1, 1), 2)),
    ],
)
def test_a_nodes_window_is_what_the_call_says_however_it_says_it(call, window):
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 2)
    (node,) = Captured(call, x, weight).convs
    assert obstacle(node) is None
    assert window_of(node) == window
    assert window.output_size((9, 9), (3, 2)) == tuple(call(x, weight).shape[2:])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh")])
def test_an_activation_moves_into_the_convolution_before_it(activation):
    model = nn.Sequential(nn.Conv1d(16, 16, 3), activation)
    captured = Captured(model, torch.randn(2, 16, 9))
    gm = fuse_activation(captured.gated(), captured.inputs)
    assert targets(gm) == ["movedim", "contiguous", "movedim", ops.conv.default, operator.getitem]
    (gate,) = cc.gates(model, 8).values()
    torch.testing.assert_close(gm(*captured.inputs, *gate.inputs)[0], captured.output, rtol=1e-4, atol=1e-5)


@torch.library.custom_op("ctrlcompile_tests::flat_sum", mutates_args=())
def flat_sum(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.numel(),), (1,)).cumsum(0)


@flat_sum.register_fake
def _(x):
    return x.new_empty(x.numel())


@pytest.mark.parametrize(
    ("reader", "copies"),
    [
        (lambda y: y.view(2, -1), 1),
        (lambda y: torch.tanh(y).view(2, 4, 32) + 1, 1),
        (lambda y: torch.as_strided(y, (4, 8), (8, 1)), 1),
        (lambda y: flat_sum(y * 2), 1),
        (lambda y: y, 1),
        (lambda y: torch.ops.aten.slice(y, 1, 0, 16), 1),
        (lambda y: (y.relu(), y.flatten(1), y[0]), 3),
        (lambda y: F.linear(y, torch.ones(4, 8)).view(2, -1), 0),
    ],
)
def test_what_depends_on_the_layout_gets_it_as_the_model_had_it(reader, copies):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x):
            return reader(self.conv(x))

    model, x = Model(), torch.randn(2, 16, 8)
    captured = Captured(model, x)
    before = captured.gated()
    had = targets(before).count("contiguous")
    gm = restore_layout(before, captured.inputs)
    assert targets(gm).count("contiguous") == had + copies
    (gate,) = cc.gates(model, 8).values()
    found = gm(*captured.inputs, *gate.inputs)
    expected = captured.output if isinstance(captured.output, tuple) else (captured.output,)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
        assert ours.stride() == plain.stride()


@pytest.mark.parametrize("product", [lambda y, w, b: y @ w, lambda y, w, b: torch.addmm(b, y[0], w)])
def test_a_gated_matmul_hands_on_contiguous_rows_whatever_it_reads(product):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.weight = nn.Conv1d(16, 16, 3, padding=1), nn.Parameter(torch.randn(8, 24))
            self.bias = nn.Parameter(torch.randn(24))

        def forward(self, x):
            return product(self.conv(x), self.weight, self.bias).view(2, -1)

    model, x = Model(), torch.randn(2, 16, 8)
    captured = Captured(model, x)
    blocks = {node.name: (8, 8) for node in captured.gm.graph.nodes if is_matmul(node)}
    gm = gate_matmul(captured.gated(), captured.inputs, blocks=blocks)
    before = targets(gm)
    assert ops.matmul.default in before
    assert targets(restore_layout(gm, captured.inputs)) == before


def test_a_graph_without_gated_convolutions_keeps_its_views_as_they_are():
    captured = Captured(nn.Sequential(nn.Conv1d(16, 16, 3), nn.Flatten()), torch.randn(2, 16, 8))
    gm = restore_layout(copy_graph(captured.gm), captured.inputs)
    assert targets(gm) == targets(captured.gm)


def test_neighbouring_convolutions_hand_channels_last_on_without_a_copy_in_forward_and_backward(one_thread):
    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    model = nn.Sequential(*stage(32, 32, 1), *stage(32, 40, 2), *stage(40, 32, 1))
    cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last)
    _, (forward, backward) = run_and_get_code(lambda: run(x).square().mean().backward())
    assert forward.count("torch.ops.ctrlprune.conv.default(") == 3
    assert backward.count("torch.ops.ctrlprune.conv_wgrad.default(") == 3
    for code in (forward, backward):
        kernels = [line for line in code.splitlines() if "async_compile.cpp_pybinding(" in line]
        assert len(kernels) == 3, "one for each batch norm with what is around it, none for a copy"
        images = [line for line in code.splitlines() if "empty_strided_cpu((4, " in line]
        assert all(", 1, " in line.split("), (")[1] for line in images), "channels lie side by side"
