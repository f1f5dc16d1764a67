"""Gates: masks of one's own, lists that follow them, clear errors, and which weights get one."""

import random

import pytest
import torch
from torch import nn

import ctrlcompile as cc
from ctrlcompile.blocks import resolve_block
from ctrlcompile.gate import registry
from ctrlcompile.kernels.index_lists import mask_of

from .small_models import MLP, Products, masked_entries, random_mask


def make_gate(shape=(68, 40), block=(8, 16)):
    linear = nn.Linear(shape[1], shape[0])
    (gate,) = cc.gates(linear, block).values()
    return linear, gate


def test_lists_density_and_areas_follow_the_mask_in_place():
    linear, gate = make_gate()
    addresses = [tensor.data_ptr() for tensor in gate.lists]
    for _ in range(3):
        mask = random_mask(gate.grid)
        gate.update_(mask)
        assert torch.equal(gate.mask, mask)
        assert torch.equal(mask_of(gate.lists), mask)
        assert [tensor.data_ptr() for tensor in gate.lists] == addresses
        assert gate.active == int(mask.sum())
        assert gate.density == pytest.approx(float(mask.float().mean()))
        assert gate.active_share == pytest.approx(1 - float(masked_entries(gate).float().mean()))
    assert float(gate.block_area.sum()) == linear.weight.numel()


def test_what_a_frozen_weight_was_gated_with_reports_once_it_is_trained():
    model = MLP(64, 96, 64)
    model.requires_grad_(False)
    gates = cc.gates(model, 8)
    model.requires_grad_(True)
    run = torch.compile(model, backend="ctrlprune")
    run(torch.randn(16, 64)).square().mean().backward()
    for gate in gates.values():
        assert gate.signals.grad is not None
        assert gate.signals.grad.any()


def test_blocks_that_do_not_fit_everywhere_leave_no_gate_behind():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 10))
    with pytest.raises(ValueError, match=r"1\.weight: a block of \(64, 64\) is larger"):
        cc.gates(model, 64)
    assert {gate.block for gate in cc.gates(model, 8).values()} == {(8, 8)}


def test_a_pattern_alone_is_refused_where_a_list_is_asked_for():
    with pytest.raises(TypeError, match=r"exclude is a list of name patterns such as .*; got '\*\.head\.weight'"):
        cc.gates(nn.Linear(64, 64), exclude="*.head.weight")


def test_a_mask_for_a_parameter_that_is_gone_or_has_moved_changes_nothing(monkeypatch):
    linear, gate = make_gate()
    with monkeypatch.context() as patch:
        patch.setattr(gate, "signals", gate.signals.to("meta"))
        with pytest.raises(ValueError, match="was made while its weight was on meta; now it is on cpu"):
            gate.update_(random_mask(gate.grid))
    del linear
    with pytest.raises(RuntimeError, match="no longer exists"):
        gate.update_(random_mask(gate.grid))
    assert gate.density == 1 == float(gate.mask.float().mean())
    assert torch.equal(mask_of(gate.lists), gate.mask)


def test_blocks_that_go_are_zero_at_once_and_others_are_untouched():
    linear, gate = make_gate()
    linear(torch.randn(5, 40)).square().sum().backward()
    before, grad_before = linear.weight.detach().clone(), linear.weight.grad.clone()
    gate.update_(random_mask(gate.grid))
    gone = masked_entries(gate)
    assert not linear.weight[gone].any()
    assert not linear.weight.grad[gone].any()
    assert torch.equal(linear.weight[~gone], before[~gone])
    assert torch.equal(linear.weight.grad[~gone], grad_before[~gone])


@pytest.mark.parametrize("layer", [nn.Linear(40, 68), nn.Conv2d(40, 68, 3), nn.Conv1d(33, 19, 2)])
def test_norms_are_those_of_the_blocks(layer):
    (gate,) = cc.gates(layer, (8, 16)).values()
    gate.update_(random_mask(gate.grid))
    taken = torch.zeros(gate.grid, dtype=torch.float64)
    squares = layer.weight.detach().double().square().reshape(*gate.shape, -1).sum(2)
    for row, entries in enumerate(squares.split(8)):
        for column, block in enumerate(entries.split(16, 1)):
            taken[row, column] = block.sum().sqrt()
    assert gate.norms().dtype == torch.float32
    assert torch.allclose(gate.norms().double(), taken, rtol=1e-5)


def test_a_mask_that_is_read_is_a_copy():
    _, gate = make_gate()
    gate.mask.zero_()
    assert gate.mask.all()


def test_all_blocks_can_be_off():
    linear, gate = make_gate()
    gate.update_(torch.zeros(gate.grid, dtype=torch.bool))
    assert gate.density == gate.active_share == 0
    assert not linear.weight.any()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (lambda grid: torch.ones(grid), TypeError, r"boolean tensor.*got torch\.float32"),
        (lambda grid: [[True]], TypeError, r"boolean tensor.*got list"),
        (lambda grid: torch.ones(grid[1], grid[0], dtype=torch.bool), ValueError, r"shape \(9, 3\).*got \(3, 9\)"),
        (lambda grid: torch.ones(68, 40, dtype=torch.bool), ValueError, r"one entry per block.*got \(68, 40\)"),
    ],
)
def test_a_wrong_mask_is_refused_and_changes_nothing(mask, error, message):
    linear, gate = make_gate()
    weight = linear.weight.detach().clone()
    with pytest.raises(error, match=message):
        gate.update_(mask(gate.grid))
    assert gate.mask.all()
    assert torch.equal(linear.weight, weight)


def test_probes_are_inactive_blocks_and_end_with_the_next_mask():
    _, gate = make_gate((160, 160), 8)
    mask = random_mask(gate.grid)
    gate.update_(mask)
    capacity = gate.probes.numel()
    assert capacity > 1
    inactive = (~mask).flatten().nonzero().flatten()
    chosen = inactive[torch.randperm(inactive.numel())][: random.randint(1, min(capacity, inactive.numel()))]
    gate.probe_(chosen)
    assert gate.probes.tolist() == chosen.tolist() + [-1] * (capacity - chosen.numel())
    assert gate.probed_share == pytest.approx(chosen.numel() * 64 / 160**2)
    gate.update_(torch.ones_like(mask))
    assert gate.probes.tolist() == [-1] * capacity
    assert gate.probed_share == 0


def test_wrong_probes_are_refused_and_leave_the_old_ones():
    _, gate = make_gate((160, 160), 8)
    mask = torch.ones(gate.grid, dtype=torch.bool)
    mask.view(-1)[:20] = False
    gate.update_(mask)
    gate.probe_(torch.tensor([3]))
    for ids, message in (
        (torch.arange(gate.probes.numel() + 1), "probes at most"),
        (torch.tensor([400]), "blocks 0 to 399"),
        (torch.tensor([-1]), "blocks 0 to 399"),
        (torch.tensor([5, 20]), "only inactive blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            gate.probe_(ids)
        assert gate.probes.tolist() == [3] + [-1] * (gate.probes.numel() - 1)
        assert gate.probed_share == pytest.approx(64 / 160**2)


def test_the_repr_says_which_weight_and_how_dense():
    _, gate = make_gate()
    mask = torch.ones(gate.grid, dtype=torch.bool)
    mask[0, 0] = False
    gate.update_(mask)
    assert repr(gate) == ("Gate('weight', shape=(68, 40), block=(8, 16), 26 of 9 x 3 blocks active, density=0.963)")


def test_the_picture_shows_each_block_and_shrinks_large_grids():
    _, gate = make_gate()
    mask = random_mask(gate.grid)
    gate.update_(mask)
    assert gate.picture() == "\n".join("".join("█" if on else " " for on in row) for row in mask.tolist())
    mask[:] = False
    mask[:3] = True
    gate.update_(mask)
    assert gate.picture(width=1, height=3) == "█\n \n "


def test_gates_are_found_again_by_name_on_a_plain_and_on_a_compiled_model():
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), MLP())
    found = cc.gates(model, 8)
    assert list(found) == ["0.weight", "2.fc1.weight", "2.fc2.weight"]
    assert set(found) <= set(dict(model.named_parameters()))
    assert all(gate.name == name and gate.weight is model.get_parameter(name) for name, gate in found.items())
    again = cc.gates(torch.compile(model, backend="ctrlprune"))
    assert {name: id(gate) for name, gate in again.items()} == {name: id(gate) for name, gate in found.items()}


def test_include_and_exclude_choose_by_name():
    model = nn.ModuleDict({"body": MLP(), "head": nn.Linear(40, 40)})
    assert list(cc.gates(model, 8, include="body.*")) == ["body.fc1.weight", "body.fc2.weight"]
    assert list(cc.gates(model, 8, exclude=["head*", "*fc1*"])) == ["body.fc2.weight"]


def test_a_weight_that_two_linears_share_has_one_gate():
    model = nn.ModuleDict({"a": nn.Linear(40, 40), "b": nn.Linear(40, 40)})
    model["b"].weight = model["a"].weight
    assert list(cc.gates(model, 8)) == ["a.weight"]


@pytest.mark.parametrize("outputs", [36, 40], ids=["partial blocks", "whole blocks"])
@pytest.mark.parametrize(
    ("kind", "window", "memory_format"),
    [
        (nn.Conv1d, (5,), torch.contiguous_format),
        (nn.Conv2d, (3, 1), torch.contiguous_format),
        (nn.Conv2d, (3, 3), torch.channels_last),
        (nn.Conv3d, (1, 2, 3), torch.channels_last_3d),
    ],
)
def test_a_block_of_a_convolution_goes_with_all_its_taps_in_weight_gradient_and_state(
    kind, window, memory_format, outputs
):
    conv = kind(40, outputs, window)
    conv.weight.data = conv.weight.data.to(memory_format=memory_format)
    strides = conv.weight.stride()
    (gate,) = cc.gates(conv, 8).values()
    optimizer = torch.optim.AdamW(conv.parameters())
    gate.owned_by(optimizer)
    x = torch.randn(2, 40, *(6 for _ in window))
    for _ in range(2):
        conv(x).square().sum().backward()
        optimizer.step()
    state = optimizer.state[conv.weight]
    tensors = [conv.weight.detach(), conv.weight.grad, state["exp_avg"], state["exp_avg_sq"]]
    before = [tensor.clone() for tensor in tensors]
    gate.update_(random_mask(gate.grid))
    gone = masked_entries(gate)
    for tensor, old in zip(tensors, before, strict=True):
        assert not tensor[gone].any()
        assert torch.equal(tensor[~gone], old[~gone])
        assert old[gone].any()
    assert conv.weight.stride() == strides
    assert gate.shape == (outputs, 40)
    assert gate.active_share == pytest.approx(1 - float(gone.float().mean()))
    assert float(gate.block_area.sum()) == conv.weight.numel()


def test_auto_blocks_of_a_convolution_follow_its_channels():
    sides = {8: 8, 63: 8, 64: 16, 255: 16, 256: 32, 512: 32}
    for rows, columns in ((8, 64), (64, 8), (63, 255), (256, 64), (512, 256)):
        weight = torch.empty(rows, columns, 3, 3)
        assert resolve_block("auto", weight) == (sides[rows], sides[columns])
        assert resolve_block((24, 8), weight) == (24, 8)


def test_every_inner_convolution_of_a_narrow_residual_network_has_a_gate_by_itself():
    widths = ((32, 32), (64, 32), (64, 64), (128, 64), (128, 128))
    model = nn.ModuleDict({f"{o}x{i}": nn.Conv2d(i, o, 3) for o, i in widths})
    assert len(cc.gates(model)) == len(widths)


def test_convolutions_without_room_for_a_block_have_no_gate_and_do_not_stop_the_others():
    model = nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 32, 3),
            "depthwise": nn.Conv2d(32, 32, 3, groups=32),
            "narrow_groups": nn.Conv2d(64, 64, 3, groups=16),
            "odd_groups": nn.Conv2d(64, 24, 3, groups=2),
            "transposed": nn.ConvTranspose2d(32, 32, 3),
            "groups": nn.Conv2d(64, 64, 3, groups=2),
            "plain": nn.Conv2d(32, 32, 3),
        }
    )
    assert list(cc.gates(model, 8)) == ["groups.weight", "plain.weight"]


def test_weights_that_cannot_be_gated_have_none():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(64, 40),
            "head": nn.Linear(40, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)),
            "good": nn.Linear(40, 40),
        }
    )
    model["head"].weight = model["embedding"].weight
    assert list(cc.gates(model, 8)) == ["good.weight"]


def test_parameters_of_other_modules_are_found_once_they_have_a_gate():
    model = nn.Sequential(nn.Linear(40, 40), Products())
    assert list(cc.gates(model, 8)) == ["0.weight"]
    weights = dict(model.named_parameters())
    made = {name: registry.get_or_create(weights[name], (8, 16), "?", True) for name in ("1.projection", "1.fc.weight")}
    assert list(cc.gates(model)) == ["0.weight", "1.projection", "1.fc.weight"]
    assert {name: cc.gates(model)[name] for name in made} == made
    assert [gate.name for gate in made.values()] == list(made)
    assert list(cc.gates(model, include="1.*", exclude=["*fc*"])) == ["1.projection"]
    with pytest.raises(ValueError, match=r"1\.projection is gated in blocks of \(8, 16\) already"):
        cc.gates(model, 8, include="1.*")


def test_auto_leaves_small_weights_dense_and_a_given_block_does_not():
    model = nn.ModuleDict({"small": nn.Linear(64, 64), "large": nn.Linear(128, 128)})
    assert list(cc.gates(model)) == ["large.weight"]
    assert list(cc.gates(model, 32)) == ["small.weight", "large.weight"]


@pytest.mark.parametrize("block", [0, 12, 136, (8,), (8, 8, 8), "small", 8.0, True, (8, True), None])
def test_a_wrong_block_is_refused(block):
    with pytest.raises(ValueError, match="block"):
        cc.gates(MLP(), block)


def test_a_block_larger_than_a_weight_is_refused_by_name():
    with pytest.raises(ValueError, match=r"fc1\.weight: a block of \(8, 64\) is larger than the weight \(68, 40\)"):
        cc.gates(MLP(), (8, 64))


def test_another_block_for_a_gated_weight_is_refused():
    model = MLP()
    cc.gates(model, 8)
    with pytest.raises(ValueError, match=r"fc1\.weight is gated in blocks of \(8, 8\) already, asked for \(16, 16\)"):
        cc.gates(model, 16)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module.*got Tensor"):
        cc.gates(torch.zeros(3))


def test_a_gate_does_not_keep_its_weight_alive():
    model, gate = make_gate()
    del model
    with pytest.raises(RuntimeError, match="no longer exists"):
        _ = gate.weight
