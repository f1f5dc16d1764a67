"""The generated Triton kernels compute what the reference says, in Triton's interpreter."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrlcompile.kernels import index_lists, reference, triton_linear
from ctrlcompile.kernels.triton_rows import RowsTile
from ctrlcompile.kernels.triton_wgrad import WgradTile

from .interpreter import Interpreter
from .problems import FLOAT, FLOAT16, Problem, within_budget

triton = pytest.importorskip("triton")

ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh"]
FEW = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True
)

# One of each way to go about it: swapped, through descriptors, several blocks an iteration, a block in parts, halves.
ROWS_TILES = {
    "plain": ((32, 64), RowsTile(16, 64, 4, 3)),
    "swapped": ((64, 32), RowsTile(32, 32, 4, 3, swap=True)),
    "packed": ((32, 16), RowsTile(32, 64, 4, 3)),
    "packed parts": ((16, 48), RowsTile(16, 64, 4, 3)),
    "parts": ((32, 96), RowsTile(16, 32, 4, 3)),
    "descriptors": ((48, 32), RowsTile(16, 32, 4, 3, descriptors=True)),
    "swapped descriptors": ((64, 64), RowsTile(16, 64, 4, 3, swap=True, descriptors=True)),
    "halves": ((128, 32), RowsTile(128, 32, 4, 3)),
    "swapped halves": ((64, 32), RowsTile(256, 32, 4, 3, swap=True)),
    "short groups": ((32, 32), RowsTile(16, 32, 4, 3, group=2)),
}
WGRAD_TILES = {
    "one block": ((32, 32), WgradTile(16, 1, 4, 3)),
    "grouped": ((16, 16), WgradTile(16, 4, 4, 3)),
    "grouped, filled up": ((48, 48), WgradTile(16, 2, 4, 3)),
    "halves": ((64, 64), WgradTile(16, 4, 4, 3)),
    "split": ((32, 48), WgradTile(16, 2, 4, 3, splits=3)),
    "descriptors": ((48, 64), WgradTile(16, 2, 4, 3, descriptors=True)),
    "split descriptors": ((32, 80), WgradTile(16, 2, 4, 3, descriptors=True, splits=2)),
}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    process = Interpreter(str(tmp_path_factory.mktemp("kernels")))
    yield process
    process.close()


@pytest.fixture(autouse=True)
def best_guess(interpreter):
    interpreter.tile = None


@given(
    m=st.integers(1, 40),
    k=st.integers(1, 130),
    n=st.integers(1, 130),
    block=st.sampled_from([(32, 32), (48, 64), (64, 16), (128, 80)]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    dtypes=st.sampled_from([FLOAT, FLOAT16]),
    seed=st.integers(0, 2**31),
)
@FEW
def test_every_role_is_as_accurate_as_dense(interpreter, m, k, n, block, density, activation, bias, dtypes, seed):
    torch.manual_seed(seed)
    problem = Problem.random(m, k, n, block, density, dtypes).on(interpreter)
    if not bias:
        problem.bias = None
    problem.check_forward(activation)
    problem.check_dgrad()
    problem.check_wgrad()


@pytest.mark.parametrize("dtypes", [FLOAT, FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ROWS_TILES)
def test_every_way_to_sum_over_a_list_is_right(interpreter, name, dtypes):
    block, interpreter.tile = ROWS_TILES[name]
    # Lengths that are multiples of 8 float16, for descriptors, and of no block; more rows than a group of tiles has.
    problem = Problem.random(interpreter.tile.rows * 2 + 5, 200, 168, block, 0.5, dtypes).on(interpreter)
    problem.check_forward("gelu")
    problem.block = block[::-1]
    problem.mask = torch.rand(index_lists.grid_shape((168, 200), problem.block)) < 0.5
    problem.check_dgrad()


@pytest.mark.parametrize("dtypes", [FLOAT, FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", WGRAD_TILES)
def test_every_way_to_sum_a_weights_gradient_is_right(interpreter, name, density, dtypes):
    block, interpreter.tile = WGRAD_TILES[name]
    Problem.random(75, 200, 104, block, density, dtypes).on(interpreter).check_wgrad()


@pytest.mark.parametrize("m", [0, 1])
def test_few_rows_or_none(interpreter, m):
    problem = Problem.random(m, 70, 50, (32, 16), 0.5, FLOAT).on(interpreter)
    problem.check_forward("gelu")
    problem.check_dgrad()
    problem.check_wgrad()


def test_an_empty_list_leaves_the_bias_and_its_activation(interpreter):
    problem = Problem.random(9, 64, 96, (32, 32), 0.0, FLOAT).on(interpreter)
    y, _ = triton_forward(problem, "gelu_tanh")
    rounded, exact = (reference.activate(b, "gelu_tanh") for b in (problem.bias, problem.bias.double()))
    within_budget(y, rounded.expand(y.shape), exact.expand(y.shape))


def test_strided_inputs_are_read_where_they_lie(interpreter):
    problem = Problem.random(20, 80, 96, (32, 16), 0.5, FLOAT).on(interpreter)
    problem.x = torch.randn(20, 97)[:, 3:83]
    problem.grad_z = torch.randn(40, 96)[::2]
    problem.weight = problem.weight.t().contiguous().t()
    problem.check_forward("relu")
    problem.check_dgrad()
    problem.check_wgrad()


@pytest.mark.parametrize("block", [(32, 64), (32, 16)], ids=["one by one", "packed"])
def test_a_masked_block_is_not_computed(interpreter, block):
    problem = Problem.random(20, 100, 90, block, 0.5, FLOAT).on(interpreter)
    lists = index_lists.build(problem.mask)
    entries = index_lists.expand(problem.mask, block, (90, 100))
    problem.weight = torch.where(entries, problem.weight, torch.inf)
    assert triton_forward(problem, "none")[0].isfinite().all()
    assert interpreter.dgrad(problem.grad_z, problem.weight, lists, block).isfinite().all()
    grad_weight, signals = interpreter.wgrad(problem.grad_z, problem.x, problem.weight, lists, problem.probes, block)
    assert grad_weight.isfinite().all()
    assert signals.isfinite().all()


def test_without_probes_masked_blocks_say_nothing(interpreter):
    problem = Problem.random(20, 100, 90, (16, 16), 0.5, FLOAT).on(interpreter)
    problem.probes = torch.empty(0, dtype=torch.int32)
    problem.check_wgrad()
    problem.probes = torch.full((5,), -1, dtype=torch.int32)
    problem.check_wgrad()


def test_more_probes_than_are_looked_at_together(interpreter):
    problem = Problem.random(16, 260, 250, (16, 16), 0.3, FLOAT).on(interpreter)
    problem.probes = (~problem.mask).flatten().nonzero().flatten().int()
    assert problem.probes.numel() > 128
    problem.check_wgrad()


def triton_forward(problem, activation):
    lists = index_lists.build(problem.mask)
    return problem.kernels.forward(problem.x, problem.weight, problem.bias, lists, problem.block, activation)


def test_what_is_not_supported_is_said_in_words(monkeypatch):
    half = torch.float16
    assert triton_linear.supported(half, half, (128, 48)) is None
    assert "float64" in triton_linear.supported(torch.float64, torch.float64, (32, 32))
    assert "float32 weight" in triton_linear.supported(half, torch.float32, (32, 32))
    assert "24x32" in triton_linear.supported(half, half, (24, 32))
    assert "256" in triton_linear.supported(half, half, (32, 256))
    triton_linear._missing.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1 is too old" in triton_linear.supported(half, half, (32, 32))
    triton_linear._missing.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_linear.supported(half, half, (32, 32))
    triton_linear._missing.cache_clear()
