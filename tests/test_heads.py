"""Heads that need no attention weights: when they count as such, that nothing changes but the FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import ops
from ctrlcompile.kernels import attention as kernel
from ctrlcompile.kernels import build, cpp_averages, cpu_averages
from ctrlcompile.kernels.attention import DEAD, LIVE, UNIFORM
from ctrlcompile.meter import meter

from .small_models import Conv1D, assert_like_plain, random_mask

HEADS, SIDE, TIME = 3, 16, 6
WIDTH = HEADS * SIDE
DENSE = 3 * 2 * 2 * 2 * HEADS * TIME * TIME * SIDE  # forward and two gradients, two products, batch, 2 per multiply-add


class Model(nn.Module):
    """A layer of attention, head by head 2 blocks of 8 wide, between two that mix all channels."""

    def __init__(self, recompute=False, **settings):
        super().__init__()
        self.first, self.qkv = nn.Linear(40, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.output, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 24)
        self.settings, self.recompute = settings, recompute

    def body(self, x):
        q, k, v = self.heads(self.qkv(x))
        out = F.scaled_dot_product_attention(q, k, v, **self.settings)
        return self.output(out.transpose(1, 2).flatten(2))

    def heads(self, qkv):
        return qkv.unflatten(-1, (3, HEADS, SIDE)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x))


def kill(gates, head, *, values=True, readers=True):
    """Switches off what feeds a head's values, and what reads its output."""
    blocks = slice(head * SIDE // 8, (head + 1) * SIDE // 8)
    fed, read = gates["qkv.weight"].mask.clone(), gates["output.weight"].mask.clone()
    if values:
        fed[2 * WIDTH // 8 :][blocks] = False
    if readers:
        read[:, blocks] = False
    gates["qkv.weight"].update_(fed)
    gates["output.weight"].update_(read)


def even_out(gates, head, *, queries=True, keys=True):
    """Switches off what feeds a head's queries and keys."""
    fed = gates["qkv.weight"].mask.clone()
    for part in [0] * queries + [1] * keys:
        fed[(part * WIDTH + head * SIDE) // 8 : (part * WIDTH + (head + 1) * SIDE) // 8] = False
    gates["qkv.weight"].update_(fed)


def attention_flops(run, x) -> float:
    """What a step of a compiled model uses beside its gated layers, of which there are no others."""
    explained = cc.explain(run)(x)
    return explained.flops - sum(row.flops for row in explained.rows)


@pytest.fixture
def computed(monkeypatch):
    """How many heads each call of the framework's attention had, forward and backward."""
    seen = {"forward": [], "backward": []}
    for role in seen:
        original = getattr(kernel, f"_{role}")

        def counted(*arguments, role=role, original=original):
            seen[role].append(arguments[0][0].shape[1])
            return original(*arguments)

        monkeypatch.setattr(kernel, f"_{role}", counted)
    return seen


@pytest.mark.parametrize("settings", [{}, {"is_causal": True, "scale": 0.2}, {"recompute": True}], ids=str)
def test_dead_heads_are_skipped_and_nothing_else_changes(settings, computed):
    model = Model(**settings)
    gates = cc.gates(model, 8)
    for gate in gates.values():
        gate.update_(random_mask(gate.grid, 0.9))
    run = torch.compile(model, backend="ctrlprune")
    x = torch.randn(2, TIME, 40)
    assert_like_plain(run, model, x, gates=gates)
    assert sum(computed["backward"]) == HEADS
    kill(gates, 1)
    for found in computed.values():
        found.clear()
    assert_like_plain(run, model, x, gates=gates)
    assert sum(computed["backward"]) == HEADS - 1
    assert sum(computed["forward"]) == (HEADS - 1) * (2 if model.recompute else 1)
    kill(gates, 0)
    kill(gates, 2)
    for found in computed.values():
        found.clear()
    assert_like_plain(run, model, x, gates=gates)
    assert computed == {"forward": [], "backward": []}
    gates["output.weight"].update_(torch.ones(gates["output.weight"].grid, dtype=torch.bool))  # they are read again
    assert_like_plain(run, model, x, gates=gates)
    assert sum(computed["backward"]) == HEADS


@pytest.mark.parametrize("settings", [{}, {"is_causal": True, "scale": 0.2}, {"recompute": True}], ids=str)
def test_heads_without_queries_and_keys_average_and_nothing_else_changes(settings, computed):
    model = Model(**settings)
    gates = cc.gates(model, 8)
    for gate in gates.values():
        gate.update_(random_mask(gate.grid, 0.9))
    run, x = torch.compile(model, backend="ctrlprune"), torch.randn(2, TIME, 40)
    even_out(gates, 0)
    assert_like_plain(run, model, x, gates=gates)
    assert sum(computed["backward"]) == HEADS - 1
    assert sum(computed["forward"]) == (HEADS - 1) * (2 if model.recompute else 1)
    kill(gates, 1)
    even_out(gates, 1)
    for found in computed.values():
        found.clear()
    assert_like_plain(run, model, x, gates=gates)
    assert sum(computed["backward"]) == HEADS - 2
    even_out(gates, 2)
    for found in computed.values():
        found.clear()
    assert_like_plain(run, model, x, gates=gates)
    assert computed == {"forward": [], "backward": []}
    gates["qkv.weight"].update_(torch.ones(gates["qkv.weight"].grid, dtype=torch.bool))
    assert_like_plain(run, model, x, gates=gates)
    assert sum(computed["backward"]) == HEADS


@pytest.mark.parametrize(
    ("rest", "half"),
    [(kill, "values"), (kill, "readers"), (even_out, "queries"), (even_out, "keys")],
    ids=["unread", "unfed", "with queries", "with keys"],
)
def test_a_head_with_half_a_reason_to_rest_has_weights(rest, half, computed):
    model = Model()
    gates = cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    rest(gates, 1, **{half: False})
    assert_like_plain(run, model, torch.randn(2, TIME, 40), gates=gates)
    assert computed["forward"] == [HEADS]


@pytest.mark.parametrize(("rows", "live"), [((), 0), ((1,), 0), ((2 * TIME,), 1)], ids=["one bias", "a row", "by row"])
def test_queries_of_an_addmm_are_the_same_if_what_it_adds_is(rows, live):
    model = Model()
    model.qkv = Conv1D(WIDTH, 3 * WIDTH)
    model.qkv.bias = nn.Parameter(torch.randn(*rows, 3 * WIDTH))
    run, x = torch.compile(model, backend="ctrlprune", options={"block": 8}), torch.randn(2, TIME, 40)
    run(x)
    gates = cc.gates(model)
    gates["qkv.weight"].update_(gates["qkv.weight"].mask.index_fill(1, torch.arange(2 * WIDTH // 8), False))
    assert_like_plain(run, model, x, gates=gates)
    assert attention_flops(run, x.requires_grad_()) == pytest.approx(live * DENSE)


class Positions(Model):
    """Something makes queries or keys differ from position to position, however few blocks there are."""

    def __init__(self, how):
        super().__init__()
        self.how, self.places = how, nn.Parameter(torch.randn(TIME, SIDE))

    def heads(self, qkv):
        q, k, v = super().heads(qkv)
        return self.how(q, k, v, self.places)


def rotate(q, k, v, places):
    return q * places.cos(), k * places.cos() + torch.cat((-k[..., SIDE // 2 :], k[..., : SIDE // 2]), -1) * places, v


def write(q, k, v, places):
    k = k.clone()
    k.select(2, 0).zero_()
    return q, k, v


def set_item(q, k, v, places):
    k = k.contiguous()
    k[:, :, 1:3] = 2
    return q, k, v


def clamp(q, k, v, places):
    k = k.clone()
    F.hardtanh(k[:, :, 1:3], 0.25, 0.5, True)  # in place, as nothing but the position of an argument says
    return q, k, v


def misread(q, k, v, places):
    """As [N, heads, length, features] what is [N, length, heads, features] in memory."""
    return (x.transpose(1, 2).reshape(x.shape) for x in (q, k, v))


POSITIONS = {
    "added": lambda q, k, v, places: (q + places, k + places, v),
    "rotated": rotate,
    "padded": lambda q, k, v, places: (q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))),
    "summed up": lambda q, k, v, places: (q, k.cumsum(2), v),
    "learned": lambda q, k, v, places: (places.expand(q.shape), places.expand(k.shape), v),
    "written": write,
    "set": set_item,
    "clamped in place": clamp,
    "misread": misread,
    "mixed": lambda q, k, v, places: (
        x.flatten(1).unflatten(1, (TIME, HEADS, SIDE)).transpose(1, 2) for x in (q, k, v)
    ),
}


@pytest.mark.parametrize("how", POSITIONS.values(), ids=POSITIONS)
def test_a_head_whose_positions_differ_has_weights(how, computed):
    model = Positions(how)
    gates = cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    for head in range(HEADS):
        even_out(gates, head)
    assert_like_plain(run, model, torch.randn(2, TIME, 40), gates=gates)
    assert sum(computed["forward"]) == HEADS


class Viewed(Model):
    """What comes out of attention is as contiguous as what goes in."""

    def body(self, x):
        q, k, v = (operand.contiguous() for operand in self.heads(self.qkv(x)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.output(out.view(-1, HEADS, TIME * SIDE).unflatten(2, (TIME, SIDE)).transpose(1, 2).flatten(2))


def test_what_comes_out_can_be_viewed_as_before(computed):
    model = Viewed()
    gates = cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    kill(gates, 1)
    assert_like_plain(run, model, torch.randn(2, TIME, 40), gates=gates)
    assert sum(computed["forward"]) == HEADS - 1


class Other(nn.Module):
    """Attention that cannot skip heads, or whose heads are never dead."""

    def __init__(self, how):
        super().__init__()
        self.qkv, self.output, self.how = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), how

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIDE)).permute(2, 0, 3, 1, 4)
        out = self.how(q, k, v, x.new_zeros(x.shape[1], x.shape[1]))
        return self.output(out.transpose(1, 2).flatten(2)) + out.mean()


OTHERS = {
    "a mask": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "one head for all": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "one query for all": lambda q, k, v, mask: F.scaled_dot_product_attention(q[:1], k, v),
    "read by others": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS)
def test_other_attention_stays_as_it_is(how, computed):
    model = Other(how)
    gates = cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    kill(gates, 1)
    assert_like_plain(run, model, torch.randn(2, TIME, WIDTH), gates=gates)
    assert HEADS - 1 not in computed["forward"]


def test_without_a_kernel_that_averages_attention_stays_as_it_is_after_one_warning(computed, monkeypatch):
    def fail(*_):
        raise build.KernelBuildError("the compiler", "was not found", "Install one.")

    monkeypatch.setattr(cpp_averages, "source", fail)
    model = Model()
    gates = cc.gates(model, 8)
    run, x = torch.compile(model, backend="ctrlprune"), torch.randn(2, TIME, 40, requires_grad=True)
    kill(gates, 1)
    cpu_averages.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="computes attention's weights.*was not found") as warned:
            assert_like_plain(run, model, x, gates=gates)
        assert sum("attention" in str(warning.message) for warning in warned) == 1
    finally:
        cpu_averages.library.cache_clear()
    assert computed == {"forward": [], "backward": []}  # of ours
    assert attention_flops(run, x) == pytest.approx(DENSE)


def test_instances_and_sizes_have_their_own_heads(computed):
    models = [Model(), Model()]
    runs = [torch.compile(model, backend="ctrlprune", dynamic=True) for model in models]
    gates = [cc.gates(model, 8) for model in models]
    kill(gates[0], 1)
    for batch in (2, 3):
        for run, model, own, heads in zip(runs, models, gates, (HEADS - 1, HEADS), strict=True):
            computed["backward"].clear()
            assert_like_plain(run, model, torch.randn(batch, TIME + batch, 40), gates=own)
            assert sum(computed["backward"]) == heads


def test_it_runs_under_autocast_and_without_gradients(computed):
    model = Model()
    gates = cc.gates(model, 8)
    kill(gates, 1)
    run, x = torch.compile(model, backend="ctrlprune"), torch.randn(2, TIME, 40)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(computed["forward"]) == HEADS - 1
    computed["forward"].clear()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(x), model(x), rtol=5e-2, atol=2e-2)
    assert sum(computed["forward"]) == HEADS - 1


def test_what_is_skipped_is_neither_used_nor_fixed():
    model = Model()
    gates = cc.gates(model, 8)
    run, x = torch.compile(model, backend="ctrlprune"), torch.randn(2, TIME, 40, requires_grad=True)
    run(x).sum().backward()
    counter = meter.counter(gates.values())
    costs = []
    for rest in (kill, even_out):
        run(x).sum().backward()
        costs.append(counter())
        rest(gates, 1 if rest is kill else 2)
    run(x).sum().backward()
    before, after, last = *costs, counter()
    assert before.dense == after.dense
    assert before.fixed - after.fixed == pytest.approx(DENSE / HEADS)
    assert after.fixed - last.fixed == pytest.approx(DENSE / HEADS)
    assert last.used == pytest.approx(last.fixed + sum(n * gate.active_share for gate, n in last.gated.items()))
    assert before.used == before.dense
    assert attention_flops(run, x) == pytest.approx(DENSE * (HEADS - 2) / HEADS)


def test_flop_formulas_count_live_heads():
    operands = [torch.randn(2, HEADS, TIME, SIDE, requires_grad=True) for _ in range(3)]
    with FlopCounterMode(display=False) as counted:
        ops.attention(*operands, torch.tensor([LIVE, DEAD, UNIFORM], dtype=torch.uint8), True, None)[0].sum().backward()
    flops = 2 * 2 * 2 * TIME * TIME * SIDE
    assert counted.get_flop_counts()["Global"] == {ops.attention: flops, ops.attention_backward: 2 * flops}
