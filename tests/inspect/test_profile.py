"""profile: what it counts is right, what it sets against each other is the same product, and it leaves no trace."""

import csv
import json
import os
import random
import sys
from collections.abc import Iterator
from itertools import product as pairs

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import calls, ops
from ctrlcompile.gate import registry
from ctrlcompile.inspect import clock
from ctrlcompile.inspect import profile as profile_function
from ctrlcompile.inspect.products import Products
from ctrlcompile.kernels.index_lists import expand
from ctrlcompile.meter import meter

from ..small_models import MLP, prune_
from ..small_models import Products as SmallProducts

BLOCK = 8


class Model(nn.Module):
    """Two gated linears, an activation that moves into one, random numbers, a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(40, 68), nn.Linear(68, 36)
        self.norm, self.dropout = nn.BatchNorm1d(36), nn.Dropout(0.2)

    def forward(self, x):
        return self.norm(self.fc2(self.dropout(torch.nn.functional.gelu(self.fc1(x)))))


def state(model: nn.Module, gates: dict[str, cc.Gate]) -> list[torch.Tensor]:
    """Everything that a look must leave as it is."""
    gated = [tensor for gate in gates.values() for tensor in (gate.mask, gate.inputs[0].detach(), *gate.inputs[1:])]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [value.clone() for value in (*model.state_dict().values(), *gradients, *gated, torch.get_rng_state())]


class Profiled:
    """A pruned model that has taken a step, its profile, and what was there before and after."""

    def __init__(self) -> None:
        self.model, self.x = Model(), torch.randn(23, 40)
        self.run = torch.compile(self.model, backend="ctrlprune", options={"block": BLOCK})
        self.run(self.x).sum().backward()
        self.gates = cc.gates(self.run)
        prune_(self.gates.values())
        for gate in self.gates.values():
            gate.signals.grad = None
            inactive = (~gate.mask).flatten().nonzero().flatten()
            gate.probe_(inactive[: gate.probes.numel()])
        self.accumulated = 0
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self.count)
        counter = meter.counter(self.gates.values())
        self.before, self.python_random = state(self.model, self.gates), random.getstate()
        self.operators: dict[str, list[str]] = {"gated": [], "dense": []}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["ctrlcompile.inspect.profile"], "alternate", self.alternate)
            self.profile = cc.profile(self.run, rounds=2)(self.x)
        self.counted, self.hooked = counter().dense, self.accumulated
        self.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.after, self.python_random_after = state(self.model, self.gates), random.getstate()

    def alternate(self, timed, rounds, device):
        """Times, and notes which operators of ours run in a gated and in a dense step."""
        times = clock.alternate(timed, rounds, device)
        for name, operators in self.operators.items():
            with calls.observe(lambda operator, _, operators=operators: operators.append(operator)):
                timed[name]()
        return times

    def count(self, _: torch.Tensor) -> None:
        self.accumulated += 1


@pytest.fixture(scope="module")
def profiled() -> Iterator[Profiled]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("CTRLCOMPILE_TEST_SEED", random.SystemRandom().randrange(2**31))))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield Profiled()
    torch.set_num_threads(threads)


def test_every_product_of_every_gated_linear_has_a_row_with_its_own_numbers(profiled):
    rows = {(row.name, row.role): row for row in profiled.profile}
    roles = {"fc1.weight": ["forward", "wgrad"], "fc2.weight": ["forward", "dgrad", "wgrad"]}  # x needs no gradient
    assert list(rows) == [(name, role) for name in roles for role in roles[name]]
    machine = profiled.profile.machine
    for (name, role), row in rows.items():
        gate = profiled.gates[name]
        (n, k), entries = gate.shape, int(expand(gate.mask, gate.block, gate.shape).sum())
        assert (row.m, row.k, row.n, row.block, row.calls) == (23, k, n, gate.block, 1)
        assert row.density == gate.density
        assert "C++" in row.kernel
        if role == "wgrad":
            probed = torch.zeros(gate.grid, dtype=torch.bool)
            probed.view(-1)[gate.probes[gate.probes >= 0].long()] = True
            entries += int(expand(probed, gate.block, gate.shape).sum())
        assert row.dense_flops == 2 * 23 * k * n
        assert row.flops == pytest.approx(2 * 23 * entries)
        assert row.speedup == pytest.approx(row.dense_ms / row.gated_ms)
        assert row.share == pytest.approx(row.gated_ms / profiled.profile.step.gated_ms)
        moved = 23 * (k + n) + entries + (n * k if role == "wgrad" else 0)
        moved += 23 * n if (name, role) == ("fc1.weight", "forward") else 0  # gelu keeps what it was given
        least = max(row.flops / machine.peak_flops["float32"], 4 * moved / machine.copy_bytes)
        assert row.of_limit == pytest.approx(least / (row.gated_ms / 1e3))


def test_the_steps_flops_are_those_that_pytorch_counts_less_what_is_skipped(profiled):
    step, rows = profiled.profile.step, profiled.profile.rows
    with FlopCounterMode(display=False) as counter:
        profiled.model(profiled.x).sum().backward()
    assert step.dense_flops == counter.get_total_flops()
    assert step.flops == pytest.approx(step.dense_flops - sum(row.dense_flops - row.flops for row in rows))
    assert step.speedup == pytest.approx(step.dense_ms / step.gated_ms)


def test_table_json_csv_and_notebook_show_every_row(profiled):
    profile, text = profiled.profile, str(profiled.profile)
    lines = text.splitlines()
    for row, line in zip(profile.rows, lines[1:], strict=False):
        assert line.split()[:2] == [row.name, row.role]
        assert f"{row.density:.3f}" in line
        assert f"{row.speedup:.2f}x" in line
    assert "step" in lines[len(profile.rows) + 1]
    read = json.loads(profile.to_json())
    assert [row["gated_ms"] for row in read["rows"]] == [row.gated_ms for row in profile]
    assert read["step"]["speedup"] == profile.step.speedup
    *rows, step = csv.DictReader(profile.to_csv().splitlines())
    assert [float(row["dense_ms"]) for row in rows] == [row.dense_ms for row in profile]
    assert (step["name"], float(step["gated_ms"])) == ("step", profile.step.gated_ms)
    assert "fc2.weight" in profile._repr_html_()


def test_profiling_leaves_model_gates_gradients_random_state_and_budget_as_they_were(profiled):
    assert len(profiled.after) == len(profiled.before)
    assert all(torch.equal(old, new) for old, new in zip(profiled.before, profiled.after, strict=True))
    assert profiled.python_random_after == profiled.python_random
    assert profiled.counted == 0, "nothing counts towards a budget"
    assert profiled.hooked == 0, "nobody's gradient hooks were called"
    assert all(gate.signals.grad is None for gate in profiled.gates.values())
    assert profiled.graphs == 1, "nothing was compiled anew by Dynamo"


def test_the_gated_step_has_every_gated_product_and_the_dense_step_none(profiled):
    roles = [calls.ROLES[operator] for operator in profiled.operators["gated"]]
    assert sorted(roles) == sorted(row.role for row in profiled.profile)
    assert profiled.operators["dense"] == []


def compared(products: Products, sizes: tuple[int, int, int], dtype: torch.dtype) -> dict[object, torch.Tensor]:
    """Has each product computed both ways, which must agree; what they were given, by its layout."""
    tensors: dict[object, torch.Tensor] = {}

    def tensor(layout):
        return tensors.setdefault(layout, layout.filled())

    for product in products.found.values():
        ours, dense = product.ours(tensor)(), product.dense(tensor)()
        ours = ours if isinstance(ours, torch.Tensor) else ours[0]
        assert (product.sizes, product.dtype) == (sizes, dtype)
        rough = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * float(dense.detach().abs().max())
        torch.testing.assert_close(ours.view(dense.shape).float(), dense.float(), atol=rough, rtol=0)
    return tensors


@pytest.mark.parametrize(("dtype", "bias"), [*pairs((torch.float32, torch.bfloat16), (True, False))])
def test_where_nothing_is_masked_both_sides_compute_the_same(dtype, bias):
    layer = nn.Linear(40, 48, bias=bias)
    gate = cc.gates(layer, block=BLOCK)["weight"]
    lists, block = list(gate.lists), (BLOCK, BLOCK)
    x = torch.randn(5, 40, 4, dtype=dtype).transpose(1, 2)  # rows that lie apart
    grad = torch.randn(48, dtype=dtype).expand(5, 4, 48)  # as the gradient of a sum comes
    with torch.no_grad(), calls.observe((products := Products()).see):
        ops.linear(x, layer.weight, layer.bias, gate.signals, lists, gate.probes, *block, "none")
        ops.linear_dgrad(grad, layer.weight, lists, *block)
        for _ in range(2):
            ops.linear_wgrad(grad, x, layer.weight, lists, gate.probes, *block)
    assert [(p.role, p.calls) for p in products.found.values()] == [("forward", 1), ("dgrad", 1), ("wgrad", 2)]
    tensors = compared(products, (20, 40, 48), dtype)
    layouts = {(layout.shape, layout.strides) for layout in tensors}
    assert layouts == {(x.shape, x.stride()), (grad.shape, grad.stride())}
    for layout, values in tensors.items():
        assert (values.shape, values.stride(), values.dtype) == (layout.shape, layout.strides, dtype)
        assert values.unique().numel() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_a_weight_stored_in_out_are_set_against_the_frameworks(dtype):
    weight = nn.Parameter(torch.randn(40, 48))
    gate = registry.get_or_create(weight, (8, 16), "weight", transposed=True)
    gated = (list(gate.lists), gate.probes, *gate.block)
    x = torch.randn(5, 40, 4, dtype=dtype).transpose(1, 2)
    grad = torch.randn(48, dtype=dtype).expand(5, 4, 48)
    with torch.no_grad(), calls.observe((products := Products()).see):
        ops.matmul(x, weight, gate.signals, *gated)
        ops.matmul_dgrad(grad, weight, gated[0], *gate.block)
        ops.matmul_wgrad(grad, x, weight, *gated)
    assert [product.role for product in products.found.values()] == ["forward", "dgrad", "wgrad"]
    compared(products, (20, 40, 48), dtype)
    for product in products.found.values():
        weights = 40 * 48 * (2 if product.role == "wgrad" else 1)
        assert product.bytes == 20 * (40 + 48) * dtype.itemsize + 4 * weights


def test_each_product_of_a_model_of_weights_stored_in_out_has_a_row(one_thread):
    run = torch.compile(SmallProducts(), backend="ctrlprune", options={"block": BLOCK})
    rows = cc.profile(run, rounds=1)(torch.randn(3, 5, 40)).rows
    assert [(row.name, row.role, row.m, row.k, row.n) for row in rows] == [
        ("fc.weight", "forward", 15, 40, 68),
        ("fc.weight", "wgrad", 15, 40, 68),
        ("projection", "forward", 15, 68, 36),
        ("projection", "dgrad", 15, 68, 36),
        ("projection", "wgrad", 15, 68, 36),
    ]


@pytest.mark.parametrize(
    ("taps", "moves"), [(1, ([1, 1], [0, 0, 0, 0], [1, 1], 1)), (3, ([1, 2], [1, 1, 1, 2], [1, 1], 1))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_convolutions_are_set_against_the_frameworks_on_the_same_images(dtype, taps, moves):
    layer = nn.Conv2d(40, 48, taps)
    gate = cc.gates(layer, block=BLOCK)["weight"]
    x = torch.randn(2, 40, 6, 7, dtype=dtype).to(memory_format=torch.channels_last)
    gated = (list(gate.lists), gate.probes, BLOCK, BLOCK)
    with torch.no_grad(), calls.observe((products := Products()).see):
        y, _ = ops.conv(x, layer.weight, layer.bias, gate.signals, *gated, "none", *moves)
        grad = torch.randn_like(y)
        ops.conv_dgrad(grad, layer.weight, gated[0], BLOCK, BLOCK, [6, 7], *moves)
        ops.conv_wgrad(grad, x, layer.weight, *gated, *moves)
    assert [p.role for p in products.found.values()] == ["forward", "dgrad", "wgrad"]
    tensors: dict[object, torch.Tensor] = {}
    rows = y.numel() // 48
    for product in products.found.values():

        def tensor(layout):
            return tensors.setdefault(layout, layout.filled())

        ours, dense = product.ours(tensor)(), product.dense(tensor)()
        ours = ours if isinstance(ours, torch.Tensor) else ours[0]
        assert (product.sizes, product.dtype) == ((rows, 40 * taps**2, 48), dtype)
        assert product.dense_flops == product.flops == 2 * rows * 40 * taps**2 * 48
        weights = 40 * 48 * taps**2 * (2 if product.role == "wgrad" else 1)
        assert product.bytes == (x.numel() + y.numel()) * dtype.itemsize + 4 * weights
        rough = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * float(dense.abs().max())
        torch.testing.assert_close(ours.float(), dense.float(), atol=rough, rtol=0)
    assert {(layout.shape, layout.strides) for layout in tensors} == {(t.shape, t.stride()) for t in (x, grad)}


def test_one_weight_under_two_windows_is_two_products():
    layer = nn.Conv1d(16, 16, 3)
    gate = cc.gates(layer, block=BLOCK)["weight"]
    x = torch.randn(2, 16, 9)
    gated = (gate.signals, list(gate.lists), gate.probes, BLOCK, BLOCK, "none")
    with torch.no_grad(), calls.observe((products := Products()).see):
        for dilation in (1, 2):
            ops.conv(x, layer.weight, layer.bias, *gated, [1], [0, 0], [dilation], 1)
    assert [product.sizes for product in products.found.values()] == [(14, 48, 16), (10, 48, 16)]


def test_calls_are_timed_in_turn_short_ones_repeated(monkeypatch):
    now, order = [0.0], []

    def call(name, seconds):
        order.append(name)
        now[0] += seconds

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    seconds = {"short": 2**-11, "long": 0.5, "other": 0.25}
    timed = {name: (lambda name=name, s=s: call(name, s)) for name, s in seconds.items()}
    times = clock.alternate(timed, 3, torch.device("cpu"))
    assert times == {name: [s] * 3 for name, s in seconds.items()}
    timed_at_once = {"short": 21, "long": 1, "other": 1}  # 21 * 2**-11 s are more than 10 ms
    each_round = [name for name, times in timed_at_once.items() for _ in range(1 + times)]
    assert order == [*["short"] * 2, *["long"] * 2, *["other"] * 2, *each_round * 3]


def test_what_cannot_be_profiled_is_an_error_that_says_what_to_do(one_thread):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        cc.profile("model")
    with pytest.raises(ValueError, match="positive int; got 0"):
        cc.profile(MLP(), rounds=0)
    with pytest.raises(TypeError, match=r"positive int; got 1\.5"):
        cc.profile(MLP(), rounds=1.5)
    with pytest.raises(RuntimeError, match=r"pass the compiled model, cc\.profile"):
        cc.profile(MLP())(torch.randn(5, 40))
    small = torch.compile(nn.Linear(8, 8), backend="ctrlprune")
    with pytest.raises(RuntimeError, match=r"no layer .* is gated; cc.explain"):
        cc.profile(small)(torch.randn(5, 8))


def test_inputs_that_do_not_fit_are_named_and_profile_works_again_after_it(one_thread):
    model = nn.Linear(40, 40, bias=False)
    run = torch.compile(model, backend="ctrlprune", options={"block": BLOCK})
    with pytest.raises(ValueError, match=r"does not run on inputs \(float32\[5, 41\]\): .*41"):
        cc.profile(run)(torch.randn(5, 41))
    with pytest.raises(ValueError, match=r"inputs \(y=float32\[5, 40\]\): .*'y'"):
        cc.profile(run)(y=torch.randn(5, 40))
    assert [row.role for row in cc.profile(run, rounds=1)(input=torch.randn(5, 40))] == ["forward", "wgrad"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no tensor that has a gradient"):
        cc.profile(run)(torch.randn(5, 40))


def test_the_public_name_is_the_function():
    assert cc.profile is profile_function
