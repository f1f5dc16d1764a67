"""Decisions: the best blocks per cost, within bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.controller.decide import HYSTERESIS, LIFE, Blocks, Exchange, decide, swap_limit
from ctrlcompile.controller.layout import Layout
from ctrlcompile.controller.rating import rate

from .plant import FakeGate


def layout_of(*shapes, block=(8, 8)):
    return Layout.of([FakeGate(str(i), shape, block) for i, shape in enumerate(shapes)])


LAYOUT = layout_of((80, 80), (96, 50))
N = LAYOUT.gate_of.numel()
COST = LAYOUT.area * torch.tensor([0.6, 0.4], dtype=torch.float64)[LAYOUT.gate_of]


def choose(blocks, benefit, ask, *, step=1000, dwell=50, swap=0.02, least=0, held=None, saturating=None):
    none = torch.zeros(N, dtype=torch.bool)
    return decide(
        blocks,
        benefit,
        COST,
        LAYOUT,
        step=step,
        ask=ask,
        dwell=dwell,
        swap=swap,
        least=torch.full((2,), least),
        held=none if held is None else held,
        saturating=none if saturating is None else saturating,
    )


@settings(deadline=None, max_examples=25)
@given(ask=st.floats(0.05, 1), seed=st.integers(0, 2**31))
def test_what_is_kept_costs_what_was_asked_to_one_block_and_is_worth_the_price(ask, seed):
    benefit = torch.rand(N, generator=torch.Generator().manual_seed(seed))
    decision = choose(Blocks.of(torch.ones(N, dtype=torch.bool)), benefit, ask)
    assert ask - 1e-6 <= decision.density < ask + float(COST.max())
    assert decision.density == pytest.approx(float(COST[decision.active].sum()))
    worth = benefit / COST
    if not decision.active.all():
        assert worth[decision.active].min() >= worth[~decision.active].max()
    assert decision.price == pytest.approx(float(worth[decision.active].min()), rel=1e-5)


def test_equal_benefits_are_told_apart_so_that_the_cost_is_still_met():
    decision = choose(Blocks.of(torch.ones(N, dtype=torch.bool)), torch.ones(N), 0.5)
    assert decision.density == pytest.approx(0.5, abs=float(COST.max()))


def half():
    """Every second block active, benefits all equal to a price of 1."""
    return Blocks.of(torch.arange(N) % 2 == 0), COST.float().clone()


@pytest.mark.parametrize(("better", "comes"), [(1.05 * (1 + HYSTERESIS), True), (0.95 * (1 + HYSTERESIS), False)])
def test_an_inactive_block_comes_back_only_when_it_is_clearly_better(better, comes):
    blocks, benefit = half()
    benefit[3] *= better
    decision = choose(blocks, benefit, float(COST[blocks.active].sum()))
    assert bool(decision.active[3]) is comes
    assert decision.density <= float(COST[blocks.active].sum()) + float(COST.max())


def test_each_return_raises_the_bar():
    blocks, benefit = half()
    benefit[3] *= 1.05 * (1 + HYSTERESIS)
    before, ask = blocks.active, float(COST[blocks.active].sum())
    blocks.switch_(choose(blocks, benefit, ask).active, 1000)
    assert blocks.active[3]
    blocks.switch_(before, 2000)
    assert not choose(blocks, benefit, ask, step=3000).active[3]


def test_a_switched_block_stays_as_it_is_for_the_dwell_time():
    blocks, benefit = half()
    ask = float(COST[blocks.active].sum())
    active = blocks.active.clone()
    active[3], active[0] = True, False
    blocks.switch_(active, 1000)
    benefit[3], benefit[0] = 0.0, 100.0
    soon, later = choose(blocks, benefit, ask, step=1049), choose(blocks, benefit, ask, step=1050)
    assert (bool(soon.active[3]), bool(soon.active[0])) == (True, False)
    assert (bool(later.active[3]), bool(later.active[0])) == (False, True)


@settings(deadline=None, max_examples=25)
@given(swap=st.floats(0.001, 0.2), seed=st.integers(0, 2**31))
def test_what_comes_back_in_exchange_is_bounded(swap, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = Blocks.of(torch.rand(N, generator=generator) < 0.5)
    benefit = torch.where(blocks.active, 1.0, 100.0) * torch.rand(N, generator=generator)
    ask = float(COST[blocks.active].sum())
    decision = choose(blocks, benefit, ask, swap=swap)
    returned = decision.active & ~blocks.active
    assert float(COST[returned].sum()) <= swap + 1e-6
    assert decision.exchanged == pytest.approx(float(COST[returned].sum()))
    best = (benefit / COST).masked_fill(blocks.active, 0).argmax()
    assert bool(returned.any()) is (float(COST[best]) <= swap)


def test_every_gate_keeps_its_least_number_of_blocks():
    benefit = torch.where(LAYOUT.gate_of == 0, 1e-9, 1.0) * torch.rand(N)
    decision = choose(Blocks.of(torch.ones(N, dtype=torch.bool)), benefit, 0.2, least=7)
    kept = decision.active[LAYOUT.gate_of == 0]
    assert int(kept.sum()) == 7
    assert benefit[LAYOUT.gate_of == 0][kept].min() >= benefit[LAYOUT.gate_of == 0][~kept].max()
    assert decision.density == pytest.approx(0.2, abs=2 * float(COST.max()))


def test_held_blocks_stay_as_they_are():
    blocks = Blocks.of(torch.rand(N) < 0.5)
    held = LAYOUT.gate_of == 1
    decision = choose(blocks, torch.rand(N), 0.45, held=held)
    assert torch.equal(decision.active[held], blocks.active[held])


@pytest.mark.parametrize("saturates", [True, False])
def test_gates_that_saturate_have_densities_in_proportion_to_benefit_per_cost(saturates):
    per_cost = torch.tensor([2.0, 1.0])[LAYOUT.gate_of]
    jitter = 1 + 1e-3 * torch.rand(N)
    whole = Blocks.of(torch.ones(N, dtype=torch.bool))
    decision = choose(whole, COST.float() * per_cost * jitter, 0.4, saturating=torch.full((N,), saturates))
    first, second = (decision.active[LAYOUT.gate_of == gate].float().mean() for gate in (0, 1))
    if saturates:
        assert first / second == pytest.approx(2, rel=0.1)
    else:
        assert (first, second) == (pytest.approx(0.4 / 0.6, abs=0.02), 0)
    assert decision.density == pytest.approx(0.4, abs=float(COST.max()))


@settings(deadline=None, max_examples=25)
@given(ask=st.floats(0.3, 0.6), seed=st.integers(0, 2**31))
def test_gates_that_saturate_thin_out_evenly_whatever_their_rows_and_columns_are_rated(ask, seed):
    generator = torch.Generator().manual_seed(seed)

    def spread(lines):
        return torch.exp(torch.randn(int(lines.max()) + 1, generator=generator))[lines]

    factors = spread(LAYOUT.row_of) * spread(LAYOUT.column_of)
    benefit = COST.float() * (0.5 + torch.rand(N, generator=generator)) * factors
    whole = Blocks.of(torch.ones(N, dtype=torch.bool))
    even = choose(whole, benefit, ask, saturating=torch.ones(N, dtype=torch.bool)).active
    rated = choose(whole, benefit, ask).active

    def unevenness(active):
        """Variance of the density of rows and of columns, within their gates."""
        lines = [line[LAYOUT.gate_of == gate] for line in (LAYOUT.row_of, LAYOUT.column_of) for gate in (0, 1)]
        parts = [active[LAYOUT.gate_of == gate].double() for _ in (0, 1) for gate in (0, 1)]
        counts = [torch.bincount(line - line.min(), weights=part) for line, part in zip(lines, parts, strict=True)]
        return sum(float((count / len(part) * len(count)).var()) for count, part in zip(counts, parts, strict=True))

    assert unevenness(even) < 0.5 * unevenness(rated)


def test_within_a_row_of_a_gate_that_saturates_the_better_blocks_are_kept():
    lines = int(LAYOUT.row_of.max()) + 1
    benefit = COST.float() * (0.5 + torch.rand(N)) * torch.exp(torch.randn(lines))[LAYOUT.row_of]
    kept = choose(Blocks.of(torch.ones(N, dtype=torch.bool)), benefit, 0.5, saturating=torch.ones(N, dtype=torch.bool))
    worth, active = (benefit / COST).float(), kept.active.float()
    mean = torch.bincount(LAYOUT.row_of, worth) / torch.bincount(LAYOUT.row_of)
    beside = worth / mean.float()[LAYOUT.row_of]
    assert (beside * active).sum() / active.sum() > 1.2 * (beside * (1 - active)).sum() / (1 - active).sum()


def test_an_inactive_block_of_a_gate_that_saturates_has_a_bar_as_well():
    active, worth = torch.rand(N) < 0.5, 0.5 + torch.rand(N)
    everywhere = torch.ones(N, dtype=torch.bool)
    low, high = (rate(worth, active, torch.full((N,), bar), LAYOUT, everywhere) for bar in (1.0, 1.5))
    assert low[~active].sum() > 1.5 * high[~active].sum()
    assert low[active].sum() <= high[active].sum()


@settings(deadline=None, max_examples=25)
@given(ask=st.floats(0.1, 0.9), wavering=st.floats(-0.9, 0.45), seed=st.integers(0, 2**31))
def test_a_cost_asked_for_that_wavers_by_less_than_half_a_block_switches_nothing(ask, wavering, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = Blocks.of(torch.ones(N, dtype=torch.bool))
    blocks = Blocks.of(choose(whole, torch.rand(N, generator=generator), ask).active)
    level = float(COST[blocks.active].sum()) + wavering * float(COST.min())
    again = choose(blocks, torch.rand(N, generator=generator), level, swap=0.0)
    assert torch.equal(again.active, blocks.active)


def test_what_is_missing_is_filled_with_blocks_that_fit_while_a_costly_one_is_saved_up_for():
    layout = layout_of((16, 16), (16, 16))
    cost = torch.tensor([0.2] * 4 + [0.05] * 4, dtype=torch.float64)
    blocks = Blocks.of(torch.tensor([True, True, False, False] * 2))
    benefit = cost.float() * torch.tensor([4.0, 4.0, 9.0, 9.0, 4.0, 4.0, 8.0, 8.0])

    def come(ask, swap):
        decision = decide(
            blocks, benefit, cost, layout, step=1000, ask=ask, dwell=50, swap=swap,
            least=torch.ones(2, dtype=torch.int64), held=torch.zeros(8, dtype=torch.bool),
            saturating=torch.zeros(8, dtype=torch.bool),
        )  # fmt: skip
        return (decision.active & ~blocks.active).nonzero().flatten().tolist()

    assert come(0.5, 0.0) == []
    assert come(0.55, 0.0) == [6]
    assert come(0.61, 0.0) == [2]
    assert come(0.5, 0.1) == [], "the costly one is the best"
    assert come(0.5, 0.2) == [2]


def test_what_may_be_exchanged_is_saved_up_for_a_whole_block():
    exchange = Exchange()
    granted = [exchange.grant(0.001, 0.0035) for _ in range(6)]
    assert granted == pytest.approx([0.001, 0.002, 0.003, 0.0035, 0.0035, 0.0035])
    exchange.spend(0.003)
    assert exchange.grant(0.001, 0.0035) == pytest.approx(0.0015)
    assert exchange.grant(0.01, 0.0035) == pytest.approx(0.01)
    assert exchange.grant(0.0, 0.0035) == 0.0, "no more exchange: nothing saved is left over"


@pytest.mark.parametrize("steps", [300, 1000, 20_000])
def test_exchange_ends_before_the_run_does_and_leaves_blocks_time_to_learn(steps):
    interval = min(50, max(5, steps // 100))
    limits = [swap_limit(step, interval, steps) for step in range(0, steps + 1, interval)]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > 0
    assert max(limits[round(0.76 * len(limits)) :]) == pytest.approx(0, abs=1e-12)
    assert max(limits) <= interval / LIFE
    assert sum(limits) == pytest.approx(0.75 * steps / LIFE / 2, rel=0.05)
