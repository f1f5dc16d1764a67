"""What a budget may be, and what the ledger allows."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.controller.budget import Budget, Ledger


def test_a_budget_is_made_from_itself_or_from_a_number():
    assert Budget.of(0.4) == Budget.of(Budget(flops=0.4)) == Budget(flops=0.4)
    assert Budget(flops=1).flops == 1


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, 40, math.nan, math.inf])
def test_a_budget_outside_its_range_is_refused_with_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"budget: got .*; allowed is 0 < budget <= 1"):
        Budget.of(value)


def test_a_percentage_is_refused_with_the_share_that_was_meant():
    with pytest.raises(ValueError, match=r"for 40 % pass 0\.4"):
        Budget.of(40)


@pytest.mark.parametrize("value", ["0.4", None, True, [0.4]])
def test_a_budget_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="allowed is a number"):
        Budget.of(value)


@settings(deadline=None, max_examples=40)
@given(
    budget=st.floats(0.2, 1),
    fixed=st.floats(0, 0.1),
    early=st.integers(1, 20),
    left=st.integers(50, 500),
    gates=st.lists(st.floats(0.1, 10), min_size=1, max_size=4),
)
def test_a_run_that_uses_what_is_allowed_in_each_step_left_lands(budget, fixed, early, left, gates):
    ledger = Ledger()
    gated = sum(gates)
    dense = gated / (1 - fixed)
    for _ in range(early):
        ledger.add(dense, dense - gated, dense, gates)
    share = ledger.allowed(Budget(budget), left)
    for _ in range(left):
        ledger.add(dense, dense - gated, dense - gated + share * gated, gates)
    assert ledger.used == pytest.approx(budget * ledger.dense, rel=1e-9)


def test_the_least_budget_is_what_the_run_uses_at_the_lowest_density():
    ledger = Ledger()
    ledger.add(dense=10.0, fixed=2.0, used=10.0, gated=[3.0, 5.0])
    assert ledger.least(steps_left=9, lowest=[0.1, 0.2]) == pytest.approx((10 + 9 * (2 + 0.3 + 1.0)) / 100)
