"""Linears and products by other names are gated; what only looks like one is left alone."""

import pytest
import torch
from torch import nn

import ctrlcompile as cc

from ..small_models import assert_like_plain, prune_

IN, OUT = 52, 44  # no multiples of a block


class By(nn.Module):
    """Computes what a function of x, a weight and a bias says."""

    def __init__(self, function, shape=(OUT, IN)) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / 6), nn.Parameter(torch.randn(OUT))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def compiled(model, x):
    """By the one line, and called once: only then has a bare Parameter a gate."""
    run = torch.compile(model, backend="ctrlprune", options={"block": 8})
    run(x)
    return run


LINEARS = {
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.mT": lambda x, w, b: x @ w.mT,
    "matmul with transpose": lambda x, w, b: torch.matmul(x, w.transpose(-1, -2)),
    "x.matmul with permute": lambda x, w, b: x.matmul(w.permute(1, 0)),
    "mm by keyword": lambda x, w, b: torch.mm(x, mat2=torch.transpose(w, 0, 1)),
    "addmm": lambda x, w, b: torch.addmm(b, x, torch.t(w)),
    "added afterwards": lambda x, w, b: x @ w.swapaxes(0, 1) + b,
    "einsum, stored [out, in]": lambda x, w, b: torch.einsum("bk,nk->bn", x, w),
    "einsum with dots": lambda x, w, b: torch.einsum("... k, n k -> ... n", x, w),
}


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_by_another_name_is_gated_like_one(name):
    model, x = By(LINEARS[name]), torch.randn(5, IN)
    run = compiled(model, x)
    gates = cc.gates(model)
    assert not gates["weight"].transposed
    prune_(gates.values())
    assert_like_plain(run, model, x, gates=gates)
    (row,) = cc.explain(run)(x).rows
    assert (row.gated, row.name) == (True, "weight")


def test_an_einsum_with_a_weight_stored_in_out_is_gated_like_a_product():
    model = By(lambda x, w, b: torch.einsum("btd,df->btf", x, w) + b, (IN, OUT))
    x = torch.randn(2, 5, IN)
    run = compiled(model, x)
    gates = cc.gates(model)
    assert gates["weight"].transposed
    prune_(gates.values())
    assert_like_plain(run, model, x, gates=gates)


SQUARE = (OUT, OUT)
OTHERS = {
    "not transposed after all": (lambda x, w, b: x[:, :OUT] @ w.permute(0, 1), 0),
    "read otherwise, too": (lambda x, w, b: x[:, :OUT] @ w.t() + w.sum(), 0),
    "a matrix is added": (lambda x, w, b: torch.addmm(b.expand(5, OUT), x[:, :OUT], w.t()), 0),
    "scaled": (lambda x, w, b: torch.addmm(b, x[:, :OUT], w.t(), alpha=2), 0),
    "a trace": (lambda x, w, b: torch.einsum("kk,nk->n", x[:, :OUT].T @ x[:, :OUT], w) + x[:, :OUT], 0),
    "summed over another dimension": (lambda x, w, b: torch.einsum("kb,nk->bn", x[:, :OUT].T, w), 0),
    "the other way round": (lambda x, w, b: torch.einsum("bk,nk->nb", x[:, :OUT], w).T, 0),
    "repeated": (lambda x, w, b: torch.einsum("bk,nk->bn", x[:, :1], w), 0),
    "outer product": (lambda x, w, b: torch.einsum("bk,nm->bn", x[:, :OUT], w), 0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_one_computes_what_it_did(name):
    function, gated = OTHERS[name]
    model = By(function, SQUARE)
    x = torch.randn(5, IN)
    run = compiled(model, x)
    torch.testing.assert_close(run(x), model(x))
    assert sum(row.gated for row in cc.explain(run)(x).rows) == gated
