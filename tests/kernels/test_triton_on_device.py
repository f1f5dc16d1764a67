"""The Triton kernels on a CUDA device: as accurate as dense products, repeatable, and right under a CUDA graph.

`pytest -m gpu tests/kernels/test_triton_on_device.py`; skipped where there is no CUDA device.
"""

import functools
import itertools

import pytest
import torch

from ctrlcompile.kernels import index_lists, reference, triton_conv, triton_linear, triton_tune
from ctrlcompile.kernels.triton_rows import Rows
from ctrlcompile.kernels.triton_wgrad import Wgrad
from ctrlcompile.kernels.window import Window

from .conv_problems import ConvProblem
from .problems import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(200, 520, 392, (128, 64)), (77, 200, 328, (64, 64)), (300, 256, 384, (32, 32)), (33, 176, 96, (48, 16))]

# Shape of x, outputs, taps, window, block
SAME = Window((1, 1), ((1, 1), (1, 1)), (1, 1))
CONVOLUTIONS = {
    "3x3": ((3, 136, 14, 13), 200, (3, 3), SAME, (64, 64)),
    "narrow blocks": ((2, 72, 9, 8), 56, (3, 3), SAME, (32, 16)),
    "strided": ((2, 128, 15, 14), 136, (3, 3), Window((2, 2), ((1, 1), (1, 1)), (1, 1)), (128, 64)),
    "one tap, strided": ((2, 64, 8, 9), 128, (1, 1), Window((2, 2), ((0, 0), (0, 0)), (1, 1)), (64, 64)),
    "strided and dilated": ((2, 64, 17, 15), 64, (3, 2), Window((2, 3), ((2, 1), (0, 2)), (2, 2)), (64, 32)),
    "groups": ((2, 256, 7, 9), 256, (3, 3), SAME._replace(groups=2), (64, 64)),
    "odd channels": ((2, 67, 9, 7), 35, (5, 3), Window((1, 1), ((2, 2), (1, 1)), (1, 1)), (32, 32)),
    "one channel": ((2, 1, 28, 28), 64, (5, 5), Window((2, 2), ((2, 2), (2, 2)), (1, 1)), (64, 16)),
    "1d": ((4, 96, 200), 128, (5,), Window((2,), ((4, 0),), (1,)), (64, 32)),
    "3d": ((1, 64, 5, 9, 8), 64, (3, 3, 3), Window((1, 2, 2), ((1, 1),) * 3, (1, 1, 1)), (64, 64)),
}


@pytest.fixture(autouse=True)
def best_guess_on_fresh_memory(monkeypatch):
    """Nothing is timed, and memory that a kernel should have written, and did not, is NaN."""
    monkeypatch.setenv("CTRLCOMPILE_TUNE", "0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_problem(m, k, n, block, density, dtype):
    return Problem.random(m, k, n, block, density, (dtype, dtype)).on(triton_linear, "cuda")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("m", "k", "n", "block"), SHAPES)
def test_every_role_is_as_accurate_as_dense(m, k, n, block, dtype):
    for density in (0.0, 0.4, 1.0):
        problem = random_problem(m, k, n, block, density, dtype)
        problem.check_forward("gelu_tanh")
        problem.check_dgrad()
        problem.check_wgrad()


def random_convolution(name, density, dtype):
    return ConvProblem.random(*CONVOLUTIONS[name], density, (dtype, dtype)).on(triton_conv, "cuda")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in CONVOLUTIONS), *itertools.product(("3x3", "strided", "groups"), TYPES[1:])],
)
def test_every_role_of_a_convolution_is_as_accurate_as_dense(name, dtype):
    for density in (0.0, 0.5, 1.0):
        random_convolution(name, density, dtype).check("gelu_tanh" if dtype != torch.float32 else "relu")


@pytest.mark.parametrize("name", ["3x3", "strided"])
def test_every_candidate_for_a_convolution_computes_the_same(monkeypatch, name):
    problem = random_convolution(name, 0.5, torch.bfloat16)
    seen = []

    def candidate(place, kernel, m, outputs, inputs, aligned, device, size):
        case = triton_tune.Case(kernel, m, outputs, inputs, aligned, device, size)
        seen.append(case.candidates)
        return case.candidates[min(len(case.candidates) - 1, place)]

    for place in range(6):
        monkeypatch.setattr(triton_tune, "choose", functools.partial(candidate, place))
        problem.check("relu")
    assert max(map(len, seen)) > 1


def test_images_of_another_layout_are_read_all_the_same():
    problem = random_convolution("3x3", 0.5, torch.bfloat16)
    problem.x = torch.randn(3, 14, 13, 160, device="cuda").bfloat16().movedim(-1, 1)[:, 8:144]
    problem.grad_z = problem.grad_z.contiguous()
    problem.weight = problem.weight.to(memory_format=torch.channels_last)
    problem.check()


def test_images_of_more_than_two_to_the_31_entries():
    shape = (36, 64, 1000, 1000)  # 4.6 GB
    problem = ConvProblem.random((1, 64, 8, 8), 64, (3, 3), SAME, (64, 64), 1.0, (torch.bfloat16,) * 2)
    problem = problem.on(triton_conv, "cuda")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x[-1] = torch.randn(shape[1:], device="cuda")
    lists, rest = index_lists.build(problem.mask), (problem.block, problem.window)
    y, _ = triton_conv.forward(x, problem.weight, None, lists, problem.block, "none", problem.window)
    last, _ = triton_conv.forward(x[-1:], problem.weight, None, lists, problem.block, "none", problem.window)
    assert_close(y[-1:], last)
    assert not y[:-1].any()
    grad_weight, _ = triton_conv.wgrad(y, x, problem.weight, lists, problem.probes, *rest)
    alone, _ = triton_conv.wgrad(last, x[-1:], problem.weight, lists, problem.probes, *rest)
    assert_close(grad_weight, alone)
    assert_close(
        triton_conv.dgrad(y, problem.weight, lists, *rest, (1000, 1000))[-1:],
        triton_conv.dgrad(last, problem.weight, lists, *rest, (1000, 1000)),
    )


def assert_close(ours, other):
    assert (ours.float() - other.float()).norm() < 1e-2 * other.float().norm()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_every_activation_is_as_accurate_as_dense(activation):
    random_problem(130, 256, 256, (64, 64), 0.5, torch.bfloat16).check_forward(activation)


def test_products_in_tf32_are_as_accurate_as_dense_ones_in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        problem = random_problem(256, 512, 512, (64, 64), 0.5, torch.float32)
        problem.check_forward("none")
        problem.check_dgrad()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("block", [(128, 64), (64, 64), (32, 32)])
def test_every_candidate_computes_the_same(monkeypatch, block):
    problem = random_problem(1000, 768, 640, block, 0.4, torch.bfloat16)
    shape = (problem.x.device, *problem.weight.shape)
    kernels = {
        "check_forward": Rows(*block, True, torch.bfloat16),
        "check_dgrad": Rows(*block[::-1], False, torch.bfloat16),
        "check_wgrad": Wgrad(*block, torch.bfloat16),
    }
    for (check, kernel), aligned in itertools.product(kernels.items(), (True, False)):
        n, k = shape[1:] if check != "check_dgrad" else shape[:0:-1]
        for tile in triton_tune.Case(kernel, 1000, n, k, aligned, shape[0]).candidates:
            monkeypatch.setattr(triton_tune, "choose", lambda *_, tile=tile: tile)
            getattr(problem, check)(*["gelu"] * (check == "check_forward"))


@pytest.mark.parametrize("m", [1, 3, 17])
def test_few_rows(m):
    problem = random_problem(m, 320, 272, (64, 32), 0.5, torch.bfloat16)
    problem.check_forward("none")
    problem.check_dgrad()
    problem.check_wgrad()


def test_no_rows():
    problem = random_problem(0, 320, 272, (64, 32), 0.5, torch.bfloat16)
    problem.check_forward("gelu")
    problem.check_wgrad()


def test_unaligned_and_strided_inputs():
    problem = random_problem(70, 128, 96, (32, 64), 0.5, torch.bfloat16)
    problem.x = torch.randn(70, 131, device="cuda").bfloat16()[:, 1:129]
    problem.grad_z = torch.randn(140, 96, device="cuda").bfloat16()[::2]
    problem.check_forward("relu")
    problem.check_dgrad()
    problem.check_wgrad()


def test_offsets_beyond_two_to_the_31():
    m, k, n, block = 40_000, 64, 128, (64, 64)
    x = torch.zeros(m, 70_000, dtype=torch.bfloat16, device="cuda")[:, :k]  # 5.6 GB from the first row to the last
    x.copy_(torch.randn(m, k, device="cuda"))
    problem = random_problem(m, k, n, block, 1.0, torch.bfloat16)
    problem.x = x
    problem.check_forward("none")
    problem.check_wgrad()


def test_results_repeat_to_the_last_bit():
    problem = random_problem(4096, 512, 512, (128, 64), 0.4, torch.bfloat16)
    lists = index_lists.build(problem.mask)
    tensors = (problem.grad_z, problem.x, problem.weight)
    first, again = (triton_linear.wgrad(*tensors, lists, problem.probes, problem.block) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_captured_graph_follows_lists_that_are_rewritten_in_place():
    problem = random_problem(300, 512, 384, (64, 64), 0.5, torch.bfloat16)
    lists = index_lists.build(problem.mask)
    x, weight, grad_z, block = problem.x, problem.weight, problem.grad_z, problem.block

    def step():
        y, _ = triton_linear.forward(x, weight, problem.bias, lists, block, "relu")
        grad_x = triton_linear.dgrad(grad_z, weight, lists, block)
        return y, grad_x, *triton_linear.wgrad(grad_z, x, weight, lists, problem.probes, block)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for density in (0.1, 0.9, 0.0):
        mask = torch.rand(problem.mask.shape, device="cuda") < density
        index_lists.write_(lists, mask)
        inactive = (~mask).flatten().nonzero().flatten()[: problem.probes.numel()].int()
        problem.probes.fill_(-1)[: inactive.numel()] = inactive
        graph.replay()
        for ours, direct in zip(captured, step(), strict=True):
            assert torch.equal(ours, direct)
        exact = reference.linear(x.double(), weight.double(), problem.bias.double(), mask, block, "relu")[0]
        assert (captured[0].double() - exact).abs().max() < 0.1


def test_tuning_ends_with_a_candidate_and_leaves_the_random_state(monkeypatch, tmp_path):
    monkeypatch.delenv("CTRLCOMPILE_TUNE")
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tune, "_known", {})
    before = torch.cuda.get_rng_state()
    kernel, device = Rows(64, 64, True, torch.bfloat16), torch.device("cuda", torch.cuda.current_device())
    tile = triton_tune.choose(kernel, 1024, 1024, 1024, True, device)
    assert tile in triton_tune.Case(kernel, 1024, 1024, 1024, True, device).candidates
    assert 0 <= triton_tune.crossover(kernel, 1024, 1024, 1024, device) <= 1
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert len(list(tmp_path.glob("tuned_*.json"))) == 1


def test_a_captured_graph_of_a_convolution_follows_its_lists():
    problem = random_convolution("strided", 0.5, torch.bfloat16)
    lists, size = index_lists.build(problem.mask), tuple(problem.x.shape[2:])
    x, weight, grad_z, rest = problem.x, problem.weight, problem.grad_z, (problem.block, problem.window)

    def step():
        y, _ = triton_conv.forward(x, weight, problem.bias, lists, problem.block, "relu", problem.window)
        grad_x = triton_conv.dgrad(grad_z, weight, lists, *rest, size)
        return y, grad_x, *triton_conv.wgrad(grad_z, x, weight, lists, problem.probes, *rest)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    problem.probes.fill_(-1)
    for density in (0.2, 0.8):
        index_lists.write_(lists, torch.rand(problem.mask.shape, device="cuda") < density)
        graph.replay()
        for ours, direct in zip(captured, step(), strict=True):
            assert torch.equal(ours, direct)


def test_tuning_a_convolution_ends_with_a_crossover(monkeypatch, tmp_path):
    monkeypatch.delenv("CTRLCOMPILE_TUNE")
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tune, "_known", {})
    given = (torch.bfloat16, (64, 64), 16, (28, 28), (128, 128, 3, 3), SAME, torch.device("cuda", 0))
    for role in ("forward", "dgrad", "wgrad"):
        assert 0 <= triton_conv.crossover(role, *given) <= 1
    assert len(list(tmp_path.glob("tuned_*.json"))) == 3


def test_a_device_that_is_too_old_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in triton_linear.supported(torch.float16, torch.float16, (64, 64), torch.device("cuda"))
