"""Every variant computes the same product, whatever the mask: what is in force changes the time alone."""

import random

import pytest
import torch

import ctrlcompile as cc
from ctrlcompile import kernel_choice, variants
from ctrlcompile.kernels import index_lists
from ctrlcompile.kernels.reference import Before, backward
from ctrlcompile.kernels.window import Window
from ctrlcompile.variants import BLOCK_SPARSE, COMPACT, DENSE, Variant

from .kernels.conv_problems import ConvProblem
from .kernels.problems import AUTOCAST, FLOAT, HALF, Problem

pytestmark = pytest.mark.usefixtures("one_thread")

COARSE = [Variant("coarse", merged) for merged in ((1, 2), (2, 1), (2, 2), (4, 4))]


class Served:
    """The verbs of a family, as a call of a gate's layer gets them with one variant in force."""

    def __init__(self, gate: cc.Gate, variant: Variant) -> None:
        self.gate, table = gate, variants.open_table(gate)
        for role, node in table.nodes.items():
            node.variant = variant if role != "wgrad" or variant == DENSE else BLOCK_SPARSE
        self.table = table

    def forward(self, x, weight, bias, lists, block, activation, *window):
        self._ready("forward", x, weight, activation)
        return kernel_choice.forward(x, weight, bias, self.gate.lists, block, activation, *window)

    def dgrad(self, grad, weight, lists, block, *rest):
        before = rest[-1] if rest and isinstance(rest[-1], Before) else None
        window = rest if before is None else rest[:-1]
        self._ready("dgrad", grad, weight, "none" if before is None else backward(before.activation))
        return kernel_choice.dgrad(grad, weight, self.gate.lists, block, *window, before=before)

    def wgrad(self, grad, x, weight, lists, *rest):
        return kernel_choice.wgrad(grad, x, weight, self.gate.lists, *rest)

    def _ready(self, role, moving, weight, activation):
        node = self.table.nodes[role]
        node.ready.add((node.variant, variants.Types(moving.dtype, weight.dtype, activation)))


def gated(problem):
    """The problem's weight as a Parameter with its gate."""
    problem.weight = torch.nn.Parameter(problem.weight)
    gate = variants_gate(problem.weight, problem.block)
    gate.update_(problem.mask)
    problem.weight = problem.weight.detach()
    return gate


def variants_gate(weight, block):
    gate = cc.gate.registry.get_or_create(weight, block, "weight")
    alive.append(weight)
    return gate


alive: list[torch.Tensor] = []  # gates know their weights weakly


@pytest.fixture(autouse=True)
def forget():
    yield
    alive.clear()


def masks(problem):
    """The problem's own, and such with empty and full rows and columns."""
    rows, columns = problem.mask.shape
    yield problem.mask
    yield torch.zeros(rows, columns, dtype=torch.bool)
    yield torch.ones(rows, columns, dtype=torch.bool)
    dead = torch.rand(rows, columns) < 0.7
    dead[random.randrange(rows)], dead[:, random.randrange(columns)] = False, False
    yield dead


def fresh(problem, mask):
    problem.mask, off = mask, (~mask).flatten().nonzero().flatten()
    problem.probes = torch.cat((off[torch.randperm(off.numel())[:3]].int(), torch.tensor([-1], dtype=torch.int32)))


@pytest.mark.parametrize(
    ("variant", "dtypes", "activation"),
    [(way, dtypes, name) for way in (DENSE, COMPACT) for dtypes in (FLOAT, HALF, AUTOCAST) for name in ("relu", "gelu")]
    + [(variant, FLOAT, "none") for variant in COARSE]
    + [(COARSE[2], FLOAT, "gelu_tanh"), (COARSE[2], HALF, "none"), (COARSE[2], AUTOCAST, "relu")],
)
def test_a_linear_is_the_same_by_every_variant_under_every_mask(variant, dtypes, activation):
    m, k, n = random.randint(1, 70), random.randint(70, 130), random.randint(70, 130)
    problem = Problem.random(m, k, n, (8, 16), random.uniform(0.2, 0.8), dtypes)
    for mask in masks(problem):
        weight, problem.weight = problem.weight, problem.weight.clone()
        fresh(problem, mask)
        problem.kernels = Served(gated(problem), variant)
        problem.check_forward(activation)
        problem.check_dgrad()
        problem.check_wgrad(rounded=variant == DENSE)
        nodes = problem.kernels.table.nodes
        used = {role: {call.variant for call in node.calls} for role, node in nodes.items()}
        rows = {variant if mask.any() or variant != COMPACT else BLOCK_SPARSE}
        assert used == {"forward": rows, "dgrad": rows, "wgrad": {DENSE if variant == DENSE else BLOCK_SPARSE}}
        problem.weight = weight


@pytest.mark.parametrize(("variant", "groups"), [(DENSE, 1), (DENSE, 2), (COARSE[2], 1), (COARSE[2], 2), (COMPACT, 1)])
def test_a_convolution_is_the_same_by_every_variant_under_every_mask(variant, groups):
    window = Window((2, 1), ((1, 2), (0, 1)), (1, 2), groups)
    images = (random.randint(1, 3), 40 * groups, random.randint(5, 9), random.randint(7, 9))
    problem = ConvProblem.random(images, 48 * groups, (3, 2), window, (8, 8), 0.6, FLOAT)
    for mask in masks(problem):
        weight, problem.weight = problem.weight, problem.weight.clone()
        fresh(problem, mask)
        gate = gated(problem)
        dead = not mask.any(1).all() or not mask.any(0).all()
        offered = variants.candidates(gate, "forward", groups)
        assert (variant in offered) == (variant != COMPACT or (bool(mask.any()) and dead))
        problem.kernels = Served(gate, variant)
        problem.check("none" if variant in COARSE else "gelu")
        problem.weight = weight


def test_a_convolution_of_one_tap_is_a_linear_in_every_variant():
    window = Window((1, 1), ((0, 0), (0, 0)), (1, 1))
    problem = ConvProblem.random((2, 40, 5, 4), 72, (1, 1), window, (8, 8), 0.5, FLOAT)
    gate = gated(problem)
    for variant in variants.candidates(gate, "forward", 1):
        problem.kernels = Served(gate, variant)
        problem.check()


def test_merged_blocks_divide_neither_a_group_nor_a_small_weight():
    conv = torch.nn.Conv2d(64, 48, 3, groups=2)
    gate = cc.gates(conv, (8, 8))["weight"]
    # 24 rows in a group
    assert variants.candidates(gate, "forward", 2) == [BLOCK_SPARSE, DENSE, Variant("coarse", (1, 2))]
    assert variants.candidates(gate, "wgrad", 2) == [BLOCK_SPARSE, DENSE]
    volume = torch.nn.Conv3d(64, 48, 3)
    assert variants.candidates(cc.gates(volume, (8, 8))["weight"], "wgrad", 1) == [BLOCK_SPARSE]
    gate = cc.gates(torch.nn.Linear(64, 64), 32)["weight"]
    assert {variant.block(gate.block) for variant in variants.candidates(gate, "forward", 1)} >= {(64, 64), (32, 64)}
    gate = cc.gates(torch.nn.Linear(512, 512), 64)["weight"]
    assert variants.candidates(gate, "forward", 1) == [BLOCK_SPARSE, DENSE]


def test_a_variants_share_is_what_it_multiplies():
    linear = torch.nn.Linear(100, 72)
    gate = cc.gates(linear, 16)["weight"]
    table, coarse = variants.open_table(gate), Variant("coarse", (2, 2))
    for _ in range(3):
        mask = torch.rand(gate.grid) < 0.3
        gate.update_(mask)
        entries = index_lists.expand(index_lists.mask_of(table.lists(coarse, gate)), (32, 32), gate.shape)
        assert entries[index_lists.expand(mask, gate.block, gate.shape)].all()
        assert table.share(coarse, gate) == pytest.approx(float(entries.float().mean()))
        assert table.share(BLOCK_SPARSE, gate) == pytest.approx(gate.active_share)
        assert table.share(DENSE, gate) == 1
        rows, columns = mask.any(1, keepdim=True), mask.any(0, keepdim=True)
        live = index_lists.expand(rows & columns, gate.block, gate.shape)
        assert table.share(COMPACT, gate) == pytest.approx(float(live.float().mean()))


def test_live_rows_and_columns_are_multiplied_alone_where_blocks_are_small_and_some_are_dead():
    for side, groups, offered in ((8, 1, True), (16, 1, False), (8, 2, False)):
        linear = torch.nn.Linear(64, 96)
        gate = cc.gates(linear, side)["weight"]
        assert COMPACT not in variants.candidates(gate, "forward", groups)
        mask = torch.ones(gate.grid, dtype=torch.bool)
        mask[1] = False
        gate.update_(mask)
        assert (COMPACT in variants.candidates(gate, "forward", groups)) == offered
        gate.update_(~torch.ones_like(mask))
        assert COMPACT not in variants.candidates(gate, "forward", groups)


def test_calls_are_timed_but_not_while_somebody_looks():
    linear = torch.nn.Linear(64, 96)
    gate = cc.gates(linear, 8)["weight"]
    node = variants.open_table(gate).nodes["forward"]
    x = torch.randn(5, 64)
    with variants.unrecorded():
        kernel_choice.forward(x, linear.weight.detach(), None, gate.lists, gate.block, "none")
    assert not node.calls
    kernel_choice.forward(x, linear.weight.detach(), None, gate.lists, gate.block, "none")
    (call,) = node.calls
    assert (call.rows, call.inputs, call.outputs, call.share) == (5, 64, 96, 1)
    assert call.seconds > 0


def test_all_calls_are_counted_and_no_more_timed_than_are_wanted():
    linear = torch.nn.Linear(64, 96)
    gate = cc.gates(linear, 8)["weight"]
    node, x = variants.open_table(gate).nodes["forward"], torch.randn(5, 64)
    for calls in (variants.KEPT_CALLS + 3, 2):
        before, node.calls = node.count, type(node.calls)()
        for _ in range(calls):
            y, _ = kernel_choice.forward(x, linear.weight.detach(), None, gate.lists, gate.block, "none")
            torch.testing.assert_close(y, x @ linear.weight.detach().t())
        assert node.count == before + calls
        assert len(node.calls) == min(calls, variants.KEPT_CALLS)


def test_a_coarse_variant_serves_only_types_that_it_is_built_for():
    linear = torch.nn.Linear(64, 96)
    gate = cc.gates(linear, 8)["weight"]
    node = variants.open_table(gate).nodes["forward"]
    node.variant = Variant("coarse", (2, 2))
    node.ready.add((node.variant, variants.Types(torch.float32, torch.float32, "relu")))
    for activation in ("none", "relu"):
        kernel_choice.forward(torch.randn(5, 64), linear.weight.detach(), None, gate.lists, gate.block, activation)
    assert [call.variant for call in node.calls] == [BLOCK_SPARSE, node.variant]
