"""Graphs of the backward pass: where an activation's moves into the input gradient before it, and where not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor
from torch._inductor import custom_graph_pass
from torch.utils.checkpoint import checkpoint

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.passes.fuse_derivative import FuseDerivative

from ..small_models import assert_like_plain, compiled_and_pruned, random_mask


class MLP(nn.Module):
    """Two gated linears, `between` them an activation; `body` says how they are put together."""

    def __init__(self, body):
        super().__init__()
        self.fc1, self.fc2, self._body = nn.Linear(40, 68), nn.Linear(68, 36), body

    def forward(self, x):
        return self._body(self, x)


def plain(model, x):
    return model.fc2(F.gelu(model.fc1(x)))


def tanh(model, x):
    return model.fc2(F.gelu(model.fc1(x), approximate="tanh"))


def checkpointed(model, x):
    return checkpoint(lambda x: plain(model, x), x, use_reentrant=False)


def read_twice(model, x):
    y = F.gelu(model.fc1(x))
    return model.fc2(y) + y[..., :36]


def relu(model, x):
    return model.fc2(F.relu(model.fc1(x)))


def scaled(model, x):
    return model.fc2(F.gelu(model.fc1(x)) * torch.arange(68.0))


@pytest.fixture
def graphs():
    """The nodes of all graphs that Inductor gets, after our pass."""
    found = []

    def keep(graph):
        found.append(list(graph.nodes))

    with inductor.patch(post_grad_custom_post_pass=keep, force_disable_caches=True):
        yield found


def fused(graphs, gradient=ops.linear_dgrad.default) -> list[bool]:
    """For each input gradient of a kind in the graphs, whether it ends with an activation's."""
    calls = [node for nodes in graphs for node in nodes if node.target is gradient]
    return sorted(node.kwargs.get("z") is not None for node in calls)


@pytest.mark.parametrize(
    ("body", "expected"),
    [(plain, True), (tanh, True), (checkpointed, True), (read_twice, False), (relu, False), (scaled, False)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_moves_where_nobody_else_reads_the_gradient(graphs, body, expected):
    model = MLP(body)
    run, gates = compiled_and_pruned(model)
    gates["fc2.weight"].update_(gates["fc2.weight"].mask.index_fill(1, torch.tensor([2]), False))  # a dead column
    assert_like_plain(run, model, torch.randn(3, 7, 40), gates=gates)
    assert fused(graphs) == [False, expected]
    assert not [node for nodes in graphs for node in nodes if node.target is ops.activation_backward.default]


def test_the_bias_before_takes_its_gradient_from_there(graphs):
    model = MLP(plain)
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(3, 7, 40), gates=gates)
    sums = [node for nodes in graphs for node in nodes if node.target is torch.ops.aten.sum.dim_IntList]
    assert [tuple(node.args[0].meta["val"].shape)[-1] for node in sums] == [36]  # of fc2's bias alone


@pytest.mark.parametrize("layer", ["without a bias", "with a frozen bias"])
def test_a_bias_that_wants_no_gradient_gets_none(graphs, layer):
    model = MLP(plain)
    if layer == "without a bias":
        model.fc1 = nn.Linear(40, 68, bias=False)
    else:
        model.fc1.bias.requires_grad_(False)
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(3, 7, 40), gates=gates)
    assert fused(graphs) == [False, True]


def test_channels_that_the_next_layer_takes_for_positions_are_added_up_as_channels(graphs):
    model = nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.GELU(), nn.Linear(40, 24))
    run, gates = compiled_and_pruned(model)
    assert sorted(gates) == ["0.weight", "2.weight"]
    assert_like_plain(run, model, torch.randn(2, 16, 40), gates=gates)
    assert fused(graphs) == [False]


@pytest.mark.parametrize(
    ("taps", "settings"),
    [(3, {"padding": 1}), (3, {"padding": 1, "stride": 2}), (3, {"groups": 2}), (1, {})],
    ids=str,
)
def test_convolutions_end_with_it_too(graphs, taps, settings):
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, taps, **settings))
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(2, 16, 9, 7), gates=gates)
    assert fused(graphs, ops.conv_dgrad.default) == [False, True]


@pytest.mark.parametrize("body", [plain, read_twice])
@pytest.mark.parametrize("lead", [(), (4,)], ids=str)
def test_it_is_right_for_any_batch(graphs, body, lead):
    model = MLP(body)
    run, gates = compiled_and_pruned(model, dynamic=True)
    for batch in (3, 5, 9):
        assert_like_plain(run, model, torch.randn(batch, *lead, 40), gates=gates)
    assert any(fused(graphs)) == (body is plain)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_right_for_a_single_vector(bias):
    model = MLP(plain)
    model.fc1 = nn.Linear(40, 68, bias=bias)
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(40), gates=gates)


def test_it_is_right_under_autocast(graphs):
    model = MLP(plain)
    run, _ = compiled_and_pruned(model)
    x = torch.randn(6, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled, eager = run(x).float().sum(), model(x).float().sum()
    ours, theirs = (torch.autograd.grad(y, (x, model.fc1.bias)) for y in (compiled, eager))
    assert any(fused(graphs))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["one", "list", "aware"])
@pytest.mark.skipif(not hasattr(custom_graph_pass, "get_custom_graph_passes"), reason="Inductor takes one pass only")
def test_what_inductor_was_told_to_run_before_still_runs(graphs, kind):
    seen = []

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            seen.append(is_inference)

        def uuid(self):
            return "aware"

    model = MLP(plain)
    run, gates = compiled_and_pruned(model)
    theirs = Aware() if kind == "aware" else seen.append
    with inductor.patch(post_grad_custom_pre_pass=[theirs] if kind == "list" else theirs):
        assert_like_plain(run, model, torch.randn(3, 40), gates=gates)
    assert len(seen) == 2
    assert fused(graphs) == [False, True]


def test_graphs_can_be_cached():
    assert FuseDerivative().uuid() == FuseDerivative().uuid() is not None


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_operators_keep_the_rules_of_operators(activation):
    model = nn.Linear(40, 24)
    gate = cc.gates(model, 8)["weight"]
    gate.update_(random_mask(gate.grid))
    grad, z = torch.randn(5, 24), torch.randn(5, 40)
    given = (grad, model.weight.detach(), list(gate.inputs[1:-1]), 8, 8, z, activation)
    torch.library.opcheck(ops.linear_dgrad.default, given)
    torch.library.opcheck(ops.activation_backward.default, (z, torch.randn(5, 40), activation, -1))
    images = torch.randn(2, 2, 6, 5, 3).movedim(-1, 2)
    torch.library.opcheck(ops.activation_backward.default, (*images, activation, 1))
    with pytest.raises(
        ValueError, match=r"z is torch.float32 of shape \(5, 40\); got torch.float32 of shape \(4, 40\)"
    ):
        ops.linear_dgrad(*given[:5], z[:4], activation)
    with pytest.raises(ValueError, match="activation is one of"):
        ops.activation_backward(z, z, "relu", 1)
