"""The CPU kernels compute convolutions as the reference says, as accurately as the framework's do."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ctrlcompile.kernels import cpp_rows, cpp_rows_lines, cpu_conv, cpu_product, dense_conv, index_lists, isa
from ctrlcompile.kernels.window import Window, channels_last

from .conv_problems import ConvProblem
from .problems import AUTOCAST, FLOAT, HALF
from .test_cpu_linear import PROPERTY, TARGETS

AXES = st.lists(
    st.tuples(
        st.integers(1, 9),  # size
        st.integers(1, 3),  # taps
        st.integers(1, 3),  # stride
        st.tuples(st.integers(0, 3), st.integers(0, 3)),  # padding
        st.integers(1, 2),  # dilation
    ),
    min_size=1,
    max_size=3,
)
# images, outputs, taps, window, block
SHAPES = {
    "3x3": ((3, 70, 9, 8), 90, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1)), (32, 16)),
    "stride 2": ((2, 40, 9, 12), 72, (3, 3), Window((2, 2), ((1, 1), (1, 1)), (1, 1)), (16, 16)),
    "1x1 with stride 2": ((2, 64, 8, 7), 64, (1, 1), Window((2, 2), ((0, 0), (0, 0)), (1, 1)), (16, 16)),
    "stride beyond the taps": ((2, 32, 9, 9), 32, (2, 2), Window((3, 4), ((0, 0), (0, 0)), (1, 1)), (16, 16)),
    "padding beyond the taps": ((2, 32, 3, 3), 32, (2, 2), Window((1, 1), ((3, 2), (2, 3)), (1, 1)), (16, 16)),
    "one channel": ((2, 1, 11, 9), 33, (5, 3), Window((1, 2), ((2, 2), (0, 1)), (1, 1)), (8, 24)),
    "dilation": ((2, 48, 11, 9), 40, (3, 2), Window((1, 1), ((2, 2), (1, 0)), (2, 3)), (8, 24)),
    "two groups": ((2, 64, 6, 6), 96, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1), 2), (16, 16)),
    "groups that end in a partial block": (
        (2, 120, 7, 6),
        96,
        (3, 3),
        Window((2, 2), ((1, 1), (1, 1)), (1, 1), 3),
        (16, 16),
    ),
    "lines longer than a tile": ((2, 40, 1500), 40, (5,), Window((1,), ((2, 2),), (1,)), (16, 16)),
    "volumes": ((2, 24, 5, 4, 6), 24, (3, 2, 3), Window((1, 2, 1), ((1, 1), (0, 1), (1, 1)), (1, 1, 2)), (16, 16)),
    "no padding": ((3, 64, 14, 15), 64, (3, 3), Window((1, 1), ((0, 0), (0, 0)), (1, 1)), (16, 16)),
    # In tiles of even and odd numbers of rows and pixels, in turn.
    "no padding, one tap": ((3, 96, 501), 96, (1,), Window((1,), ((0, 0),), (1,)), (32, 32)),
    "no padding, two taps": ((3, 96, 500), 96, (2,), Window((1,), ((0, 0),), (1,)), (32, 32)),
    # Lines of 4 n rows, in blocks one vector wide, whose taps stand side by side.
    "lines of three taps": ((3, 40, 7, 16), 40, (5, 3), Window((1, 1), ((2, 2), (1, 1)), (2, 1)), (16, 16)),
    "lines with a stride": ((2, 40, 9, 16), 72, (3, 3), Window((2, 2), ((1, 1), (1, 1)), (1, 1)), (16, 16)),
    "lines of two taps": ((2, 33, 5, 12), 24, (3, 2), Window((1, 1), ((1, 1), (1, 0)), (1, 1)), (8, 16)),
    "lines in parts": ((2, 40, 1512), 40, (3,), Window((1,), ((1, 1),), (1,)), (16, 16)),
    "lines in groups": ((3, 72, 20), 96, (3,), Window((1,), ((1, 1),), (1,), 3), (16, 16)),
    "lines of volumes": (
        (2, 24, 3, 4, 8),
        40,
        (2, 1, 6),
        Window((1, 1, 1), ((1, 0), (0, 0), (3, 2)), (1, 1, 1)),
        (16, 16),
    ),
    "a single pixel": ((1, 64, 1, 1), 64, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1)), (16, 16)),
    "one tap that sees but padding": ((1, 32, 1, 9), 64, (1, 1), Window((3, 1), ((1, 1), (0, 0)), (1, 1)), (16, 16)),
    "one tap that sees padding": ((1, 16, 3), 32, (1,), Window((1,), ((0, 2),), (1,)), (16, 16)),
    "no image": ((0, 32, 4, 4), 32, (3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1)), (16, 16)),
}


def problem_of(name, density=0.5, dtypes=FLOAT) -> ConvProblem:
    return ConvProblem.random(*SHAPES[name], density, dtypes).on(cpu_conv)


@given(
    axes=AXES,
    count=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
@PROPERTY
def test_any_window_is_as_accurate_as_dense(axes, count, channels, density, seed):
    torch.manual_seed(seed)
    size, taps, stride, padding, dilation = zip(*axes, strict=True)
    window = Window(stride, padding, dilation)
    assume(min(window.output_size(size, taps)) > 0)
    problem = ConvProblem.random((count, channels[0], *size), channels[1], taps, window, (16, 16), density, FLOAT)
    problem.on(cpu_conv).check()


@given(
    axes=AXES,
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example([(10, 2, 2, (3, 2), 3), (2, 1, 3, (1, 1), 3)], (14, 10), torch.float32, True, 0)
@example([(4, 1, 1, (2, 0), 2), (1, 2, 2, (3, 3), 2)], (1, 16), torch.bfloat16, False, 0)
@example([(1, 1, 3, (1, 2), 3)], (16, 1), torch.float16, False, 0)
@example([(4, 3, 1, (1, 2), 1), (1, 2, 2, (0, 1), 1)], (3, 1), torch.bfloat16, False, 0)  # there it is wrong
@PROPERTY
def test_the_frameworks_own_product_bears_any_window(axes, channels, dtype, biased, seed):
    torch.manual_seed(seed)  # oneDNN crashes on the examples, unless it is kept from them
    size, taps, stride, padding, dilation = zip(*axes, strict=True)
    window = Window(stride, padding, dilation)
    assume(min(window.output_size(size, taps)) > 0)
    x = channels_last(torch.randn(2, channels[0], *size)).to(dtype)
    weight, bias = torch.randn(channels[1], channels[0], *taps).to(dtype), torch.randn(channels[1]).to(dtype)
    y = dense_conv.product(x, weight, bias if biased else None, window)
    assert y.dtype == dtype

    def exact(*tensors):
        x, weight, bias = (tensor.double() for tensor in tensors)
        sides = [side for both in reversed(padding) for side in both]
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
        return convolution(F.pad(x, sides), weight, bias if biased else None, stride, 0, dilation)

    error = (y.double() - exact(x, weight, bias)).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * exact(x.abs(), weight.abs(), bias.abs())).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtypes", [FLOAT, HALF, AUTOCAST], ids=["float32", "bfloat16", "autocast"])
def test_every_role_is_as_accurate_as_dense(name, dtypes):
    problem_of(name, dtypes=dtypes).check("gelu")


@pytest.mark.parametrize("target", TARGETS)
def test_every_instruction_set_computes_the_same(target, monkeypatch):
    monkeypatch.setattr(isa, "current", lambda dtype=torch.float32: TARGETS[target])
    lines = [name for name in SHAPES if "lines" in name and SHAPES[name][-1] == (16, 16)]
    for name in ("3x3", "stride 2", "volumes", "groups that end in a partial block", *lines):
        for dtypes in (FLOAT, HALF, AUTOCAST) if name == "3x3" else (HALF,):
            problem_of(name, dtypes=dtypes).check("gelu")


@pytest.mark.parametrize(
    "name", ["1x1 with stride 2", "dilation", "a single pixel", *(n for n in SHAPES if "lines" in n)]
)
def test_taps_side_by_side_are_multiplied_together_where_lines_allow_it(name, monkeypatch):
    problem = problem_of(name, density=1.0)
    sums = "acc[i][0] = load<V>(list.bias + strip)"
    assert sums in cpp_rows_lines.LINES
    spoiled = cpp_rows_lines.LINES.replace(sums, f'{sums} + __builtin_nanf("")')
    monkeypatch.setattr(cpp_rows, "LINES", spoiled)
    monkeypatch.setattr(cpu_product, "_rows_library", functools.cache(cpu_product._rows_library.__wrapped__))
    monkeypatch.setattr(isa, "current", lambda dtype=torch.float32: TARGETS["avx512 shapes"])
    lists, rest = index_lists.build(problem.mask), (problem.block, problem.window)
    y, _ = cpu_conv.forward(problem.x, problem.weight, problem.bias, lists, problem.block, "none", problem.window)
    grad_x = cpu_conv.dgrad(problem.grad_z, problem.weight, lists, *rest, tuple(problem.x.shape[2:]))
    together = name.startswith("lines") and name != "lines longer than a tile"
    assert y.isnan().all() if together else y.isfinite().all()
    if name == "lines with a stride":  # every other column is seen by two taps side by side, the rest by one
        assert grad_x[..., ::2].isfinite().all()
        grad_x = grad_x[..., 1::2]
    assert grad_x.isnan().all() if together else grad_x.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["3x3", "stride 2", "two groups", "lines longer than a tile", "a single pixel"])
def test_pixels_are_shared_out_completely(threads, name):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem_of(name).check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("cached", "threads"), [(0, 2), (150_000, 3), (150_000, 9)])
@pytest.mark.parametrize(
    "name",
    [
        "3x3",
        "no padding",
        "stride 2",
        "volumes",
        "groups that end in a partial block",
        "lines of three taps",
        "lines with a stride",
    ],
)
def test_small_tiles_strips_and_ranges_add_up(name, cached, threads, monkeypatch):
    monkeypatch.setattr(cpu_product, "_PANEL_BYTES", 0)
    monkeypatch.setattr(cpu_product, "_second_level_bytes", lambda: cached)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    _, channels, *size = SHAPES[name][0]
    outputs, *rest = SHAPES[name][1:]
    ConvProblem.random((40, channels, *size), outputs, *rest, 0.5, FLOAT).on(cpu_conv).check()


@pytest.mark.parametrize("name", ["3x3", "stride 2", "groups that end in a partial block"])
@pytest.mark.parametrize("mask", ["empty row", "empty column", "all masked"])
def test_where_nothing_is_active_the_result_is_that_of_a_zero_weight(name, mask):
    problem = problem_of(name, density=1.0)
    if mask == "empty row":
        problem.mask[1] = False
    elif mask == "empty column":
        problem.mask[:, 1] = False
    else:
        problem.mask[:] = False
    problem.check("gelu")


@pytest.mark.parametrize("name", ["3x3", "dilation", "volumes", "stride 2", "two groups"])
def test_a_weight_may_be_channels_last_and_activations_need_not_be(name):
    problem = problem_of(name)
    problem.weight = channels_last(problem.weight)
    problem.x, problem.grad_z = problem.x.contiguous(), problem.grad_z.contiguous()
    problem.check()


def test_images_may_lie_apart():
    problem = problem_of("stride 2")
    problem.x = torch.cat([problem.x, problem.x], dim=1)[:, : problem.x.shape[1], 1:-1]
    wide = torch.randn_like(torch.cat([problem.grad_z, problem.grad_z], dim=1))
    problem.grad_z = channels_last(wide)[:, 3 : 3 + problem.grad_z.shape[1], :-1]
    problem.check()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtypes", [FLOAT, HALF])
def test_a_masked_block_meets_neither_its_weight_nor_its_input(value, dtypes):
    problem = problem_of("3x3", density=1.0, dtypes=dtypes)
    problem.mask[:, 1], problem.mask[2] = False, False
    problem.weight[:, 16:32], problem.weight[64:] = value, value
    problem.x[:, 16:32], problem.grad_z[:, 64:] = value, value
    problem.probes[:] = -1
    lists, rest = index_lists.build(problem.mask), (problem.block, problem.window)
    y, _ = cpu_conv.forward(problem.x, problem.weight, problem.bias, lists, problem.block, "none", problem.window)
    grad_x = cpu_conv.dgrad(problem.grad_z, problem.weight, lists, *rest, tuple(problem.x.shape[2:]))
    gradients = cpu_conv.wgrad(problem.grad_z, problem.x, problem.weight, lists, problem.probes, *rest)
    assert all(result.isfinite().all() for result in (y, grad_x, *gradients))


def test_probes_are_measured_over_all_taps_and_not_written():
    for name in ("3x3", "two groups"):
        problem = problem_of(name, density=0.0)
        problem.probes = torch.tensor([2, -1, 9], dtype=torch.int32)
        problem.check_wgrad()
        lists = index_lists.build(problem.mask)
        _, signals = cpu_conv.wgrad(
            problem.grad_z, problem.x, problem.weight, lists, problem.probes, problem.block, problem.window
        )
        assert signals[1].flatten().nonzero().flatten().tolist() == [2, 9]
