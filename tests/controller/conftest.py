"""The simulated models are tiny."""

import pytest


@pytest.fixture(autouse=True)
def tiny(one_thread):
    """Every test here runs on one thread."""
