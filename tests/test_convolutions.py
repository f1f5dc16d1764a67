"""Convolutional models as users meet them: what they compute, what is gated and why the rest is not, budgets."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import backend
from ctrlcompile.meter import meter

from .small_models import assert_like_plain, compiled_and_pruned, masked_entries, prune_

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """A stem of three channels, a residual block with a stride and a projection, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.conv1, self.norm1 = nn.Conv2d(32, 40, 3, 2, padding=1, bias=False), nn.BatchNorm2d(40)
        self.conv2, self.norm2 = nn.Conv2d(40, 40, 3, padding="same"), nn.BatchNorm2d(40)
        self.project = nn.Conv2d(32, 40, 1, 2)
        self.head = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        return self.head(F.relu(y + self.project(x)).mean((2, 3)))


GATED = ["conv1.weight", "conv2.weight", "project.weight", "head.weight"]


def test_a_residual_network_computes_what_the_plain_one_does_in_every_layout_at_every_batch_size():
    model = Residual()
    run, gates = compiled_and_pruned(model)
    assert list(gates) == GATED
    assert_like_plain(run, model, torch.randn(3, 3, 8, 8))
    assert_like_plain(run, model, torch.randn(5, 3, 8, 8))
    compiles = counters["stats"]["unique_graphs"]
    assert_like_plain(run, model, torch.randn(4, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == compiles, "the batch is a symbol"
    assert_like_plain(run, model, torch.randn(3, 3, 8, 8).to(memory_format=torch.channels_last))
    x = torch.randn(6, 3, 8, 8)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_channels_last_model_and_its_twin_keep_their_own_masks_and_layout():
    models = [Residual().to(memory_format=torch.channels_last) for _ in range(2)]
    runs = [compiled_and_pruned(model)[0] for model in models]
    for run, model in zip(runs, models, strict=True):
        strides = [weight.stride() for weight in model.parameters()]
        assert_like_plain(run, model, torch.randn(3, 3, 8, 8))
        run(torch.randn(3, 3, 8, 8, requires_grad=True)).sum().backward()
        assert [weight.stride() for weight in model.parameters()] == strides
        assert [weight.grad.stride() for weight in model.parameters()] == strides
    assert counters["stats"]["unique_graphs"] == 1


def test_autocast_trains_convolutions_in_half_with_the_masters_gradient_zero_where_masked():
    model = Residual()
    run, gates = compiled_and_pruned(model)
    x = torch.randn(8, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = run(x), model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=5e-2, atol=5e-2)
    y.float().square().mean().backward()
    for gate in gates.values():
        assert gate.weight.grad.dtype == torch.float32
        assert not gate.weight.grad[masked_entries(gate)].any()
        assert gate.weight.grad.any()


class Others(nn.Module):
    """1 and 3 dimensions, groups, a circular padding, a window padded on one side, a checkpoint and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(16, 24, 4, padding="same")
        self.grouped = nn.Conv1d(24, 32, 3, padding=1, dilation=1, groups=2)
        self.circular = nn.Conv1d(32, 16, 3, padding=1, padding_mode="circular")
        self.three = nn.Conv3d(16, 16, (2, 1, 2), stride=(1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.one(x))
        x = checkpoint(lambda x: F.relu(self.circular(torch.tanh(self.grouped(x)))), x, use_reentrant=False)
        y = self.three(x.view(x.shape[0], 16, 2, 3, 4))
        return y.view(x.shape[0], -1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_every_kind_of_window_and_what_depends_on_the_layout_computes_as_in_the_plain_model():
    model = Others()
    run, gates = compiled_and_pruned(model)
    assert len(gates) == 4
    x = torch.randn(3, 16, 24)
    assert_like_plain(run, model, x)
    rows = {row.name: row for row in cc.explain(run)(x)}
    assert all(row.gated for row in rows.values()), str(rows)


class Dense(nn.Module):
    """One layer for each reason to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small = nn.Conv2d(3, 40, 1), nn.Conv2d(40, 24, 1)
        self.depthwise, self.groups = nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 64, 3, groups=8)
        self.odd_groups = nn.Conv2d(64, 72, 1, groups=2)
        self.excluded, self.frozen = nn.Conv2d(72, 64, 1), nn.Conv2d(64, 64, 1)
        self.frozen.weight.requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 1))
        self.read = nn.Conv2d(64, 64, 1)
        self.up, self.single = nn.ConvTranspose2d(64, 64, 1), nn.Conv2d(64, 64, 1)
        self.wide, self.imaginary = nn.Conv2d(64, 64, 1).double(), nn.Conv2d(64, 64, 1).to(torch.complex64)
        self.gated = nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.depthwise(self.small(self.first(x))))
        x = self.normed(self.frozen(self.excluded(self.odd_groups(x))))
        x = self.up(self.read(x) * self.read.weight.sum())
        x = torch.cat([self.single(image)[None] for image in x])
        x = self.wide(x.double())
        x = self.imaginary(x.to(torch.complex64)).real
        return self.gated(x)


REASONS = {
    "first.weight": "40 x 3 channels are fewer than a block of 8 x 8",
    "small.weight": "too small to gain: 3 x 5 blocks",
    "depthwise.weight": "depthwise",
    "groups.weight": "64 x 3 channels are fewer than a block",
    "odd_groups.weight": "2 groups of 36 output channels each, which blocks of 8 do not divide",
    "excluded.weight": "excluded by '*excluded*'",
    "frozen.weight": "frozen",
    "normed.weight": "parametrization",
    "read.weight": "read by something else, too",
    "up.weight": "transposed convolutions are not gated",
    "single.weight": "no batch dimension",
    "wide.weight": "torch.float64",
    "imaginary.weight": "torch.complex64",
}


def test_each_convolution_that_stays_dense_says_why():
    model = Dense()
    run = torch.compile(model, backend="ctrlprune", options={"block": 8, "exclude": ["*excluded*"]})
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        found = cc.explain(run)(x)
        torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)
    rows = {row.name: row for row in found}
    assert rows.pop("gated.weight").gated
    assert not any(row.gated for row in rows.values())
    assert rows.keys() == REASONS.keys()
    for name, row in rows.items():
        assert REASONS[name] in row.reason, name
    assert [name for name in cc.gates(run, 8) if name == "read.weight"] == []


def test_a_gate_that_a_convolution_of_the_same_weight_has_no_room_for_leaves_that_one_dense():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 24, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + F.conv2d(torch.cat((x, x), 1), self.conv.weight, groups=2)

    model = Twice()
    run, _ = compiled_and_pruned(model)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    plain, grouped = cc.explain(run)(x)
    assert (plain.gated, grouped.gated) == (True, False)


def test_a_pruned_networks_state_dict_computes_the_same_in_the_plain_network():
    model = Residual()
    model.compile(backend="ctrlprune", options={"block": 8})
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        if step == 1:
            gates = cc.gates(model, include="*.weight")
            prune_(gates.values())
    for gate in gates.values():
        assert not gate.weight[masked_entries(gate)].any()
        assert gate.weight[~masked_entries(gate)].all()
    plain = Residual()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_one_line_lands_a_convolutional_network_on_its_budget():
    model, steps = Residual(), 60
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.6, "total_steps": steps, "block": 8})
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8)
        optimizer.zero_grad()
        (run(x) - x.mean((2, 3)).repeat(1, 6)[:, :16]).square().mean().backward()
        optimizer.step()
    controller = cc.controller_of(optimizer)
    assert controller.steps == steps
    assert controller.flops_used / controller.flops_dense == pytest.approx(0.6, rel=0.01)
    for gate in cc.gates(model).values():
        assert not gate.weight[masked_entries(gate)].any()


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 32, 3, stride=2, groups=2), nn.Conv2d(32, 24, 3, padding=1)
        self.depthwise, self.up = nn.Conv2d(24, 24, 3, groups=24), nn.ConvTranspose2d(24, 24, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.depthwise(self.two(self.one(x))))


def test_a_steps_cost_is_that_of_its_products_at_every_size(monkeypatch):
    monkeypatch.setattr(backend, "_lower", lambda gm, *_, **__: gm.forward)  # how it is lowered changes no cost
    model = Grouped()
    gates = cc.gates(model, 8)
    step_cost = meter.counter(gates.values())
    run = torch.compile(model, backend="ctrlprune")
    for batch, size in ((2, (9, 9)), (3, (13, 11)), (4, (12, 18))):
        x = torch.randn(batch, 16, *size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        forward = counter.get_total_flops()
        prune_(gates.values())
        run(x).sum().backward()
        cost = step_cost()
        positions = batch * ((size[0] - 3) // 2 + 1) * ((size[1] - 3) // 2 + 1)
        first = 2 * positions * 32 * 8 * 9
        assert cost.dense == 3 * forward - first, "no gradient of the input is asked for"
        assert cost.gated == {gates["one.weight"]: 2 * first, gates["two.weight"]: 3 * 2 * positions * 24 * 32 * 9}
        used = sum(flops * gate.active_share for gate, flops in cost.gated.items())
        assert cost.used == pytest.approx(cost.fixed + used)


def test_a_batch_norms_momentum_as_an_input_costs_no_gate(monkeypatch):
    monkeypatch.setattr(backend, "_lower", lambda gm, *_, **__: gm.forward)
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))
    gate = cc.gates(model, 8)["0.weight"]
    counter = meter.counter([gate])
    prune_([gate])
    # With everything dynamic Dynamo hands the momentum in as a tensor, and the graph asks for its value.
    torch.compile(model, backend="ctrlprune", dynamic=True)(torch.randn(2, 32, 6, 6)).sum().backward()
    assert gate in counter().gated
    assert not model[0].weight.grad[masked_entries(gate)].any()


def test_a_dead_channel_does_not_come_back_to_its_batch_norm():
    """It has no variance, so the norm multiplies its gradient by 1 / sqrt(epsilon): to a probe it looks best of all."""
    model = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    run = torch.compile(model, backend="ctrlprune", options={"budget": 0.7, "total_steps": 200, "block": 8})
    target = torch.randn(16, 32, 6, 6)
    for step in range(200):
        optimizer.zero_grad()
        (run(torch.randn(16, 32, 6, 6)) - target).square().mean().backward()
        optimizer.step()
        if step == 60:
            gate = cc.gates(model)["3.weight"]
            mask = gate.mask
            mask[1] = False
            gate.update_(mask)
    assert gate.normalised
    assert cc.controller_of(optimizer).reactivations > 0
    assert gate.mask.any(1).tolist() == [True, False, True, True]
