"""Attention by the kinds of its heads against float64: what comes out, and its gradients."""

import random

import pytest
import torch
import torch.nn.functional as F

from ctrlcompile import ops
from ctrlcompile.kernels import attention
from ctrlcompile.kernels.attention import DEAD, LIVE, UNIFORM

SHAPES = {  # batch, heads, queries, keys, features
    "of self": (3, 5, 17, 17, 8),
    "of others": (2, 4, 9, 23, 16),
    "one query": (2, 3, 1, 6, 7),
    "more queries than keys": (2, 3, 13, 5, 8),
    "one batch": (1, 6, 33, 33, 64),
}


class Case:
    """Random operands of which dead heads have constant values and a gradient of zero, uniform heads constant queries
    and keys."""

    def __init__(self, shape, kinds, dtype=torch.float32):
        batch, heads, queries, keys, features = shape
        self.kinds = torch.tensor(kinds, dtype=torch.uint8)
        self.dead, self.uniform, self.live = (self.kinds == kind for kind in (DEAD, UNIFORM, LIVE))
        self.query = torch.randn(batch, queries, heads, features, dtype=dtype).transpose(1, 2)
        self.key = torch.randn(batch, keys, heads, features, dtype=dtype).transpose(1, 2)
        self.value = torch.randn(batch, keys, heads, features, dtype=dtype).transpose(1, 2)
        self.grad = torch.randn(batch, queries, heads, features, dtype=dtype).transpose(1, 2)
        self.value[:, self.dead] = torch.randn(features, dtype=dtype)
        self.grad[:, self.dead] = 0
        for constant in (self.query, self.key):
            constant[:, self.uniform] = torch.randn(int(self.uniform.sum()), 1, features, dtype=dtype)

    @property
    def operands(self):
        return self.query, self.key, self.value

    def exact(self, causal, scale):
        return self.run(
            lambda *operands: F.scaled_dot_product_attention(*operands, is_causal=causal, scale=scale), True
        )

    def ours(self, causal, scale):
        out, sums = attention.forward(*self.operands, self.kinds, causal, scale)
        return out, attention.backward(self.grad, *self.operands, out, sums, self.kinds, causal, scale)

    def plain(self, causal, scale):
        return self.run(lambda *operands: F.scaled_dot_product_attention(*operands, is_causal=causal, scale=scale))

    def run(self, attend, double=False):
        tensors = [tensor.double() if double else tensor for tensor in (*self.operands, self.grad)]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        out = attend(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, tensors[3])


def some(heads):
    """Kinds of heads, in any order, of which one head at least is of each."""
    return random.sample([DEAD, UNIFORM, LIVE, *random.choices([DEAD, UNIFORM, LIVE], k=heads - 3)], heads)


KINDS = {"some": None, "all live": LIVE, "all uniform": UNIFORM, "all dead": DEAD}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("causal", "scale"), [(True, None), (False, 0.3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_attention_whatever_kinds_its_heads_are(shape, kind, causal, scale, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # a batch smaller takes all live heads together
    case = Case(shape, some(shape[1]) if kind is None else [kind] * shape[1])
    out, gradients = case.ours(causal, scale)
    expected, expected_gradients = case.exact(causal, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
        assert not ours[:, case.dead].any()
    assert not gradients[0][:, case.uniform].any()


def test_a_long_average_is_as_exact_as_attention():
    case = Case((1, 2, 5000, 5000, 8), [UNIFORM, UNIFORM])
    exact, exact_gradients = case.exact(True, None)
    out, gradients = case.ours(True, None)
    plain, plain_gradients = case.plain(True, None)
    for ours, theirs, truth in zip(
        (out, *gradients), (plain, *plain_gradients), (exact, *exact_gradients), strict=True
    ):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-7


def test_weights_are_computed_for_no_head_that_needs_none():
    case = Case(SHAPES["of self"], [LIVE, DEAD, UNIFORM, LIVE, DEAD])
    case.query[:, case.dead] = torch.nan
    case.key[:, ~case.live] = torch.nan
    out, gradients = case.ours(True, None)
    torch.testing.assert_close(out[:, case.dead], case.value[:, case.dead])
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_as_exact_as_the_frameworks_own(causal):
    case = Case(SHAPES["of self"], [LIVE, DEAD, UNIFORM, LIVE, UNIFORM], torch.bfloat16)
    (out, gradients), (plain, plain_gradients) = case.ours(causal, None), case.plain(causal, None)
    exact, exact_gradients = case.exact(causal, None)
    for ours, theirs, truth in zip(
        (out, *gradients), (plain, *plain_gradients), (exact, *exact_gradients), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours[:, case.live], theirs[:, case.live])
        assert (ours - truth).abs().max() <= 1.1 * (theirs - truth).abs().max()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0)])
def test_no_queries_or_no_keys_leave_no_gradients(queries, keys, causal):
    case = Case((2, 3, queries, keys, 8), [UNIFORM, DEAD, UNIFORM])
    out, gradients = case.ours(causal, None)
    assert out.shape == (2, 3, queries, 8)
    assert not any(tensor.any() for tensor in (out, *gradients))


@pytest.mark.parametrize("kinds", [[LIVE, DEAD, UNIFORM, LIVE, DEAD], [LIVE] * 5, [UNIFORM] * 5, [DEAD] * 5])
def test_the_operator_keeps_the_rules_of_operators(kinds):
    case = Case(SHAPES["of self"], kinds)
    leaves = [tensor.detach().requires_grad_() for tensor in case.operands]
    # Its gradient is that of the function where what the kinds promise holds.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attention.default, (*leaves, case.kinds, True, None), test_utils=tests)
    out, sums = ops.attention(*case.operands, case.kinds, True, None)
    rest = (*case.operands, out, sums, case.kinds, True, None)
    torch.library.opcheck(ops.attention_backward.default, (case.grad, *rest), test_utils=tests)


@pytest.mark.parametrize("kinds", [[LIVE] * 5, [LIVE, DEAD, UNIFORM, LIVE, DEAD]])
def test_operands_may_lie_in_memory_in_any_order(kinds):
    case = Case(SHAPES["of self"], kinds)
    expected = case.ours(True, None)
    case.query, case.key, case.grad = (t.contiguous() for t in (case.query, case.key, case.grad))
    case.value = case.value.movedim(3, 0).contiguous().movedim(0, 3)
    operands = (*case.operands, case.kinds, True, None)
    torch.library.opcheck(ops.attention.default, operands, test_utils=("test_schema", "test_faketensor"))
    out, sums = ops.attention(*operands)
    gradients = ops.attention_backward(case.grad, *case.operands, out, sums, case.kinds, True, None)
    torch.testing.assert_close((out, gradients), expected)


def test_what_does_not_fit_is_refused():
    case = Case(SHAPES["of self"], [LIVE] * 5)
    apart = torch.stack((case.kinds, case.kinds), 1)[:, 0]
    for kinds, got in (
        (case.kinds[:4], r"uint8 of shape \(4,\)"),
        (case.live, r"bool of shape \(5,\)"),
        (apart, r"uint8 of shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=rf"kinds is uint8 \[5\], contiguous; got torch.{got}"):
            ops.attention(*case.operands, kinds, True, None)
    with pytest.raises(ValueError, match="no kernel averages values of"):
        ops.attention(*(operand.half() for operand in case.operands), case.kinds, True, None)
    out, sums = ops.attention(*case.operands, case.kinds, True, None)
    with pytest.raises(ValueError, match=r"what comes out and its gradient are torch.float32 \(3, 5, 17, 8\); got"):
        ops.attention_backward(case.grad[:, :, 1:], *case.operands, out, sums, case.kinds, True, None)
    with pytest.raises(ValueError, match="query, key and value are"):
        ops.attention(case.query[..., :4], case.key, case.value, case.kinds, True, None)
