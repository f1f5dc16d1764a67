"""Probes: whose turn it is, what they may cost, and that gates probe what was planned and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.controller.budget import Ledger
from ctrlcompile.controller.layout import Layout
from ctrlcompile.controller.probes import RATE, WGRAD, Prober, Probes, Rotation

from .plant import FakeGate


def two_gates():
    return [FakeGate("0", (80, 80), (8, 8)), FakeGate("1", (96, 50), (8, 8))]


LAYOUT = Layout.of(two_gates())
N = LAYOUT.gate_of.numel()


def test_every_inactive_block_is_probed_once_before_any_is_probed_twice():
    rotation = Rotation.of(LAYOUT)
    active = torch.rand(N) < 0.5
    seen = torch.zeros(N, dtype=torch.int64)
    while seen.sum() < int((~active).sum()) * 3:
        for probes in rotation.next(active, [0.006, 0.004], LAYOUT, steps=4, afford=1.0, unspent=0.0, capacity=[2, 2]):
            seen[probes.ids] += 1
    assert not seen[active].any()
    for gate in (0, 1):
        turns = seen[~active & (LAYOUT.gate_of == gate)]
        assert turns.max() - turns.min() <= 1


@settings(deadline=None, max_examples=25)
@given(afford=st.floats(0.0, 0.01), steps=st.integers(1, 50), capacity=st.integers(1, 4))
def test_probes_cost_no_more_than_they_may_and_fit_the_gates(afford, steps, capacity):
    rotation, active = Rotation.of(LAYOUT), torch.zeros(N, dtype=torch.bool)
    total = 0.0
    rounds = 100 // steps + 1
    for _ in range(rounds):
        turns = rotation.next(
            active, [0.006, 0.0057], LAYOUT, steps=steps, afford=afford, unspent=0.0, capacity=[capacity] * 2
        )
        assert len(turns) == steps
        for probes in turns:
            assert max(probes.counts) <= capacity
            assert torch.bincount(LAYOUT.gate_of[probes.ids], minlength=2).tolist() == probes.counts
            total += 0.5 * (0.006 * probes.counts[0] + 0.0057 * probes.counts[1])
    assert total <= afford * rounds * steps * (1 + 1e-6)
    assert total <= RATE * 0.5 * (100 * 0.006 + 84 * 0.0057) * rounds * steps * (1 + 1e-6)


@settings(deadline=None, max_examples=25)
@given(unspent=st.floats(0.02, 0.5), steps=st.integers(1, 10), share=st.floats(0.1, 0.9))
def test_where_blocks_are_missing_twice_as_many_are_probed_until_the_next_decision(unspent, steps, share):
    active = torch.rand(N) < share
    cost = [0.6 / 100, 0.4 / 91]
    turns = Rotation.of(LAYOUT).next(active, cost, LAYOUT, steps=steps, afford=0.0, unspent=unspent, capacity=[100] * 2)
    probed = torch.cat([probes.ids for probes in turns])
    assert probed.unique().numel() == probed.numel()
    inactive = float(torch.tensor(cost)[LAYOUT.gate_of[~active]].sum())
    due = min(inactive, max(2 * unspent, min(RATE * inactive, 2 * unspent) * steps))
    assert float(torch.tensor(cost)[LAYOUT.gate_of[probed]].sum()) == pytest.approx(due, abs=1.01 * sum(cost))
    assert WGRAD * due / steps <= unspent * (1 + 1e-6)


def probing(gates):
    """A prober that has planned four steps of these gates, half of whose blocks are off, and handed out the first."""
    for gate in gates:
        gate.update_(torch.arange(gate.mask.numel()).view(gate.grid) % 2 == 0)
    prober = Prober(gates, LAYOUT)
    ledger = Ledger()
    ledger.add(dense=1.0, fixed=0.0, used=0.5, gated=[0.6, 0.4])
    active = torch.cat([gate.mask.flatten() for gate in gates])
    prober.plan(active, ledger, steps=4, wanted=0.5, unspent=1.0)
    prober.hand_out()
    return prober


def test_gates_probe_what_was_planned_step_by_step():
    gates = two_gates()
    prober = probing(gates)
    planned = [prober.current, *prober.coming]
    assert sum(probes.ids.numel() for probes in planned) > 2
    for number, probes in enumerate(planned):
        if number:
            prober.hand_out()
        found = torch.cat([gate.probed().flatten() for gate in gates])
        assert torch.equal(found.nonzero().flatten(), probes.ids.sort().values)
    prober.hand_out()
    assert not any(gate.probed().any() for gate in gates)


def test_gates_may_all_probe_as_much_as_they_have_room_for():
    gates = two_gates()
    for gate in gates:
        gate.update_(torch.zeros(gate.grid, dtype=torch.bool))
    prober = Prober(gates, LAYOUT)
    counts = [gate.probes.numel() for gate in gates]
    chosen = [torch.randperm(gate.mask.numel())[:count] for gate, count in zip(gates, counts, strict=True)]
    prober.coming = [Probes(torch.cat([chosen[0], chosen[1] + LAYOUT.offsets[1]]), counts)]
    prober.hand_out()
    for gate, ids in zip(gates, chosen, strict=True):
        assert gate.probes.tolist() == ids.tolist()


def test_once_stopped_no_gate_probes_also_where_the_mask_of_another_was_switched():
    gates = two_gates()
    prober = probing(gates)
    assert all(gate.probed().any() for gate in gates)
    gates[0].update_(torch.ones(gates[0].grid, dtype=torch.bool))
    prober.stop()
    assert not any(gate.probed().any() for gate in gates)
    assert prober.current.ids.numel() == 0
