"""The generated Triton kernels of convolutions compute what the reference says, in Triton's interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrlcompile.kernels import index_lists, reference
from ctrlcompile.kernels.triton_rows import RowsTile
from ctrlcompile.kernels.triton_wgrad import WgradTile
from ctrlcompile.kernels.window import Window

from .conv_problems import ConvProblem
from .interpreter import Interpreter
from .problems import FLOAT, FLOAT16, within_budget

pytest.importorskip("triton")

FEW = settings(
    deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True
)

# Shape of x, outputs, taps, window: what differs from a plain 3x3.
PLAIN = ((2, 40, 4, 5), 40, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1)))
SHAPES = {
    "plain": PLAIN,
    "strided": ((2, 32, 6, 5), 24, (3, 3), Window((2, 2), ((1, 1), (1, 1)), (1, 1))),
    "one tap, strided": ((2, 32, 5, 4), 48, (1, 1), Window((2, 2), ((0, 0), (0, 0)), (1, 1))),
    "dilated": ((1, 32, 7, 6), 32, (3, 2), Window((1, 1), ((2, 2), (1, 0)), (2, 3))),
    "stride and dilation share a divisor": ((1, 16, 7, 6), 16, (3, 3), Window((2, 4), ((2, 2), (3, 2)), (2, 2))),
    "groups": ((1, 80, 3, 4), 64, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1), 2)),
    "one channel": ((2, 1, 6, 6), 40, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "one pixel": ((3, 32, 1, 1), 32, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "one dimension": ((3, 24, 11), 48, (4,), Window((2,), ((2, 1),), (1,))),
    "three dimensions": ((1, 16, 4, 5, 3), 16, (2, 3, 3), Window((2, 1, 2), ((0, 1), (1, 1), (1, 1)), (1, 1, 1))),
}

# One of each way to go about it: swapped, several blocks an iteration, a block in parts, halves.
ROWS_TILES = {
    "plain": ((32, 64), RowsTile(16, 64, 4, 3)),
    "swapped": ((64, 32), RowsTile(32, 32, 4, 3, swap=True)),
    "packed": ((32, 16), RowsTile(32, 64, 4, 3)),
    "parts": ((32, 96), RowsTile(16, 32, 4, 3)),
    "swapped halves": ((64, 32), RowsTile(256, 32, 4, 3, swap=True)),
}
WGRAD_TILES = {
    "several": ((48, 48), WgradTile(16, 4, 4, 3)),
    "more than taps": ((16, 16), WgradTile(32, 16, 4, 3)),
    "split": ((32, 48), WgradTile(16, 2, 4, 3, splits=3)),
    "halves": ((64, 64), WgradTile(16, 4, 4, 3)),
}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    process = Interpreter(str(tmp_path_factory.mktemp("kernels")), "triton_conv")
    yield process
    process.close()


@pytest.fixture(autouse=True)
def best_guess(interpreter):
    interpreter.tile = None


@pytest.mark.parametrize("shape", SHAPES)
def test_every_role_is_as_accurate_as_dense(interpreter, shape):
    ConvProblem.random(*SHAPES[shape], (16, 32), 0.6, FLOAT16).on(interpreter).check("relu")


@given(
    axes=st.lists(
        st.tuples(*(st.integers(1, most) for most in (6, 3, 3, 3)), st.integers(0, 2), st.integers(0, 2)),
        min_size=1,
        max_size=3,
    ),
    count=st.integers(1, 2),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 2),
    groups=st.integers(1, 2),
    block=st.sampled_from([(16, 32), (48, 16)]),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    dtypes=st.sampled_from([FLOAT, FLOAT16]),
    seed=st.integers(0, 2**31),
)
@FEW
def test_any_window_is_right(interpreter, axes, count, inputs, outputs, groups, block, density, dtypes, seed):
    torch.manual_seed(seed)
    sizes, taps, stride, dilation, before, after = zip(*axes, strict=True)
    window = Window(stride, tuple(zip(before, after, strict=True)), dilation, groups)
    size = tuple(
        max(size, spread * (count - 1) + 1 - sum(zeros))
        for size, count, spread, zeros in zip(sizes, taps, dilation, window.padding, strict=True)
    )
    images = (count, inputs * groups, *size)
    ConvProblem.random(images, outputs * groups * block[0], taps, window, block, density, dtypes).on(
        interpreter
    ).check()


@pytest.mark.parametrize("name", ROWS_TILES)
def test_every_way_to_sum_over_taps_is_right(interpreter, name):
    block, interpreter.tile = ROWS_TILES[name]
    window = Window((1, 2), ((1, 1), (1, 0)), (1, 1))
    # Blocks that are cut off, and phases with unequal numbers of pixels.
    problem = ConvProblem.random((2, 104, 3, 7), 72, (3, 2), window, block, 0.5, FLOAT).on(interpreter)
    problem.check_forward("gelu")
    problem.block = block[::-1]
    problem.mask = torch.rand(index_lists.grid_shape((72, 104), problem.block)) < 0.5
    problem.check_dgrad()


@pytest.mark.parametrize("name", WGRAD_TILES)
def test_every_way_to_sum_a_weights_gradient_is_right(interpreter, name):
    block, interpreter.tile = WGRAD_TILES[name]
    window = Window((2, 1), ((1, 1), (0, 1)), (1, 2))
    ConvProblem.random((2, 72, 6, 7), 56, (3, 2), window, block, 0.6, FLOAT).on(interpreter).check_wgrad()


def test_images_of_another_layout_are_read_all_the_same(interpreter):
    problem = ConvProblem.random(*PLAIN, (16, 32), 0.5, FLOAT16).on(interpreter)
    problem.x = torch.randn(2, 4, 5, 60).half().movedim(-1, 1)[:, 10:50]  # a slice of channels
    problem.grad_z = problem.grad_z.contiguous()
    problem.weight = problem.weight.to(memory_format=torch.channels_last)
    problem.check()


def test_no_images(interpreter):
    problem = ConvProblem.random((0, *PLAIN[0][1:]), *PLAIN[1:], (16, 32), 0.5, FLOAT).on(interpreter)
    lists, rest = index_lists.build(problem.mask), (problem.block, problem.window)
    assert forward(problem, "gelu")[0].shape == (0, 40, 4, 5)
    assert interpreter.dgrad(problem.grad_z, problem.weight, lists, *rest, (4, 5)).shape == problem.x.shape
    tensors = (problem.grad_z, problem.x, problem.weight)
    for result in interpreter.wgrad(*tensors, lists, problem.probes, *rest):
        assert not result.any()


def test_an_empty_list_leaves_the_bias_and_its_activation(interpreter):
    problem = ConvProblem.random(*PLAIN, (16, 32), 0.0, FLOAT16).on(interpreter)
    y, _ = forward(problem, "gelu_tanh")
    rounded, exact = (reference.activate(b, "gelu_tanh") for b in (problem.bias, problem.bias.double()))
    within_budget(y, rounded[:, None, None].expand(y.shape), exact[:, None, None].expand(y.shape))
    problem.check_dgrad()
    problem.check_wgrad()


@pytest.mark.parametrize("block", [(32, 64), (32, 16)], ids=["one by one", "packed"])
def test_a_masked_block_is_not_computed(interpreter, block):
    problem = ConvProblem.random(*SHAPES["groups"], block, 0.5, FLOAT).on(interpreter)
    entries = index_lists.expand(problem.mask, block, problem.weight.shape)
    problem.weight = torch.where(entries, problem.weight, torch.inf)
    assert forward(problem, "none")[0].isfinite().all()
    lists, rest = index_lists.build(problem.mask), (problem.block, problem.window)
    grad_x = interpreter.dgrad(problem.grad_z, problem.weight, lists, *rest, tuple(problem.x.shape[2:]))
    assert grad_x.isfinite().all()
    tensors = (problem.grad_z, problem.x, problem.weight)
    for result in interpreter.wgrad(*tensors, lists, problem.probes, *rest):
        assert result.isfinite().all()


def forward(problem, activation):
    tensors = (problem.x, problem.weight, problem.bias, index_lists.build(problem.mask))
    return problem.kernels.forward(*tensors, problem.block, activation, problem.window)
