"""Feedback removes what the model of the cost misses, and does not wind up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.controller.price import AUTHORITY, Feedback


@settings(deadline=None, max_examples=40)
@given(miss=st.floats(-0.08, 0.08))
def test_a_constant_miss_of_the_cost_model_is_removed(miss):
    feedback = Feedback()
    for _ in range(60):
        used = feedback.ask(0.4) * (1 + miss)
        feedback.update((used - 0.4) / 0.4)
    assert used == pytest.approx(0.4, rel=1e-3)


def test_a_target_out_of_reach_does_not_wind_the_price_up():
    feedback = Feedback()
    for _ in range(1000):
        feedback.update(1.0)
        assert abs(feedback.correction) <= AUTHORITY
    decisions = 0
    while feedback.correction > 0:
        used = feedback.ask(0.4)
        feedback.update((used - 0.4) / 0.4)
        decisions += 1
        if feedback.correction < 0.005:
            break
    assert decisions < 25


@settings(deadline=None, max_examples=40)
@given(misses=st.lists(st.floats(-5, 5), max_size=50))
def test_what_is_asked_for_stays_near_what_is_wanted(misses):
    feedback = Feedback()
    for miss in misses:
        feedback.update(miss)
    assert 0.4 * (1 - AUTHORITY) <= feedback.ask(0.4) <= 0.4 * (1 + AUTHORITY)
