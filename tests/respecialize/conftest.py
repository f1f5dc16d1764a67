"""What tests of respecialising start from."""

import random

import pytest

from ctrlcompile import background, respecialize
from ctrlcompile.kernels import build
from ctrlcompile.variant_cost import CostModel


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing was measured, built or given up before."""
    monkeypatch.setattr(respecialize, "_model", CostModel())
    monkeypatch.setattr(respecialize, "_builder", background.Builder())
    monkeypatch.setattr(respecialize, "_failed", set())
    monkeypatch.setattr(build, "_ALONE_S", 0.1)  # nobody trains while a test waits for a build
    monkeypatch.setattr(build, "_YIELDING", ())  # and other tests may keep all cores busy


@pytest.fixture
def eager(monkeypatch):
    """Any gain is worth any cost, and a trial is one turn of each."""
    for name, value in {
        "MARGIN": 0.0,
        "LEAST_SAVED_S": 0.0,
        "FEWEST_CALLS": 1,
        "LOOK_EVERY": 1,
        "SETTLED_LOOK": 1,
        "TRIAL_TURNS": 1,
    }.items():
        monkeypatch.setattr(respecialize, name, value)
    monkeypatch.setattr(respecialize.build, "compile_seconds", [0.0])


@pytest.fixture
def restless(monkeypatch, eager):
    """Any variant may look the best at any boundary, and each trial is won."""
    monkeypatch.setattr(respecialize, "MARGIN", -1e9)
    monkeypatch.setattr(respecialize._At, "_predict", lambda self, variant: random.random())
