"""Which weights are gated, and what becomes of those that are shared, frozen, excluded, copied or loaded."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctrlcompile as cc
from ctrlcompile.controller.coupling import Sets

from .small_models import MLP, Products, assert_like_plain, compiled_and_pruned, masked_entries, prune_

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"block": 8}


def test_another_block_than_a_weight_is_gated_in_is_refused_by_name():
    model = MLP()
    cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune", options={"block": 16})
    with pytest.raises(Exception, match=r"fc1\.weight is gated in blocks of \(8, 8\) already, asked for \(16, 16\)"):
        run(torch.randn(2, 40))


def test_frozen_weights_stay_dense_by_themselves_and_gated_when_asked():
    model = MLP()
    model.fc1.weight.requires_grad_(False)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(6, 40)
    rows = {row.name: row for row in cc.explain(run)(x).rows}
    assert not rows["fc1.weight"].gated
    assert "frozen" in rows["fc1.weight"].reason
    assert rows["fc2.weight"].gated

    asked = MLP()
    asked.fc1.weight.requires_grad_(False)
    run, _ = compiled_and_pruned(asked)
    assert_like_plain(run, asked, x)
    assert asked.fc1.weight.grad is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(48, 40), nn.Linear(40, 40), nn.Linear(40, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.fc(self.embed(tokens)))


@pytest.mark.parametrize("gated_first", [False, True])
def test_a_head_tied_to_an_embedding_stays_dense_with_a_reason(gated_first):
    model = Tied()
    if gated_first:
        cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    tokens = torch.randint(0, 48, (5, 7))
    rows = {row.name: row for row in cc.explain(run)(tokens).rows}
    assert {name: row.gated for name, row in rows.items()} == {"fc.weight": True, "embed.weight": False}
    assert "embedding" in rows["embed.weight"].reason or "neither a linear" in rows["embed.weight"].reason
    gates = cc.gates(model)
    assert list(gates) == ["fc.weight"]
    prune_(gates.values())
    assert_like_plain(run, model, tokens)


def test_a_parametrized_weight_stays_dense_with_a_reason():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)), nn.Linear(40, 40))
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    x = torch.randn(6, 40)
    rows = cc.explain(run)(x).rows
    assert [row.gated for row in rows] == [False, True]
    assert "parametrization" in rows[0].reason
    assert_like_plain(run, model, x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40)

    def forward(self, x):
        return self.fc(F.gelu(self.fc(x)))


def test_a_linear_called_twice_has_one_mask_and_the_sum_of_the_gradients():
    model = Twice()
    run, gates = compiled_and_pruned(model)
    assert_like_plain(run, model, torch.randn(6, 40))
    assert len(gates) == 1


def pruned_after_a_call(model, *inputs):
    """The compiled model and the gates that its first call made, with random masks."""
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    run(*inputs)
    gates = cc.gates(model)
    prune_(gates.values())
    return run, gates


def test_products_with_parameters_are_gated_from_the_first_call_on_and_like_the_plain_model():
    model, x = Products(), torch.randn(3, 5, 40)
    assert cc.gates(model) == {}
    run, gates = pruned_after_a_call(model, x)
    assert {name: (gate.shape, gate.transposed) for name, gate in gates.items()} == {
        "projection": ((68, 36), True),
        "fc.weight": ((40, 68), True),
    }
    assert_like_plain(run, model, x)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()
    for name, gate in gates.items():
        gone = masked_entries(gate)
        assert not gate.weight[gone].any(), name
        assert not optimizer.state[gate.weight]["exp_avg"][gone].any(), name
        assert gate.weight[~gone].all(), name
    assert_like_plain(run, model, x)


def test_products_with_parameters_stay_gated_in_evaluation_checkpoints_and_batches_of_any_size():
    class Checkpointed(Products):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed()
    run, gates = pruned_after_a_call(model, torch.randn(3, 5, 40))
    for rows in (4, 7):
        assert_like_plain(run, model, torch.randn(rows, 5, 40))
    with torch.no_grad():
        torch.testing.assert_close(run(x := torch.randn(6, 2, 40)), model(x), rtol=1e-4, atol=1e-5)
    assert [row.gated for row in cc.explain(run)(torch.randn(7, 5, 40)).rows] == [True, True]
    assert len(gates) == 2


def test_under_autocast_a_product_with_a_parameter_is_as_the_plain_models():
    model, x = Products(), torch.randn(3, 5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        run, gates = pruned_after_a_call(model, x)
        y, plain = run(x), model(x)
        y.float().square().sum().backward()
    assert y.dtype == plain.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    for gate in gates.values():
        assert not gate.weight.grad[masked_entries(gate)].any()
    exact = torch.relu(x.double() @ model.fc.weight.double() + model.fc.bias) @ model.projection.double()
    distance = (y - exact).detach().norm() / exact.detach().norm()
    assert distance < 0.02, "inputs, weights and what is between are rounded, by at most 2**-9 each"


class Autoencoder(nn.Module):
    """Encodes by a weight and decodes by the same, read the other way round."""

    def __init__(self, recompute: bool):
        super().__init__()
        self.recompute = recompute
        self.encoder, self.first, self.second = nn.Linear(64, 40), nn.Linear(40, 40), nn.Linear(40, 40)
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return checkpoint(self.both, x, use_reentrant=False) if self.recompute else self.both(x)

    def both(self, x):
        hidden = torch.relu(self.first(torch.relu(self.encoder(x))))
        return torch.addmm(self.bias, torch.relu(self.second(hidden)), self.encoder.weight)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w: torch.addmm(w, x, w),
        lambda x, w: x @ w + (w @ w).mean(),
        lambda x, w: x @ w + w.square().mean(),
        lambda x, w: x @ w @ w.t().contiguous(),
    ],
)
def test_a_weight_that_is_read_as_a_value_too_stays_dense_with_a_reason(body):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(40, 40))

        def forward(self, x):
            return body(x, self.weight)

    model, x = Model(), torch.randn(40, 40)
    run = torch.compile(model, backend="ctrlprune", options=OPTIONS)
    rows = cc.explain(run)(x).rows
    assert {(row.name, row.gated) for row in rows} == {("weight", False)}
    assert all("read by something else, too" in row.reason for row in rows)
    assert cc.gates(model) == {}
    assert_like_plain(run, model, x)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated_first", [False, True])
def test_a_weight_that_is_read_both_ways_is_gated_and_judged_without_coupling(gated_first, recompute):
    model, x = Autoencoder(recompute), torch.randn(6, 64)
    if gated_first:
        cc.gates(model, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, backend="ctrlprune", options={**OPTIONS, "budget": 0.5})
    run(x).square().mean().backward()
    optimizer.step()
    state = cc.controller_of(optimizer).state_dict()["coupling"]
    feeds, reads = Sets(*state[:3]).to_members(), Sets(*state[3:]).to_members()
    nobody = frozenset()
    assert feeds == [nobody] * 8 + [None] * 5 + [frozenset([row]) for row in range(5, 10)]
    assert reads == [nobody] * 5 + [frozenset([column]) for column in range(13, 18)] + [None] * 5
    assert [row.gated for row in cc.explain(run)(x).rows] == [True] * 4
    gates = cc.gates(model)
    assert list(gates) == ["encoder.weight", "first.weight", "second.weight"]
    assert not gates["encoder.weight"].transposed
    prune_(gates.values())
    assert_like_plain(run, model, x)


def test_excluded_names_stay_dense():
    model = nn.ModuleDict({"body": MLP(40, 68, 40), "head": nn.Linear(40, 40)})
    forward = nn.Sequential(*model.values())
    run = torch.compile(forward, backend="ctrlprune", options={**OPTIONS, "exclude": ["*fc2*"]})
    rows = {row.name: row for row in cc.explain(run)(torch.randn(6, 40)).rows}
    assert {name: row.gated for name, row in rows.items()} == {
        "0.fc1.weight": True,
        "0.fc2.weight": False,
        "1.weight": True,
    }
    assert "*fc2*" in rows["0.fc2.weight"].reason


def test_copies_and_pickles_of_a_pruned_model_compute_the_same_and_prune_by_themselves():
    model = MLP()
    run, gates = compiled_and_pruned(model)
    x = torch.randn(6, 40)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False), copy.deepcopy(run)._orig_mod]
    for other in copies:
        fast = torch.compile(other, backend="ctrlprune", options=OPTIONS)
        torch.testing.assert_close(fast(x), run(x), rtol=1e-4, atol=1e-5)
        own = cc.gates(other)
        before = {name: gate.mask for name, gate in gates.items()}
        prune_(own.values())
        assert_like_plain(fast, other, x)
        assert all(torch.equal(gate.mask, before[name]) for name, gate in gates.items())


def test_dense_values_loaded_into_a_pruned_model_do_not_survive_in_masked_blocks():
    model = MLP()
    run, gates = compiled_and_pruned(model)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(6, 40)
    run(x).sum().backward()
    optimizer.step()
    model.load_state_dict(MLP().state_dict())
    optimizer.zero_grad()
    run(x).sum().backward()
    optimizer.step()
    for name, gate in gates.items():
        assert not gate.weight[masked_entries(gate)].any(), name
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
