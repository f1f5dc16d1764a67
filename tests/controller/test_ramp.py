"""The plan: dense, down, level, and always what the budget allows."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.controller.ramp import FLOOR, HASTE, RAMP, WARM_UP, Ramp


def follow(total, average, settled=lambda step: 0.7, interval=5, normalised=0.0):
    """Uses what is planned; returns the path, a share per step."""
    ramp, path = Ramp(), []
    while len(path) < total:
        n = total - len(path)
        allowed = (average * total - sum(path)) / n
        share, take = ramp.plan(
            len(path),
            interval,
            allowed,
            settled(len(path)),
            total_steps=total,
            first=max(10, 2 * interval),
            normalised=normalised,
        )
        assert 1 <= take <= max(1, min(interval, n))
        path += [share] * take
    return path


@settings(deadline=None, max_examples=40)
@given(
    total=st.integers(60, 2000),
    average=st.floats(0.05, 1),
    interval=st.integers(1, 50),
    settled=st.lists(st.floats(0, 1), min_size=10, max_size=10),
    normalised=st.floats(0, 1),
)
def test_the_path_falls_from_dense_and_its_mean_is_what_the_budget_allows(
    total, average, interval, settled, normalised
):
    path = follow(total, average, lambda step: settled[step % 10], interval, normalised)
    assert sum(path) / total == pytest.approx(average, rel=1e-6)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(path))
    dense = path.count(1.0)
    if dense < total:
        assert min(path) >= 0.99 * FLOOR * (average * total - dense) / (total - dense), "the end is starved"
    assert max(path) <= 1 + 1e-9


def test_the_warm_up_is_as_long_as_the_gradients_need_within_its_bounds():
    def dense_steps(settled):
        path = follow(1000, 0.4, lambda _: settled)
        return next(step for step, share in enumerate(path) if share < 1)

    assert dense_steps(1.0) == pytest.approx(WARM_UP[0] * 1000, abs=5)
    assert dense_steps(0.0) == pytest.approx(WARM_UP[1] * 1000, abs=5)


def test_the_ramp_is_longer_while_the_gradients_have_not_settled():
    def ramp_steps(settled):
        path = follow(1000, 0.4, lambda _: settled)
        return sum(min(path) + 0.005 < share < 1 for share in path)

    assert 0.1 * 1000 < ramp_steps(1.0) <= RAMP[0] * 1000
    assert 1.5 * ramp_steps(1.0) < ramp_steps(0.0) <= RAMP[1] * 1000


def test_before_batch_norms_the_start_is_hardly_dense_and_the_end_hardly_thinner_than_the_average():
    path = follow(1000, 0.4, normalised=1.0)
    assert path.count(1.0) <= (1 - HASTE) * WARM_UP[1] * 1000 + 1
    assert path[-1] > 0.95 * 0.4
    assert follow(1000, 0.4, normalised=0.5) == follow(1000, 0.4), "the other half needs its time"


def test_a_budget_of_one_has_no_ramp():
    assert follow(200, 1.0) == [1.0] * 200


def test_an_open_ended_run_goes_down_to_the_rate_and_stays():
    ramp, path = Ramp(), []
    while len(path) < 1000:
        share, take = ramp.plan(len(path), 10, 0.35, 0.5, total_steps=None, first=20)
        path += [share] * take
    assert path[0] == 1
    assert path[500:] == [0.35] * len(path[500:])


@pytest.mark.parametrize(("average", "least"), [(0.15, 50), (0.3, 70)])
def test_a_small_budget_too_starts_dense_until_the_learning_rate_is_up(average, least):
    # What learns late, queries and keys for one, is ranked too low before: see the first paragraphs of `ramp`.
    assert follow(1000, average, settled=lambda step: 1.0).count(1.0) >= least
