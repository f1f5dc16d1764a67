"""Linears and products by other names are gated; what only looks like one is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctrlcompile as cc

from ..small_models import assert_like_plain, gradients, prune_

IN, OUT = 52, 44  # no multiples of a block


class By(nn.Module):
    """Computes what a function of x, a weight and a bias says."""

    def __init__(self, function, shape) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / 6), nn.Parameter(torch.randn(OUT))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def compiled(model, x, **settings):
    """By the one line, and called once: only then has a bare Parameter a gate."""
    run = torch.compile(model, backend="ctrlprune", options={"block": 8}, **settings)
    run(x)
    return run


def check_gated(model, x, *further, transposed=False, dtype=None):
    """It is gated, and pruned computes and learns what the plain model does; also of `further` inputs."""
    run = compiled(model, x)
    gates = cc.gates(model)
    assert gates["weight"].transposed == transposed
    prune_(gates.values())
    for inputs in (x, *further):
        assert_like_plain(run, model, inputs, gates=gates)
    assert all(row.gated and row.name == "weight" for row in cc.explain(run)(x).rows)


def around_no_grad(x, w, b):
    transpose = w.T
    with torch.no_grad():
        mean = (x @ transpose).mean()
    return (x - mean) @ transpose


LINEARS = {
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.mT": lambda x, w, b: x @ w.mT,
    "matmul with transpose": lambda x, w, b: torch.matmul(x, w.transpose(-1, -2)),
    "x.matmul with permute": lambda x, w, b: x.matmul(w.permute(1, 0)),
    "mm by keyword": lambda x, w, b: torch.mm(x, mat2=torch.transpose(w, 0, 1)),
    "addmm": lambda x, w, b: torch.addmm(b, x, torch.t(w)),
    "addmm that scales by 1": lambda x, w, b: torch.addmm(b, x, w.t(), beta=1, alpha=1),
    "around no_grad": around_no_grad,
    "added afterwards": lambda x, w, b: x @ w.swapaxes(0, 1) + b,
    "a transpose for two": lambda x, w, b: (
        (t := w.t()) is not None and x @ t + torch.relu(x) @ torch.permute(w, (1, 0)) @ torch.eye(OUT) + x.neg() @ t
    ),
    "einsum, stored [out, in]": lambda x, w, b: torch.einsum("bk,nk->bn", x, w),
    "einsum with dots": lambda x, w, b: torch.einsum("... k, n k -> ... n", x, w),
    "in a checkpoint": lambda x, w, b: checkpoint(lambda v: torch.relu(v @ w.t()), x, use_reentrant=False),
    "transposed around a checkpoint": lambda x, w, b: checkpoint(lambda v: torch.relu(v @ w.T), x, use_reentrant=False),
}
PRODUCTS = {
    "einsum, stored [in, out]": lambda x, w, b: torch.einsum("bk,kn->bn", x, w) + b,
    "linear of a transpose": lambda x, w, b: F.linear(x, w.t()),
}


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_by_another_name_is_gated_like_one(name):
    check_gated(By(LINEARS[name], (OUT, IN)), torch.randn(5, IN))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_weight_stored_in_out_is_gated_like_one(name):
    check_gated(By(PRODUCTS[name], (IN, OUT)), torch.randn(5, IN), transposed=True)


@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN)])
def test_inputs_of_any_dimension(shape):
    check_gated(By(lambda x, w, b: x @ w.T + b, (OUT, IN)), torch.randn(shape))


def test_batches_of_any_size_and_half_types():
    model = By(lambda x, w, b: torch.einsum("btk,nk->btn", x, w) + x @ w.T, (OUT, IN))
    run = compiled(model, torch.randn(2, 3, IN), dynamic=True)
    prune_(cc.gates(model).values())
    for batch in (1, 4):
        assert_like_plain(run, model, torch.randn(batch, 3, IN))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 3, IN)
        y, plain = run(x), model(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=5e-2)


def test_a_tied_autoencoder_has_one_gate_however_it_is_written():
    check_gated(By(lambda x, w, b: F.linear(torch.relu(F.linear(x, w, b)), w.t()), (OUT, IN)), torch.randn(5, IN))


def test_a_checkpoint_whose_products_stay_as_they_are_keeps_its_inputs():
    def forward(x, w, b):
        transpose = w.T
        return checkpoint(lambda v: torch.relu(F.linear(v, transpose, b)), x, use_reentrant=False)

    run = compiled(By(forward, (OUT, OUT)), x := torch.randn(5, OUT))
    change = cc.explain(run)(x).graphs[0].changes[0]
    assert (change.name, change.diff) == ("recognise_layers", "")


def test_the_pass_is_seen_where_passes_are():
    model = By(LINEARS["x @ w.T"], (OUT, IN))
    run = compiled(model, x := torch.randn(5, IN))
    changes = cc.explain(run)(x).graphs[0].changes
    assert [change.name for change in changes][:2] == ["recognise_layers", "gate_linear"]
    assert "matmul" in changes[0].before
    assert "matmul" not in changes[0].after


@torch.compiler.allow_in_graph
def t(weight):
    """Not the transpose that its name says."""
    return 2 * weight.t()


def stopped(x, w, b):
    with torch.no_grad():
        transpose = w.t()
    return x @ transpose + b


def stopped_by_inference_mode(x, w, b):
    with torch.inference_mode():
        transpose = w.T
    return torch.relu(x) @ transpose + b


MATRIX, STACK = (OUT, OUT), (5, OUT, OUT)
OTHERS = {  # with the shape of the weight; x is [5, OUT]
    "its gradient is stopped": (stopped, MATRIX),
    "its gradient is stopped by inference mode": (stopped_by_inference_mode, MATRIX),
    "a function of the same name": (lambda x, w, b: x @ t(w), MATRIX),
    "not transposed after all": (lambda x, w, b: x @ w.permute(0, 1) @ w.transpose(0, 0), MATRIX),
    "read otherwise, too": (lambda x, w, b: x @ w.t() + w.sum(), MATRIX),
    "no Parameter": (lambda x, w, b: x @ (2 * w).t() + torch.einsum("bk,nk->bn", x, 2 * w), MATRIX),
    "no matrix": (lambda x, w, b: x @ w.mT + torch.einsum("bk,bnk->bn", x, w), STACK),
    "a matrix is added": (lambda x, w, b: torch.addmm(b.expand(5, OUT), x, w.t()), MATRIX),
    "scaled": (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2), MATRIX),
    "linear of a transpose, with a bias": (lambda x, w, b: F.linear(x, w.t(), b), MATRIX),
    "a diagonal": (lambda x, w, b: torch.einsum("kk,nk->kn", x.T @ x, w), MATRIX),
    "summed over the first dimension": (lambda x, w, b: torch.einsum("kb,nk->bn", x.T, w), MATRIX),
    "the other way round": (lambda x, w, b: torch.einsum("bk,nk->nb", x, w).T, MATRIX),
    "summed over both": (lambda x, w, b: torch.einsum("bk,nm->bn", x, w), MATRIX),
    "three dimensions": (lambda x, w, b: torch.einsum("bk,bnk->bn", x, w), STACK),
    "repeated": (lambda x, w, b: torch.einsum("bk,nk->bn", x[:, :1], w), MATRIX),
    "scaled by x": (lambda x, w, b: torch.einsum(",nk->nk", x.sum(), w), MATRIX),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_one_is_left_alone(name):
    model, x = By(*OTHERS[name]), torch.randn(5, OUT)
    run = compiled(model, x)
    results = []
    for call in (run, model):
        model.zero_grad(set_to_none=True)
        y = call(x)
        y.square().sum().backward()
        results.append({"output": y, **gradients(model)})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not any(row.gated for row in cc.explain(run)(x).rows)
