"""Resuming: exact, and refused where it is of another run."""

import copy
import io
import random

import pytest
import torch

from ctrlcompile.controller import Controller

from .plant import Plant

SHAPES = [(96, 96), (64, 100), (96, 96)]


def make(seed, budget=0.35, steps=220, shapes=SHAPES, **kwargs):
    plant = Plant(shapes, seed=seed, noise=1.0)
    plant.gates["layer1"].normalised = True
    return plant, Controller(plant.gates, plant.meter, budget, steps, **kwargs)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("steps", [220, None])
def test_a_resumed_run_makes_the_same_decisions_bit_for_bit(steps):
    for _ in range(3):
        seed, cut = random.randrange(2**31), random.randrange(1, 215)
        plant, controller = make(seed, steps=steps)
        for _ in range(cut):
            plant.train_step()
            controller.step(1.5)
        state = through_a_file(controller.state_dict())
        masks = {name: gate.mask for name, gate in plant.gates.items()}

        resumed_plant, resumed = make(seed, steps=steps)
        for name, gate in resumed_plant.gates.items():
            gate.update_(masks[name] ^ (torch.rand(gate.grid) < 0.1))
        resumed.load_state_dict(state)
        resumed_plant.generator.set_state(plant.generator.get_state())
        resumed_plant.step = plant.step
        assert all(torch.equal(resumed_plant.gates[n].probes, g.probes) for n, g in plant.gates.items())
        for p, c in ((plant, controller), (resumed_plant, resumed)):
            for _ in range(220 - cut):
                p.train_step()
                c.step(1.5)
        assert same(resumed.state_dict(), controller.state_dict()), f"seed {seed}, saved at step {cut}"
        assert all(torch.equal(resumed_plant.gates[n].mask, g.mask) for n, g in plant.gates.items())


def test_a_state_shares_nothing_with_the_run_that_goes_on():
    plant, controller = make(3)
    for _ in range(50):
        plant.train_step()
        controller.step()
    state = controller.state_dict()
    before = copy.deepcopy(state)
    for _ in range(50):
        plant.train_step()
        controller.step()
    assert same(state, before)


def probes_of(state, first=0, last=0):
    """Probes of the blocks from 0 on, said to be so many of the first gate and of the last."""
    return [torch.arange(first + last), [first, *[0] * (len(state["gates"]) - 2), last]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(version=99), "version 99"),
        (lambda s: (s.update(version=1), s.pop("exchange")), "version 1"),
        (lambda s: s.update(total_steps=221), "total_steps=221"),
        (lambda s: s.update(budget=0.5), "budget=0.5"),
        (lambda s: s.update(interval=7), "interval=7"),
        (lambda s: s["gates"].pop("layer1"), "layer1"),
        (lambda s: s["gates"]["layer1"].update(block=[16, 8]), r"block of gate 'layer1' is \(16, 8\)"),
        (lambda s: s.pop("ramp"), "ramp missing"),
        (lambda s: s["tensors"].update(order=torch.zeros(3)), "'order' is damaged"),
        (lambda s: s.update(probes=probes_of(s, first=30)), "'probes' or 'probing'"),  # more than there is room for
        (lambda s: s["probing"].append(probes_of(s, last=1)), "'probes' or 'probing'"),  # a block of another gate
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(damage, message):
    plant, controller = make(4)
    for _ in range(80):
        plant.train_step()
        controller.step()
    state = controller.state_dict()
    damage(state)
    other_plant, other = make(5)
    for _ in range(30):
        other_plant.train_step()
        other.step()
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert same(other.state_dict(), before)
