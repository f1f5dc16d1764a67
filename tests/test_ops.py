"""Gated linears and matmuls as operators: registration, gradients, autocast, FLOP formulas; dense without a kernel."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile import kernel_choice, ops
from ctrlcompile.kernels import cpu_linear, cpu_product, reference
from ctrlcompile.kernels.index_lists import build, expand

from .small_models import error, masked_entries, no_worse, random_mask

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = (8, 16)
SHAPE = (44, 40)  # both sides end in a partial block


class Case:
    """Random arguments of `ctrlprune::linear`."""

    op, dgrad, wgrad = ops.linear, ops.linear_dgrad, ops.linear_wgrad

    def __init__(
        self, dtype=torch.float32, *, shape=SHAPE, lead=(3, 5), bias=True, activation="none", density=None, probes=2
    ):
        self.activation = activation
        self.x = torch.randn(*lead, shape[1], dtype=dtype)
        self.weight = torch.randn(shape, dtype=dtype) / 6
        self.bias = torch.randn(shape[0], dtype=dtype) if bias else None
        grid = (-(-shape[0] // BLOCK[0]), -(-shape[1] // BLOCK[1]))
        self.mask = torch.ones(grid, dtype=torch.bool) if density == 1 else random_mask(grid, density)
        self.signals = torch.zeros(2, *grid)
        self.probed = (~self.mask).flatten().nonzero().flatten()[:probes].int()
        self.probes = torch.cat((self.probed, torch.full((probes - len(self.probed) + 1,), -1, dtype=torch.int32)))
        self.lists = build(self.mask)

    def requires_grad(self) -> "Case":
        for tensor in (*self.leaves, self.signals):
            tensor.requires_grad_()
        return self

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.x, self.weight, self.bias) if tensor is not None]

    @property
    def arguments(self):
        gate = (self.signals, list(self.lists), self.probes)
        return (self.x, self.weight, self.bias, *gate, *BLOCK, self.activation)

    def run(self, *leaves: Tensor) -> Tensor:
        """The operator, on the case's own leaves or on others."""
        return ops.linear(*leaves, *self.arguments[len(leaves) :])[0]

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The framework's own ops on the masked dense weight in `dtype`: the output, and leaves for its gradients."""
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        x, weight, *bias = leaves
        y = self.product(x, weight * expand(self.mask, BLOCK, SHAPE), *bias)
        return reference.activate(y, self.activation), leaves

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The framework's own product."""
        return F.linear(x, weight, bias)


class Matmul(Case):
    """Random arguments of `ctrlprune::matmul`, whose weight is [in, out]."""

    op, dgrad, wgrad = ops.matmul, ops.matmul_dgrad, ops.matmul_wgrad

    def __init__(self, dtype=torch.float32, *, shape=SHAPE, lead=(3, 5), **settings):
        super().__init__(dtype, shape=shape, lead=lead, bias=False, **settings)
        self.x = torch.randn(*lead, shape[0], dtype=dtype)

    @property
    def arguments(self):
        return (self.x, self.weight, self.signals, list(self.lists), self.probes, *BLOCK)

    def run(self, *leaves: Tensor) -> Tensor:
        return ops.matmul(*leaves, *self.arguments[len(leaves) :])

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ weight


KINDS = pytest.mark.parametrize("kind", [Case, Matmul])
EVERY_KIND = pytest.mark.parametrize(
    ("kind", "activation"), [(Case, activation) for activation in ops.ACTIVATIONS] + [(Matmul, "none")]
)


@pytest.mark.parametrize(
    ("activation", "bias", "lead"),
    [("none", False, (7,)), ("relu", True, (2, 3)), ("gelu", True, (1,)), ("gelu_tanh", False, (2, 2, 3))],
)
def test_the_forward_op_is_registered_as_pytorch_wants(activation, bias, lead):
    case = Case(lead=lead, bias=bias, activation=activation).requires_grad()
    torch.library.opcheck(ops.linear.default, case.arguments)


@pytest.mark.parametrize("lead", [(), (7,), (2, 2, 3)])
def test_the_matmul_op_is_registered_as_pytorch_wants(lead):
    torch.library.opcheck(ops.matmul.default, Matmul(lead=lead).requires_grad().arguments)


@KINDS
def test_the_backward_ops_are_registered_as_pytorch_wants(kind):
    case = kind()
    grad = torch.randn_like(case.run())
    torch.library.opcheck(case.dgrad.default, (grad, case.weight, list(case.lists), *BLOCK))
    torch.library.opcheck(case.wgrad.default, (grad, case.x, case.weight, list(case.lists), case.probes, *BLOCK))


@EVERY_KIND
def test_gradients_are_the_numerical_ones(kind, activation):
    case = kind(torch.float64, shape=(20, 24), lead=(3,), activation=activation)
    assert torch.autograd.gradcheck(case.run, [leaf.requires_grad_() for leaf in case.leaves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_KIND
def test_output_and_gradients_are_as_exact_as_the_dense_op(kind, activation, dtype):
    lead, times = ((64, 5), 10) if dtype == torch.float32 else ((64, 5), 1.1)
    case = kind(dtype, lead=lead, activation=activation).requires_grad()
    y = case.run()
    grad = torch.randn_like(y)
    y.backward(grad)
    ours = [y, *(leaf.grad for leaf in case.leaves)]
    results = {}
    for kind in (torch.float64, dtype):
        out, leaves = case.dense(kind)
        out.backward(grad.to(kind))
        results[kind] = [out, *(leaf.grad for leaf in leaves)]
    names = ("y", "x", "weight", "bias")[: len(ours)]
    for name, mine, exact, theirs in zip(names, ours, results[torch.float64], results[dtype], strict=True):
        assert mine.dtype == dtype
        assert error(mine, exact) <= times * error(theirs, exact) + 1e-12, name


@pytest.mark.parametrize(("kind", "activation"), [(Case, "gelu"), (Matmul, "none")])
def test_signals_receive_the_gradient_of_each_gate_and_the_squares_of_what_is_probed(kind, activation):
    case = kind(torch.float64, density=0.5, activation=activation).requires_grad()
    assert len(case.probed)
    out = case.run()
    target = torch.randn_like(out)
    (out - target).square().sum().backward()
    gate = torch.ones(case.mask.shape, dtype=torch.float64, requires_grad=True)
    scale = gate.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: SHAPE[0], : SHAPE[1]]
    weight = (case.weight * expand(case.mask, BLOCK, SHAPE)).detach().requires_grad_()
    y = case.product(case.x.detach(), weight * scale, *(bias.detach() for bias in case.leaves[2:]))
    (reference.activate(y, activation) - target).square().sum().backward()
    torch.testing.assert_close(case.signals.grad[0].double(), gate.grad, rtol=1e-5, atol=1e-5)
    listened = case.mask.clone()
    listened.view(-1)[case.probed.long()] = True
    squares = F.pad(weight.grad.square(), (0, 8, 0, 4)).view(6, BLOCK[0], 3, BLOCK[1]).sum((1, 3)) * listened
    torch.testing.assert_close(case.signals.grad[1].double(), squares, rtol=1e-5, atol=1e-5)


@KINDS
def test_only_what_is_asked_for_is_computed(kind):
    case = kind(lead=(6,))
    case.x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    assert set(counter.get_flop_counts()["Global"]) == {case.op, case.dgrad}
    frozen = kind(lead=(6,))
    frozen.weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        frozen.run().sum().backward()
    assert set(counter.get_flop_counts()["Global"]) == {case.op, case.wgrad}
    assert frozen.signals.grad is None


@pytest.mark.parametrize(("kind", "activation"), [(Case, "gelu"), (Matmul, "none")])
def test_under_autocast_the_output_is_half_and_the_master_weight_and_its_gradient_are_not(kind, activation):
    case = kind(lead=(32, 5), activation=activation).requires_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
    assert y.dtype == torch.bfloat16
    grad = torch.randn_like(y)
    y.backward(grad)
    assert {leaf.grad.dtype for leaf in case.leaves} == {torch.float32}
    exact_y, exact = case.dense(torch.float64)
    exact_y.backward(grad.double())
    with torch.autocast("cpu", torch.bfloat16):
        dense_y, dense = case.dense(torch.float32)
    dense_y.backward(grad)
    assert error(y, exact_y) <= 1.1 * error(dense_y, exact_y)
    for mine, leaf, theirs in zip(case.leaves, exact, dense, strict=True):
        assert no_worse(error(mine.grad, leaf.grad), error(theirs.grad, leaf.grad), leaf.numel())


@KINDS
def test_autocast_leaves_float64_alone(kind):
    case = kind(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, case.dense(torch.float64)[0])


@KINDS
def test_flops_are_those_of_active_blocks_and_probes(kind):
    case = kind(lead=(2, 3), probes=random.randint(1, 4)).requires_grad()
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    counted = counter.get_flop_counts()["Global"]
    active = int(expand(case.mask, BLOCK, SHAPE).sum())
    listened = case.mask.clone()
    listened.view(-1)[case.probed.long()] = True
    assert counted[case.op] == counted[case.dgrad] == 2 * 6 * active
    assert counted[case.wgrad] == 2 * 6 * int(expand(listened, BLOCK, SHAPE).sum())


@KINDS
def test_with_every_block_active_the_flops_are_those_of_dense_products(kind):
    case = kind(lead=(2, 3), density=1).requires_grad()
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    with FlopCounterMode(display=False) as dense:
        case.dense(torch.float32)[0].sum().backward()
    assert counter.get_total_flops() == dense.get_total_flops() > 0


def test_changing_a_mask_between_forward_and_backward_is_an_error():
    linear = nn.Linear(SHAPE[1], SHAPE[0])
    (gate,) = cc.gates(linear, BLOCK).values()
    x = torch.randn(4, SHAPE[1], requires_grad=True)
    gated = (gate.signals, list(gate.lists), gate.probes)
    y = ops.linear(x, linear.weight, linear.bias, *gated, *BLOCK, "none")[0]
    gate.update_(random_mask(gate.grid))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_arguments_are_refused():
    case = Case()
    x, *rest = case.arguments
    with pytest.raises((RuntimeError, ValueError)):
        ops.linear(x[..., :-1], *rest)
    with pytest.raises(ValueError, match="swish"):
        ops.linear(*case.arguments[:-1], "swish")
    case = Matmul()
    grad, gate = torch.randn(3, 5, SHAPE[1]), list(case.lists)
    for wrong in (
        lambda: ops.matmul(case.x[..., :-1], *case.arguments[1:]),
        lambda: ops.matmul(grad, *case.arguments[1:]),
        lambda: ops.matmul_dgrad(case.x, case.weight, gate, *BLOCK),
        lambda: ops.matmul_wgrad(case.x, grad, case.weight, gate, case.probes, *BLOCK),
        lambda: ops.matmul_wgrad(grad[:-1], case.x, case.weight, gate, case.probes, *BLOCK),
        lambda: ops.matmul(*case.arguments[:-2], *BLOCK[::-1]),
    ):
        with pytest.raises(ValueError, match=r"does not fit|unequal rows|index lists|in blocks of"):
            wrong()


@pytest.fixture
def broken_compiler(monkeypatch):
    """Every kernel build fails, and nothing of it is remembered afterwards."""

    def fail(*_):
        raise cpu_linear.KernelBuildError("no kernel", "the compiler is broken", "Mend it")

    for libraries in (cpu_product._rows_library, cpu_product._wgrad_library):
        libraries.cache_clear()
    monkeypatch.setattr(cpu_product.build, "load", fail)
    monkeypatch.setattr(kernel_choice, "_broken", {})
    monkeypatch.setattr(kernel_choice, "_working", set())


@pytest.mark.usefixtures("broken_compiler")
@pytest.mark.parametrize(("kind", "activation"), [(Case, "gelu"), (Matmul, "none")])
def test_where_no_kernel_builds_results_are_the_same_after_exactly_one_warning(kind, activation):
    case = kind(lead=(6,), activation=activation).requires_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = case.run()
            y.sum().backward()
        other = kind(torch.bfloat16, lead=(6,))
        other.run()
    ours = [w for w in caught if "the compiler is broken" in str(w.message)]
    assert len(ours) == 1
    assert "dense" in str(ours[0].message)
    exact, leaves = case.dense(torch.float64)
    exact.sum().backward()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case.weight.grad.double(), 2 * leaves[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("broken_compiler")
def test_strict_raises_where_no_kernel_builds():
    linear = nn.Linear(160, 136)
    strict = torch.compile(linear, backend="ctrlprune", options={"block": 16, "strict": True})
    with pytest.raises(Exception, match="the compiler is broken"):
        strict(torch.randn(3, 160))
    torch._dynamo.reset()
    lenient, x = torch.compile(linear, backend="ctrlprune", options={"block": 16}), torch.randn(3, 160)
    with pytest.warns(RuntimeWarning, match="the compiler is broken"):
        y = lenient(x)
    torch.testing.assert_close(y, linear(x))


def test_the_gradient_is_exactly_zero_in_every_block_that_is_off():
    linear = nn.Linear(SHAPE[1], SHAPE[0])
    (gate,) = cc.gates(linear, BLOCK).values()
    gate.update_(random_mask(gate.grid, 0.5))
    off = (~gate.mask).flatten().nonzero().flatten()
    gate.probe_(off[: gate.probes.numel()])
    x = torch.randn(9, SHAPE[1])
    y, _ = ops.linear(x, linear.weight, linear.bias, gate.signals, list(gate.lists), gate.probes, *BLOCK, "relu")
    y.square().sum().backward()
    gone = masked_entries(gate)
    assert not linear.weight.grad[gone].any()
    assert linear.weight.grad[~gone].any()
