"""What of a dense gradient is the gate's, and its signals, against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.kernels import build, cpu_signals, index_lists, reference

from .problems import AUTOCAST, FLOAT, HALF

SIDES = st.integers(1, 16).map(lambda eighth: 8 * eighth)


class Case:
    """A dense gradient, a weight, a random mask, and some inactive blocks probed."""

    def __init__(self, n, k, block, density, dtypes):
        self.gradient, self.weight = torch.randn(n, k).to(dtypes[0]), torch.randn(n, k).to(dtypes[1])
        self.mask = torch.rand(index_lists.grid_shape((n, k), block)) < density
        self.lists, self.block = index_lists.build(self.mask), block
        inactive = (~self.mask).flatten().nonzero().flatten()
        probed = inactive[torch.randperm(inactive.numel())[:3]].int()
        self.probes = torch.cat([probed, torch.full((2,), -1, dtype=torch.int32)])

    def ours(self):
        return cpu_signals.gate_gradient(self.gradient.clone(), self.weight, self.lists, self.probes, self.block)

    def check(self, found):
        gradient, weight = self.gradient.double(), self.weight.double()
        exact, signals = reference.gate_gradient(gradient, weight, self.mask, self.probes, self.block)
        # A float32 sum of n terms in some order errs by a few units in the last place of the terms' magnitude.
        _, most = reference.gate_gradient(gradient.abs(), weight.abs(), self.mask, self.probes, self.block)
        assert found[0].dtype == self.weight.dtype
        assert torch.equal(found[0], exact.to(self.weight.dtype))
        assert found[1].dtype == torch.float32
        units = 8 + math.sqrt(self.block[0])
        assert ((found[1] - signals).abs() <= units * torch.finfo(torch.float32).eps * most).all()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 150), k=st.integers(1, 150), block=st.tuples(SIDES, SIDES), density=st.floats(0, 1),
    dtypes=st.sampled_from([FLOAT, HALF, AUTOCAST]),
)  # fmt: skip
def test_gradient_and_signals_are_the_references(n, k, block, density, dtypes):
    case = Case(n, k, block, density, dtypes)
    case.check(case.ours())


def test_what_is_not_finite_in_masked_blocks_stays_there():
    case = Case(96, 70, (16, 32), 0.5, FLOAT)
    entries = index_lists.expand(case.mask, case.block, (96, 70))
    case.gradient[~entries] = float("nan")
    gradient, signals = case.ours()
    assert torch.equal(gradient, torch.where(entries, case.gradient, 0))
    off = ~case.mask
    off.view(-1)[case.probes[case.probes >= 0].long()] = False
    assert signals[0].isfinite().all()
    assert not signals[1][off].any()


def test_a_gradient_and_a_weight_that_lie_otherwise_in_memory():
    case = Case(70, 45, (8, 16), 0.6, FLOAT)
    case.weight = case.weight.t().contiguous().t()
    gradient = case.gradient.t().contiguous().t()
    case.check(cpu_signals.gate_gradient(gradient, case.weight, case.lists, case.probes, case.block))


@pytest.mark.parametrize("why", ["float64", "no compiler"])
def test_without_a_kernel_the_reference_computes(why, monkeypatch):
    def fail(*_):
        raise build.KernelBuildError("no C++ compiler", "none is there", "Install one")

    monkeypatch.setattr(build, "load", fail)
    cpu_signals._library.cache_clear()
    try:
        case = Case(70, 45, (8, 16), 0.6, FLOAT if why == "no compiler" else (torch.float64, torch.float64))
        found = case.ours()
    finally:
        cpu_signals._library.cache_clear()
    assert torch.equal(found[0], torch.where(index_lists.expand(case.mask, case.block, (70, 45)), case.gradient, 0))
    case.check(found)
