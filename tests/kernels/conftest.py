"""Registers the marker of the tests that need a GPU: `pytest -m gpu`."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
