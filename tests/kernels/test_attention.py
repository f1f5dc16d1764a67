"""Attention of live heads against float64: what comes out, its gradients, and what dead heads get instead."""

import random

import pytest
import torch
import torch.nn.functional as F

from ctrlcompile import ops
from ctrlcompile.kernels import attention

SHAPES = {  # batch, heads, queries, keys, features
    "of self": (3, 5, 17, 17, 8),
    "of others": (2, 4, 9, 23, 16),
    "one query": (2, 3, 1, 6, 7),
    "one batch": (1, 6, 33, 33, 64),
}


class Case:
    """Random operands of which dead heads have constant values, and a gradient that is zero there."""

    def __init__(self, shape, live, dtype=torch.float32):
        batch, heads, queries, keys, features = shape
        self.live = torch.tensor(live)
        self.query = torch.randn(batch, queries, heads, features, dtype=dtype).transpose(1, 2)
        self.key = torch.randn(batch, keys, heads, features, dtype=dtype).transpose(1, 2)
        self.value = torch.randn(batch, keys, heads, features, dtype=dtype).transpose(1, 2)
        self.grad = torch.randn(batch, queries, heads, features, dtype=dtype).transpose(1, 2)
        self.value[:, ~self.live] = torch.randn(features, dtype=dtype)
        self.grad[:, ~self.live] = 0

    @property
    def operands(self):
        return self.query, self.key, self.value

    def exact(self, causal, scale):
        leaves = [tensor.double().detach().requires_grad_() for tensor in self.operands]
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=scale)
        return out.detach(), torch.autograd.grad(out, leaves, self.grad.double())


def some(heads):
    """Flags with at least one live head and one dead."""
    flags = [random.random() < 0.5 for _ in range(heads)]
    flags[0], flags[-1] = random.sample([True, False], 2)
    return flags


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["some", "all", "none"])
@pytest.mark.parametrize(("causal", "scale"), [(True, None), (False, 0.3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_attention_whichever_heads_are_dead(shape, kind, causal, scale, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # a batch smaller takes all live heads together
    case = Case(shape, some(shape[1]) if kind == "some" else [kind == "all"] * shape[1])
    out, sums = attention.forward(*case.operands, case.live, causal, scale)
    gradients = attention.backward(case.grad, *case.operands, out, sums, case.live, causal, scale)
    expected, expected_gradients = case.exact(causal, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
        assert not ours[:, ~case.live].any()


def test_dead_heads_are_not_computed():
    case = Case(SHAPES["of self"], [True, False, True, False, False])
    case.query[:, ~case.live] = torch.nan
    out, sums = attention.forward(*case.operands, case.live, True, None)
    torch.testing.assert_close(out[:, ~case.live], case.value[:, ~case.live])
    gradients = attention.backward(case.grad, *case.operands, out, sums, case.live, True, None)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_exact_as_the_frameworks_own(dtype):
    case = Case(SHAPES["of others"], [True, False, False, True], dtype)
    out, _ = attention.forward(*case.operands, case.live, False, None)
    plain = F.scaled_dot_product_attention(*case.operands)
    assert out.dtype == dtype
    torch.testing.assert_close(out[:, case.live], plain[:, case.live])


@pytest.mark.parametrize("live", [[True, False, True, True, False], [True] * 5, [False] * 5])
def test_the_operator_keeps_the_rules_of_operators(live):
    case = Case(SHAPES["of self"], live)
    leaves = [tensor.detach().requires_grad_() for tensor in case.operands]
    # Its gradient is that of the function where the promise holds that the gradient of a dead head is zero.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attention.default, (*leaves, case.live, True, None), test_utils=tests)
    out, sums = ops.attention(*case.operands, case.live, True, None)
    rest = (*case.operands, out, sums, case.live, True, None)
    torch.library.opcheck(ops.attention_backward.default, (case.grad, *rest), test_utils=tests)


def test_what_does_not_fit_is_refused():
    case = Case(SHAPES["of self"], [True] * 5)
    with pytest.raises(ValueError, match=r"live is bool \[5\]; got torch.bool of shape \(4,\)"):
        ops.attention(*case.operands, case.live[:4], True, None)
    with pytest.raises(ValueError, match="query, key and value are"):
        ops.attention(case.query[..., :4], case.key, case.value, case.live, True, None)
