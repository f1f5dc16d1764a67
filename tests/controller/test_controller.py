"""The whole loop on a simulated model: it lands, resumes, survives, and brings blocks back."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlcompile.controller import Budget, BudgetError, Controller, StepCost, decide
from ctrlcompile.controller.decide import EVEN

from .plant import FakeGate, Net, Plant

SHAPES = [(96, 96), (96, 96), (128, 72), (100, 60)]


def share(controller):
    return controller.flops_used / controller.flops_dense


def run(plant, controller, steps, rows=lambda: 1.0):
    for _ in range(steps):
        plant.train_step(rows())
        controller.step()


def fresh_seed():
    return random.randrange(2**31)


@settings(max_examples=15, deadline=None)
@given(
    budget=st.floats(0.12, 0.95),
    steps=st.integers(40, 250),
    fixed=st.floats(0.0, 0.06),
    noise=st.floats(0.0, 1.5),
    spread=st.floats(0.0, 2.0),
    seed=st.integers(0, 2**31),
    normalised=st.integers(0, 4),
)
def test_a_run_of_any_length_lands_within_one_per_cent_of_its_budget(
    budget, steps, fixed, noise, spread, seed, normalised
):
    plant = Plant(SHAPES, fixed_share=fixed, noise=noise, spread=spread, seed=seed)
    for gate in list(plant.gates.values())[:normalised]:
        gate.normalised = True
    controller = Controller(plant.gates, plant.meter, budget, steps)
    run(plant, controller, steps)
    assert share(controller) == pytest.approx(budget, rel=0.01)
    assert controller.budget_used == pytest.approx(1, rel=0.01)


@settings(max_examples=10, deadline=None)
@given(budget=st.floats(0.4, 0.8), steps=st.integers(30, 60), seed=st.integers(0, 2**31))
def test_what_attention_saves_when_heads_die_is_spent_on_other_blocks_in_a_short_run(budget, steps, seed):
    plant = Plant(SHAPES, fixed_share=0.3, seed=seed)
    controller = Controller(plant.gates, plant.meter, budget, steps)
    for _ in range(steps):
        plant.meter.spared = plant.meter.fixed * (1 - controller.density**4)
        run(plant, controller, 1)
    assert share(controller) == pytest.approx(budget, rel=0.01)


def test_a_long_run_lands_within_a_fifth_of_a_per_cent():
    for budget in (0.1, 0.25, 0.4, 0.9):
        plant = Plant(SHAPES, fixed_share=0.05, seed=fresh_seed())
        controller = Controller(plant.gates, plant.meter, budget, 500)
        run(plant, controller, 500)
        assert share(controller) == pytest.approx(budget, rel=0.002)


def test_a_run_whose_batch_size_varies_and_then_doubles_still_lands():
    rng = random.Random(fresh_seed())
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 600)
    run(plant, controller, 300, lambda: rng.uniform(0.5, 1.5))
    run(plant, controller, 300, lambda: 2 * rng.uniform(0.5, 1.5))
    assert share(controller) == pytest.approx(0.4, rel=0.01)


def test_probes_are_made_and_stay_within_one_per_cent_of_the_flops():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 300)
    probing = used = 0.0
    for _ in range(300):
        plant.train_step()
        cost = plant.meter()
        active = cost.fixed + sum(flops * gate.active_area for gate, flops in cost.gated.items())
        probing, used = probing + cost.used - active, used + cost.used
        controller.step()
    assert 0 < probing < 0.01 * used


def test_budget_one_never_switches_a_block_off():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 1.0, 150)
    run(plant, controller, 150)
    assert controller.density == pytest.approx(1)
    assert all(gate.mask.all() for gate in plant.gates.values())


def test_the_start_is_dense_and_the_end_is_not_starved():
    plant = Plant(SHAPES, fixed_share=0.06, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 500)
    run(plant, controller, 500)
    density = {record["step"]: record["density"] for record in controller.history}
    assert all(value == pytest.approx(1) for step, value in density.items() if step < 15)
    assert all(value < 0.45 for step, value in density.items() if step > 190)
    assert min(density.values()) > 0.7 * (0.4 - 0.06) / 0.94


def test_the_most_useful_blocks_are_the_ones_that_stay():
    plant = Plant(SHAPES, noise=0.5, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.3, 400)
    run(plant, controller, 400)
    masks = torch.cat([gate.mask.flatten() for gate in plant.gates.values()])
    useful = torch.cat([u.flatten() for u in plant.useful])
    best = torch.zeros_like(masks)
    best[useful.topk(int(masks.sum())).indices] = True
    assert (masks & best).sum() / best.sum() > 0.85


@pytest.mark.parametrize("normalised", [True, False])
def test_a_gate_of_little_worth_is_not_emptied_for_the_others(normalised):
    plant = Plant(SHAPES, spread=0.1, noise=0.2, seed=fresh_seed())
    for gate in plant.gates.values():
        gate.normalised = normalised
    plant.useful[0] *= 0.3 if normalised else 0.01
    controller = Controller(plant.gates, plant.meter, 0.4, 300)
    run(plant, controller, 300)
    first, *others = plant.gates.values()
    if normalised:
        assert 0.15 < first.density / max(gate.density for gate in others) < 0.6
    else:
        assert first.density == pytest.approx(EVEN * controller.density, abs=2 / first.mask.numel())


def test_a_budget_near_the_least_is_met_though_small_gates_cannot_thin_out():
    shapes = [(16, 16)] * 20 + [(96, 96)]  # 2 x 2 blocks each, which keep one
    plant = Plant(shapes, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.2, 1000)
    run(plant, controller, 1000)
    assert share(controller) == pytest.approx(0.2, rel=0.01)


def test_every_gate_keeps_a_few_blocks_however_useless(monkeypatch):
    monkeypatch.setattr("ctrlcompile.controller.decide.EVEN", 0.0)
    plant = Plant(SHAPES, seed=fresh_seed())
    plant.useful[1] *= 1e-6
    controller = Controller(plant.gates, plant.meter, 0.3, 300)
    run(plant, controller, 300)
    assert min(gate.density for gate in plant.gates.values()) >= 0.02


def test_a_gate_that_reports_nothing_is_left_alone_and_the_run_lands():
    plant = Plant(SHAPES, seed=fresh_seed())
    silent = plant.gates["layer1"]
    silent.report = lambda *_: None
    controller = Controller(plant.gates, plant.meter, 0.46, 300)
    run(plant, controller, 300)
    assert silent.mask.all()
    assert share(controller) == pytest.approx(0.46, rel=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bursts_of_non_finite_signals_leave_the_landing_and_most_of_the_mask_alone(bad):
    seed = fresh_seed()

    def masks(burst):
        plant = Plant(SHAPES, seed=seed)
        controller = Controller(plant.gates, plant.meter, 0.4, 300)
        for step in range(300):
            spoil = (lambda signals: signals.view(-1)[3:5].fill_(bad)) if burst and step in (20, 21, 60, 200) else None
            plant.train_step(spoil=spoil)
            controller.step()
        assert share(controller) == pytest.approx(0.4, rel=0.01)
        assert all(math.isfinite(record["price"]) for record in controller.history)
        return torch.cat([gate.mask.flatten() for gate in plant.gates.values()])

    clean, burst = masks(False), masks(True)
    assert (clean & burst).sum() / clean.sum() > 0.75


def test_blocks_do_not_chatter_under_heavy_noise():
    plant = Plant(SHAPES, noise=2.0, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 600)
    run(plant, controller, 600)
    switches = torch.cat([gate.switches.flatten() for gate in plant.gates.values()])
    assert switches.max() <= 9
    assert switches.float().mean() < 1.5


def test_blocks_come_back_when_the_task_turns_to_them(monkeypatch):
    monkeypatch.setattr(decide, "LIFE", 100)
    net = Net([64, 128, 32], lr=0.005)
    controller = Controller(net.gates, net.meter, 0.3, 800)
    target = torch.randn(32, 64) / 5
    first = net.gates["fc0"]

    def train(steps, silent):
        for _ in range(steps):
            x = torch.randn(64, 64)
            x[:, silent] = 0
            loss = net.train_step(x, x @ target.t())
            controller.step(loss)
        return loss

    def density(inputs):
        return float(first.mask[:, inputs.start // 8 : inputs.stop // 8].float().mean())

    before, after = slice(16, 40), slice(40, 64)  # the rest is heard throughout
    train(250, silent=after)
    assert density(after) < 0.1 < density(before)
    start = train(1, silent=before)
    end = train(349, silent=before)
    assert density(after) > 2 * density(before)
    assert end < 0.8 * start


@pytest.mark.parametrize("budget", [0.15, 0.5])
def test_a_real_network_lands_and_learns(budget):
    net = Net([48, 96, 96, 24])
    teacher = torch.randn(24, 48) / 7
    controller = Controller(net.gates, net.meter, budget, 300)
    losses = []
    for _ in range(300):
        x = torch.randn(64, 48)
        losses.append(net.train_step(x, x @ teacher.t()))
        controller.step(losses[-1])
    assert share(controller) == pytest.approx(budget, rel=0.01)
    assert losses[-1] < 0.75 * losses[0]


def test_without_total_steps_the_rate_is_held_and_the_dense_start_is_not_paid_back():
    plant = Plant(SHAPES, fixed_share=0.05, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4)
    run(plant, controller, 500)
    used, dense = controller.flops_used, controller.flops_dense
    run(plant, controller, 400)
    assert (controller.flops_used - used) / (controller.flops_dense - dense) == pytest.approx(0.4, rel=0.01)
    assert used / dense > 0.41


def test_past_the_last_step_the_density_holds(caplog):
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 100)
    run(plant, controller, 100)
    masks = [gate.mask for gate in plant.gates.values()]
    with caplog.at_level("INFO"):
        run(plant, controller, 5)
    assert all(torch.equal(a, gate.mask) for a, gate in zip(masks, plant.gates.values(), strict=True))
    assert len([r for r in caplog.records if "past total_steps" in r.message]) == 1


def test_blocks_switched_by_the_user_are_taken_as_they_are():
    plant = Plant(SHAPES, seed=fresh_seed())
    mask = torch.rand(plant.gates["layer0"].grid) < 0.5
    plant.gates["layer0"].update_(mask)
    controller = Controller(plant.gates, plant.meter, 0.4, 300)
    run(plant, controller, 5)
    assert torch.equal(plant.gates["layer0"].mask, mask)
    run(plant, controller, 295)
    assert share(controller) == pytest.approx(0.4, rel=0.01)


def test_blocks_switched_by_the_user_in_the_middle_of_a_run_do_no_harm():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 300)
    run(plant, controller, 150)
    for gate in plant.gates.values():
        gate.update_(torch.rand(gate.grid) < 0.6)
    run(plant, controller, 150)
    assert share(controller) == pytest.approx(0.4, rel=0.01)


def test_blocks_that_the_user_swaps_one_for_one_are_noticed():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 300)
    run(plant, controller, 150)
    for _ in range(150):
        for gate in plant.gates.values():
            gate.update_(gate.mask.flatten()[torch.randperm(gate.mask.numel())].view(gate.grid))
        run(plant, controller, 1)
        assert all(not (gate.probed() & gate.mask).any() for gate in plant.gates.values())
    assert share(controller) == pytest.approx(0.4, rel=0.01)


def test_what_a_thin_model_leaves_unspent_is_spent_on_finding_blocks_to_bring_back_however_late():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.8, 400)
    run(plant, controller, 320)
    for gate in plant.gates.values():
        gate.update_(torch.arange(gate.mask.numel()).view(gate.grid) % 2 == 0)
    run(plant, controller, 80)
    assert share(controller) == pytest.approx(0.8, rel=0.01)


@pytest.mark.parametrize(("steps", "probes"), [(390, True), (398, False)])
def test_the_last_step_probes_nothing_since_no_decision_would_hear_of_it(steps, probes):
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.8, 400)
    run(plant, controller, steps)
    for gate in plant.gates.values():
        gate.update_(torch.arange(gate.mask.numel()).view(gate.grid) % 2 == 0)
    run(plant, controller, 1)
    assert any(gate.probed().any() for gate in plant.gates.values()) == probes


def test_driven_by_a_hook_a_step_of_the_user_is_not_counted_twice():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 100, driven=True)
    for _ in range(7):
        plant.train_step()
        controller.advance()
        controller.step(torch.tensor(2.5))
    assert controller.steps == 7


def test_a_budget_below_what_cannot_be_gated_is_refused_with_the_least_possible():
    plant = Plant(SHAPES, fixed_share=0.5, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 1000)
    plant.train_step()
    with pytest.raises(BudgetError, match=r"0\.500 of this model's.*least that it can meet is 0\.51"):
        controller.step()


def test_a_run_too_short_for_its_budget_is_refused():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.15, 5)
    plant.train_step()
    with pytest.raises(BudgetError, match=r"and 4 steps are left, .* in a short run, train longer"):
        controller.step()


@pytest.mark.parametrize("spoil", [None, lambda contribution: contribution.fill_(math.inf)])
def test_a_run_that_uses_more_than_its_budget_says_so_early_and_at_its_end(spoil, caplog):
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 60)
    for _ in range(60):
        plant.train_step(spoil=spoil)
        controller.step()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 * (spoil is not None)
    for early, last in [said] if said else []:
        assert early.startswith("after 6 steps no gated weight has had a finite gradient")
        assert last.startswith("step 60, the last: 1.0000 of the dense FLOPs used, more than the budget of 0.4")
        assert "4 of 4 gates never had a finite gradient" in last


def test_the_least_possible_budget_named_in_the_error_is_accepted_and_met():
    plant = Plant(SHAPES, fixed_share=0.5, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, 0.4, 500)
    plant.train_step()
    with pytest.raises(BudgetError) as error:
        controller.step()
    least = float(str(error.value).split("can meet is ")[1][:5])
    plant = Plant(SHAPES, fixed_share=0.5, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, least, 500)
    run(plant, controller, 500)
    assert share(controller) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("steps", [0, -5, 2.5, True, "100"])
def test_a_wrong_number_of_steps_is_refused(steps):
    plant = Plant(SHAPES)
    with pytest.raises((TypeError, ValueError), match=r"total_steps is the number of optimizer steps .*; got"):
        Controller(plant.gates, plant.meter, 0.4, steps)
    with pytest.raises((TypeError, ValueError), match=r"interval is the number of steps between decisions, .*; got"):
        Controller(plant.gates, plant.meter, 0.4, interval=steps)


def test_no_gates_is_refused():
    with pytest.raises(ValueError, match="nothing to control"):
        Controller({}, lambda: StepCost(1.0, 1.0), 0.4)


def test_a_step_that_cost_nothing_is_reported_once(caplog):
    gate = FakeGate("w", (64, 64), (8, 8))
    controller = Controller({"w": gate}, lambda: StepCost(0.0, 0.0), 0.4, 50)
    for _ in range(20):
        controller.step()
    assert len([r for r in caplog.records if "no cost was measured" in r.message]) == 1
    assert gate.mask.all()


def test_the_repr_says_where_the_run_stands():
    plant = Plant(SHAPES, seed=fresh_seed())
    controller = Controller(plant.gates, plant.meter, Budget(flops=0.4), 100)
    run(plant, controller, 50)
    assert "budget=0.4, step 50 of 100, 4 gates" in repr(controller)
