"""When a variant is tried, built and put in force, and what becomes of a build that goes wrong."""

import logging
import random
import time
import warnings

import pytest
import torch
from torch import nn

import ctrlcompile as cc
from ctrlcompile import background, respecialize, variants
from ctrlcompile.inspect.run import read
from ctrlcompile.kernels import cpu_product
from ctrlcompile.kernels.build import KernelBuildError
from ctrlcompile.variant_cost import CostModel
from ctrlcompile.variants import BLOCK_SPARSE, DENSE, Call, Types, Variant

from ..small_models import MLP

pytestmark = pytest.mark.usefixtures("one_thread")


COARSE = Variant("coarse", (2, 2))


def simulated(monkeypatch, seconds, mode="auto", left=10_000, block=8):
    """A gate whose calls take what `seconds(variant, share)` says, and a function that makes it take steps."""
    linear = nn.Linear(96, 96)
    gate = cc.gates(linear, block)["weight"]
    respecialize.adopt(gate, mode)
    table = variants.table_of(gate)

    def steps(count):
        assert linear.weight is gate.weight
        for _ in range(count):
            for node in table.nodes.values():
                node.types, node.family = Types(torch.float32, torch.float32, "none"), "cpu_linear"
                share = table.share(node.variant, gate)
                taken = seconds(node.variant, share) * random.uniform(0.99, 1.01)
                if len(node.calls) < variants.KEPT_CALLS:
                    node.calls.append(Call(node.variant, node.types, 64, 96, 96, share, taken))
                node.count += 1
            respecialize.at_boundary([gate], lambda _: left)

    return gate, steps


def names(gate):
    return {name for role, name in respecialize.in_force(gate).items() if role != "wgrad"}


def wait_for_builds():
    started = time.monotonic()
    while any(not b.done.is_set() for b in respecialize._builder._builds.values()) and time.monotonic() - started < 60:
        time.sleep(0.01)
    assert all(b.done.is_set() for b in respecialize._builder._builds.values())


def faster_dense(variant, share):
    return share * {"block-sparse": 1.0, "dense": 0.7}.get(variant.kind, 2.0)


def test_the_faster_variant_serves_and_leaves_at_the_boundary_where_the_masks_no_longer_suit_it(monkeypatch, caplog):
    gate, steps = simulated(monkeypatch, faster_dense, block=16)
    monkeypatch.setattr(respecialize, "MOST_BUILDS", 0)
    with caplog.at_level(logging.INFO, logger=respecialize.log.name):
        steps(60)
    assert set(respecialize.in_force(gate).values()) == {"dense"}
    assert any("block-sparse -> dense" in text and "in force" in text for text in caplog.messages)
    mask = torch.arange(gate.active).view(gate.grid) % 2 == 0
    gate.update_(mask)
    steps(1)
    assert names(gate) == {"block-sparse"}
    gate.update_(~torch.zeros_like(mask))
    steps(1)
    assert names(gate) == {"dense"}
    assert respecialize.model_error() < 0.05


def test_settled_gates_are_looked_at_rarely_and_in_the_same_steps(monkeypatch):
    looks = []
    take_in = respecialize._At.take_in
    monkeypatch.setattr(respecialize._At, "take_in", lambda self: (looks.append(self.plan), take_in(self))[1])
    monkeypatch.setattr(respecialize, "LEAST_SAVED_S", float("inf"))
    seen = []
    for extra in (0, 7):
        gate, steps = simulated(monkeypatch, lambda variant, share: share)
        at = []
        for step in range(1, 500):
            if step == 31 + extra:
                gate.update_(torch.rand(gate.grid) < 0.5)
            looks.clear()
            steps(1)
            at += [step] if looks else []
        seen.append(at)
    assert seen == [[5, 25, 31, 50, 100, 200, 300, 400], [5, 25, 38, 50, 100, 200, 300, 400]]


def test_a_compact_variant_serves_while_rows_and_columns_are_dead(monkeypatch):
    def seconds(variant, share):
        return share * (1.0 if variant.kind != "compact" else 1.5 if share == 1 else 0.6)

    monkeypatch.setattr(respecialize, "MOST_BUILDS", 0)
    gate, steps = simulated(monkeypatch, seconds)
    steps(60)
    assert names(gate) == {"block-sparse"}
    mask = torch.ones(gate.grid, dtype=torch.bool)
    mask[::2] = False
    gate.update_(mask)
    steps(60)
    assert names(gate) == {"compact"}
    gate.update_(~torch.zeros_like(mask))
    steps(600)  # until measurements outweigh what was measured before
    assert "compact" not in names(gate)


def test_a_coarse_variant_is_built_in_the_background_tried_and_put_in_force(monkeypatch):
    def seconds(variant, share):
        return share * {(1, 1): 1.0, (4, 4): 0.5}.get(variant.merged, 0.9) * (2 if variant == DENSE else 1)

    gate, steps = simulated(monkeypatch, seconds)
    for _ in range(5):
        steps(50)
        wait_for_builds()
    assert names(gate) == {"coarse 32x32"}


def test_calls_of_other_types_do_not_keep_a_nodes_own_from_being_timed(monkeypatch):
    monkeypatch.setattr(respecialize, "MOST_BUILDS", 0)
    gate, steps = simulated(monkeypatch, faster_dense)
    other = Types(torch.float64, torch.float32, "none")
    for node in variants.table_of(gate).nodes.values():
        node.calls.extend([Call(BLOCK_SPARSE, other, 64, 96, 96, 1.0, 1.0)] * variants.KEPT_CALLS)
    steps(100)
    assert names(gate) == {"dense"}


def test_what_is_slower_when_tried_does_not_stay_and_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(respecialize, "MOST_BUILDS", 0)
    gate, steps = simulated(monkeypatch, lambda variant, share: share * (1.0 if variant == BLOCK_SPARSE else 1.2))
    tried = []
    begin = respecialize._At.begin
    monkeypatch.setattr(respecialize._At, "begin", lambda self, c: (tried.append(self.role), begin(self, c)))
    steps(400)
    assert sorted(tried) == ["dgrad", "forward", "wgrad"]
    assert set(respecialize.in_force(gate).values()) == {"block-sparse"}


def test_nothing_is_tried_that_the_remaining_steps_do_not_pay_back(monkeypatch):
    for left, tries in ((0, False), (1, False), (10_000, True)):
        gate, steps = simulated(monkeypatch, lambda variant, share: 1e-3 * faster_dense(variant, share), left=left)
        monkeypatch.setattr(respecialize, "_model", CostModel())
        steps(100)
        assert (respecialize._plans[gate].courses["forward"].own.keys() > {BLOCK_SPARSE}) is tries


@pytest.mark.parametrize("one_line", [True, False])
def test_each_change_is_in_the_runs_log_as_it_is_in_the_logger(one_line, monkeypatch, eager, caplog, tmp_path):
    model = MLP(48, 72, 40)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    asked = {"budget": 0.5, "total_steps": 60, "log": str(tmp_path)}
    controller = None if one_line else cc.Controller(model, optimizer=optimizer, block=8, **asked)
    run = torch.compile(model, backend="ctrlprune", options={"block": 8, **(asked if one_line else {})})
    monkeypatch.setattr(respecialize, "MOST_BUILDS", 0)
    monkeypatch.setattr(respecialize._At, "_predict", lambda self, variant: random.random())
    said = []
    with caplog.at_level(logging.INFO, logger=respecialize.log.name):
        for number in range(60):
            x = torch.randn(16, 48)
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
            controller = controller or cc.controller_of(optimizer)
            said += [(number + 1, text) for text in caplog.messages]
            caplog.clear()
            if not one_line:
                controller.step()
    logged = read(tmp_path).respecialised
    assert [(became.step, f"{became.gate} {became.outcome}") for became in logged] == said
    assert len(said) > 5
    served = {(became.gate, became.outcome.role): became.outcome for became in logged}
    for name, gate in cc.gates(model).items():
        for role in variants.ROLES:
            if (last := served.get((name, role))) is not None and respecialize._plans[gate].courses[role].trial is None:
                now = last.proposed if last.in_force else last.current
                assert respecialize.in_force(gate)[role] == now


def test_never_leaves_calls_alone(monkeypatch):
    linear = nn.Linear(96, 96)
    gate = cc.gates(linear, 8)["weight"]
    respecialize.adopt(gate, "never")
    assert variants.table_of(gate) is None
    assert respecialize.in_force(gate) == dict.fromkeys(("forward", "dgrad", "wgrad"), "block-sparse")


def test_a_callable_is_asked_and_a_no_is_final_until_the_masks_change(monkeypatch):
    asked = []

    def decide(proposal):
        asked.append(proposal)
        return False

    gate, steps = simulated(monkeypatch, faster_dense, mode=decide)
    steps(25)
    first = list(asked)
    assert {(p.node, p.current) for p in first} == {
        ("weight forward", "block-sparse"),
        ("weight dgrad", "block-sparse"),
        ("weight wgrad", "block-sparse"),
    }
    assert all(0 < p.gain < 1 and p.saved_s > 0 <= p.cost_s for p in first)
    steps(300)
    assert names(gate) == {"block-sparse"}
    proposed = [(p.node, p.proposed) for p in asked]
    assert len(proposed) == len(set(proposed))
    asked.clear()
    gate.update_(torch.rand(gate.grid) < 2)
    steps(1)
    assert asked


# Builds that go wrong -----------------------------------------------------------------------------------------------

COMPILERS = {
    "fails": "echo 'x.cpp: error: no' >&2; exit 1",
    "hangs": "sleep 1000 & wait",
    "is killed": "kill -9 $$",
}


@pytest.mark.parametrize("what", COMPILERS)
def test_a_build_that_goes_wrong_leaves_what_is_in_force_with_one_warning(what, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo {what}\n{COMPILERS[what]}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(background, "TIMEOUT_S", 0.02)
    ways = {"forward": [BLOCK_SPARSE, COARSE], "dgrad": [BLOCK_SPARSE, COARSE], "wgrad": [BLOCK_SPARSE]}
    monkeypatch.setattr(respecialize.variants, "candidates", lambda gate, role, groups: ways[role])
    gate, steps = simulated(monkeypatch, lambda variant, share: share, block=24)
    monkeypatch.setenv("CXX", str(compiler))
    cpu_product._rows_library.cache_clear()
    steps(respecialize.FIRST_LOOK)
    assert respecialize._builder.started == 1
    wait_for_builds()
    told = []
    boundary = respecialize.at_boundary
    monkeypatch.setattr(respecialize, "at_boundary", lambda *args: told.extend(boundary(*args)))
    with pytest.warns(RuntimeWarning, match="goes on without the coarse 48x48 kernels"):
        steps(1)
    assert {(outcome.role, outcome.in_force) for _, outcome in told} == {("forward", False), ("dgrad", False)}
    assert all("coarse 48x48" in str(outcome) and f"not built: {outcome.error}" in str(outcome) for _, outcome in told)
    assert all(outcome.error for _, outcome in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(100)
    assert respecialize._builder.started == 1
    assert names(gate) == {"block-sparse"}


def test_when_the_process_ends_queued_builds_end_too(monkeypatch, tmp_path):
    compiler, begun = tmp_path / "c++", tmp_path / "begun"
    hangs = f"echo >> {begun}; {COMPILERS['hangs']}"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo slow\n{hangs}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    cpu_product._rows_library.cache_clear()
    builder = respecialize._builder
    for block in ((48, 24), (24, 48)):
        builder.build((block, Types(torch.float32, torch.float32, "none")))
    deadline = time.monotonic() + 20
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    builder._stop()
    assert not builder._thread.is_alive()
    assert all(isinstance(one.error, KernelBuildError) for one in builder._builds.values())


def test_a_build_ends_with_its_compiler_when_it_is_stopped(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo slow\n{COMPILERS["hangs"]}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    cpu_product._rows_library.cache_clear()
    begun = respecialize._builder.build(((48, 24), Types(torch.float32, torch.float32, "none")))
    while not respecialize.build._running and not begun.done.is_set():
        time.sleep(0.01)
    respecialize.build.stop_compiling()
    assert begun.done.wait(10)
    assert isinstance(begun.error, KernelBuildError)
    assert not list((tmp_path / "cache").glob("*.so"))
