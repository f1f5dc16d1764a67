"""Which weights are gated, and what becomes of those that are shared, frozen, excluded, copied or loaded."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctrlcompile as cc

from .small_models import MLP, assert_like_plain, compiled_and_pruned, masked_entries, prune_

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
