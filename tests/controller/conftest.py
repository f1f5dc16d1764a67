"""One seed for the controller's tests: they hold it to what a run reaches for nearly every input, not for every one.

`CTRLCOMPILE_TEST_SEED` sets another. The simulated models are tiny, so every test runs on one thread.
"""

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest, one_thread: None) -> int:
    """The seed of every test here."""
    value = int(os.environ.get("CTRLCOMPILE_TEST_SEED", "0"))
    request.node.user_properties.append(("seed", value))
    torch.manual_seed(value)
    random.seed(value)
    return value
