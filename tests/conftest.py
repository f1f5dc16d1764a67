"""Fresh random input for every test: the seed is drawn anew, printed when the test fails, and set to repeat it.

`CTRLCOMPILE_TEST_SEED=1234 pytest tests/test_ops.py` repeats a failure. Every test starts without compiled code.
"""

import os
import random

# Before torch is imported: a pool of compile workers costs more than the few small kernels of a test.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from ctrlcompile.meter import meter


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test."""
    value = int(os.environ.get("CTRLCOMPILE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    request.node.user_properties.append(("seed", value))
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def clean_slate():
    """No compiled code of another test, and nothing that was measured there."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    meter.__init__()


@pytest.fixture
def one_thread():
    """For tiny models: waking a second thread costs more than their products, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed and call.when == "call":
        drawn = dict(item.user_properties).get("seed")
        traced = "torch.__trace"  # empty records by the hundred
        report.sections = [(title, text) for title, text in report.sections if traced not in text]
        report.sections.append(("seed", f"CTRLCOMPILE_TEST_SEED={drawn} repeats this test's input"))
