"""Variants are changed beside the training: right at every step, and at boundaries only."""

import copy
import random
import threading
import time

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ctrlcompile as cc
from ctrlcompile import respecialize, variants
from ctrlcompile.variants import BLOCK_SPARSE, DENSE

from ..small_models import MLP, assert_like_plain, masked_entries, prune_

pytestmark = pytest.mark.usefixtures("one_thread")


def step(run, optimizer, *inputs):
    optimizer.zero_grad()
    run(*inputs).square().mean().backward()
    optimizer.step()


def in_force(model):
    return [respecialize.in_force(gate) for gate in cc.gates(model).values()]


def assert_exact(model, run, x):
    """Output and gradients of a training step are those of the masked model in float64."""
    gates, exact = list(cc.gates(model).values()), copy.deepcopy(model).double()
    results = []
    for layers, call, leaf in ((model, run, x.clone()), (exact, exact, x.double())):
        leaf.requires_grad_()
        y = call(leaf)
        wanted = [leaf, layers.fc1.weight, layers.fc2.weight]
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
        if number >= 2:
            gone = masked_entries(gates[number - 2])
            assert not ours[gone].any()
            theirs = theirs.masked_fill(gone, 0)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def train_restlessly(model, run, steps, seen):
    """Flips masks at random and checks against float64 at random steps; fills in which variants served."""
    optimizer, gates = torch.optim.SGD(model.parameters(), 1e-3), list(cc.gates(model).values())
    for number in range(steps):
        x = torch.randn(random.choice((16, 16, 24)), model.fc1.in_features)
        before = in_force(model)
        if number % 25 == 0:
            assert_exact(model, run, x)
            with torch.no_grad():
                torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        run(x).square().mean().backward()
        assert in_force(model) == before
        optimizer.step()
        seen |= {(role, name) for gate in gates for role, name in respecialize.in_force(gate).items()}
        if random.random() < 0.3:
            prune_([random.choice(gates)])


def test_thousands_of_steps_stay_exact_while_masks_flip_and_variants_are_built_and_swapped(restless):
    model, seen = MLP(48, 72, 40), set()
    cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune", dynamic=True)
    train_restlessly(model, run, 50, seen)
    compiled, started = counters["stats"]["unique_graphs"], time.monotonic()
    for _ in range(4):
        train_restlessly(model, run, 500, seen)
    while len(respecialize._builder.finished) < respecialize._builder.started and time.monotonic() - started < 60:
        train_restlessly(model, run, 50, seen)
    train_restlessly(model, run, 200, seen)
    assert counters["stats"]["unique_graphs"] == compiled
    for role in ("forward", "dgrad"):
        assert {"block-sparse", "dense", "compact", "coarse 16x16"} <= {name for of, name in seen if of == role}
    assert {name for of, name in seen if of == "wgrad"} == {"block-sparse", "dense"}


class Left(MLP):
    def forward(self, x):
        return super().forward(x)


class Right(MLP):
    def forward(self, x):
        return super().forward(x)


def test_two_threads_train_two_models_while_their_variants_change(restless):
    models = [Left(48, 72, 40), Right(48, 72, 40)]  # of a code of their own: Dynamo's guards do not bear two threads
    for model in models:
        cc.gates(model, 8)
    runs = [torch.compile(model, backend="ctrlprune", dynamic=True) for model in models]
    for model, run in zip(models, runs, strict=True):
        train_restlessly(model, run, 2, set())
    raised, seen = [], set()

    def work(model, run):
        torch.set_num_threads(1)
        try:
            train_restlessly(model, run, 300, seen)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, runs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert len({name for _, name in seen}) > 1


class Checkpointed(MLP):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_recomputation_runs_by_the_variant_of_its_forward(restless):
    model = Checkpointed(40, 72, 40)
    optimizer, gates = torch.optim.SGD(model.parameters(), 1e-3), cc.gates(model, 8)
    run = torch.compile(model, backend="ctrlprune")
    used = set()
    for number in range(60):
        for gate in gates.values():
            variants.open_table(gate).nodes["forward"].calls.clear()
        optimizer.zero_grad()
        run(torch.randn(16, 40)).square().mean().backward()
        for gate in gates.values():
            calls = [call.variant for call in variants.open_table(gate).nodes["forward"].calls]
            assert len(calls) in (1, 2)
            assert len(set(calls)) == 1
            used |= set(calls)
        optimizer.step()
        if number % 10 == 0:
            assert_like_plain(run, model, torch.randn(16, 40))
            prune_(gates.values())
    assert DENSE in used
    assert BLOCK_SPARSE in used


def test_evaluation_between_steps_agrees_and_changes_nothing(restless):
    model = MLP(48, 72, 40)
    gates = cc.gates(model, 8)
    run, optimizer = torch.compile(model, backend="ctrlprune"), torch.optim.AdamW(model.parameters())
    for _ in range(40):
        step(run, optimizer, torch.randn(16, 48))
        before = in_force(model)
        model.eval()
        with torch.no_grad():
            x = torch.randn(64, 48)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
        model.train()
        assert in_force(model) == before
        prune_(gates.values())


def test_explain_shows_the_variant_in_force_and_the_models_error(restless):
    model = MLP(48, 72, 40)
    gates = cc.gates(model, 8)
    run, optimizer = torch.compile(model, backend="ctrlprune"), torch.optim.AdamW(model.parameters())
    for _ in range(20):
        step(run, optimizer, torch.randn(16, 48))
    gate = gates["fc1.weight"]
    variants.open_table(gate).nodes["forward"].variant = DENSE
    explanation = cc.explain(run)(torch.randn(16, 48))
    row = next(row for row in explanation if row.name == "fc1.weight")
    assert row.variants == respecialize.in_force(gate)
    assert "forward dense" in str(explanation)
    assert explanation.model_error == respecialize.model_error()


def test_masks_set_by_hand_need_no_controller(eager, monkeypatch):
    model = MLP(48, 72, 40)
    cc.gates(model, 8)
    run, optimizer = torch.compile(model, backend="ctrlprune"), torch.optim.SGD(model.parameters(), 1e-3)
    monkeypatch.setattr(respecialize._At, "_predict", lambda self, variant: 2 - (variant == DENSE))
    monkeypatch.setattr(respecialize, "_rate", lambda call: 2 - (call.variant == DENSE))
    for _ in range(12):
        step(run, optimizer, torch.randn(16, 48))
    first, second = in_force(model)
    assert (first["forward"], second["forward"], second["dgrad"]) == ("dense",) * 3
    assert first["dgrad"] == "block-sparse"  # never called: nobody asks for the gradient of the model's input
