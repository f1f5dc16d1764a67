"""Signals: what arrives is averaged as promised, and what is not finite is ignored."""

import math

import pytest
import torch

from ctrlcompile.controller.layout import Layout
from ctrlcompile.controller.signals import FAST, SLOW, Inbox, Signals

from .plant import FakeGate

HORIZONS = (5.0, 20.0)


class Listener:
    """Two gates, their signals, and one fold per step."""

    def __init__(self):
        self.gates = [FakeGate("a", (40, 40), (8, 8)), FakeGate("b", (24, 50), (8, 8))]
        self.layout = Layout.of(self.gates)
        self.inbox = Inbox(self.gates, self.layout)
        self.signals = Signals.of(self.layout, HORIZONS)
        self.active = torch.ones(self.layout.offsets[-1], dtype=torch.bool)

    def hear(self, arrived, probes=(), ran=(True, True), fold=True):
        for gate, part in zip(self.gates, arrived.split([25, 21], 1), strict=True):
            gate.signals.grad.add_(part.view(2, *gate.grid))
        self.signals.observe(
            self.inbox.collect(), torch.tensor(probes, dtype=torch.int64), torch.tensor(ran), self.layout
        )
        if fold:
            self.signals.fold(self.active, self.layout)


def random_signals():
    return torch.stack((torch.randn(46), torch.rand(46)))


def test_what_autograd_accumulates_into_the_gates_arrives_in_one_buffer():
    listener = Listener()
    weights = [torch.randn(2, *gate.grid) for gate in listener.gates]
    for _ in range(2):
        sum((gate.signals * w).sum() for gate, w in zip(listener.gates, weights, strict=True)).backward()
    expected = 2 * torch.cat([w.flatten(1) for w in weights], 1)
    assert torch.allclose(listener.inbox.collect(), expected)
    assert not any(gate.signals.grad.any() for gate in listener.gates)


def test_a_gradient_that_someone_replaced_or_dropped_is_met_with_the_buffer_again():
    listener = Listener()
    replaced, dropped = listener.gates
    replaced.signals.grad = torch.ones(2, *replaced.grid)
    dropped.signals.grad = None
    arrived = listener.inbox.collect()
    assert arrived[:, :25].eq(1).all()
    replaced.signals.sum().backward()
    dropped.signals.sum().backward()
    assert listener.inbox.collect().eq(1).all()


def test_the_average_is_the_debiased_exponential_one_over_both_horizons():
    listener = Listener()
    steps = [random_signals() for _ in range(30)]
    for arrived in steps:
        listener.hear(arrived)
    for row, horizon in ((FAST, 5.0), (SLOW, 20.0)):
        weights = torch.tensor([(1 - 1 / horizon) ** (29 - i) for i in range(30)], dtype=torch.float64)
        values = torch.stack([arrived[0].abs().double() for arrived in steps])
        expected = (weights[:, None] * values).sum(0) / weights.sum()
        assert torch.allclose(listener.signals.contribution(row).double(), expected, rtol=1e-5)


def test_folding_seldom_gives_the_average_of_the_steps_in_between():
    often, seldom = Listener(), Listener()
    for step in range(60):
        arrived = random_signals()
        often.hear(arrived)
        seldom.hear(arrived, fold=step % 5 == 4)
    a, b = (listener.signals.contribution(SLOW) for listener in (often, seldom))
    assert torch.allclose(a, b, rtol=0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_a_step_that_is_not_finite_leaves_no_trace(bad, row):
    heard, spoiled = Listener(), Listener()
    for listener in (heard, spoiled):
        listener.active[3:7] = False
    for step in range(12):
        arrived = random_signals()
        heard.hear(arrived, probes=(3, 5))
        spoiled.hear(arrived, probes=(3, 5))
        if step in (0, 4, 11):
            arrived[row, (3, 30, 45)[step % 3]] = bad
            spoiled.hear(arrived, probes=(3, 5))
    for a, b in zip(vars(heard.signals).values(), vars(spoiled.signals).values(), strict=True):
        assert torch.equal(a, b)


def test_a_gate_that_had_no_part_in_a_step_keeps_its_averages():
    listener = Listener()
    listener.hear(random_signals())
    before = listener.signals.contribution(SLOW).clone()
    arrived = random_signals()
    arrived[:, 25:] = 0
    listener.hear(arrived, ran=(True, False))
    after = listener.signals.contribution(SLOW)
    assert torch.equal(after[25:], before[25:])
    assert not torch.equal(after[:25], before[:25])


def test_a_probed_block_is_expected_to_be_worth_what_an_active_one_of_its_gradient_is():
    listener = Listener()
    listener.active[10] = False
    for step in range(200):
        scale = math.exp(-step / 100)  # gradients shrink, and the probe is long ago at the end
        contribution = torch.full((46,), 0.5 * scale)
        square = torch.full((46,), (2 * scale) ** 2)
        contribution[10], square[10] = 0, (6 * scale) ** 2 if step == 100 else 0
        listener.hear(torch.stack((contribution, square)), probes=(10,) if step == 100 else ())
    benefit = listener.signals.benefit(listener.active, listener.layout)
    assert benefit[10] / benefit[0] == pytest.approx(3, rel=0.1)


def test_an_inactive_block_that_was_never_probed_is_worth_nothing():
    listener = Listener()
    for _ in range(5):
        listener.hear(random_signals())
    listener.active[4] = False
    listener.signals.forget_(~listener.active)
    listener.hear(random_signals() * listener.active)
    assert listener.signals.benefit(listener.active, listener.layout)[4] == 0


def test_a_ranking_is_settled_when_it_stays_and_not_when_it_is_noise():
    cost = torch.full((46,), 1 / 46, dtype=torch.float64)
    steady, noise = Listener(), Listener()
    useful = torch.rand(46) + 0.1
    for _ in range(100):
        steady.hear(torch.stack((useful, useful)))
        noise.hear(torch.stack((torch.rand(46) ** 8, useful)))
    assert steady.signals.settled(steady.active, cost, 0.4) > 0.95
    assert noise.signals.settled(noise.active, cost, 0.4) < 0.8


def test_two_averages_of_the_same_few_steps_do_not_count_as_settled():
    listener = Listener()
    listener.hear(random_signals())
    cost = torch.full((46,), 1 / 46, dtype=torch.float64)
    assert listener.signals.settled(listener.active, cost, 0.4) < 0.1


def test_contributions_that_are_presumed_share_out_the_measured_ones_by_weight_and_gradient():
    listener = Listener()
    arrived = random_signals()
    presumed = torch.zeros(46)
    presumed[25:] = torch.rand(21) + 0.1
    presumed[30] = math.inf  # of a weight that has overflown: taken as measured
    listener.active[28] = False
    listener.hear(arrived.clone(), fold=False)
    listener.signals.fold(listener.active, listener.layout, presumed)
    measured, found = arrived[0].abs() * listener.active, listener.signals.contribution(SLOW)
    assert torch.allclose(found[:25], measured[:25])
    assert found[30] == pytest.approx(float(measured[30]))
    shares = presumed * arrived[1].sqrt() * listener.active
    chosen = torch.tensor([block for block in range(25, 46) if block != 30])
    assert torch.allclose(found[chosen], shares[chosen] / shares[chosen].sum() * measured[chosen].sum())
