"""The generated CPU kernels compute what the reference says, as accurately as dense operators do."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrlcompile.kernels import cpu_linear, cpu_product, index_lists, isa, reference

from .problems import AUTOCAST, FLOAT, HALF, Problem

BLOCKS = [(8, 8), (8, 128), (24, 40), (32, 32), (64, 16), (64, 64), (120, 8)]
SIZES = st.integers(1, 150)
PROPERTY = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True
)

# The wide kernels run here on a CPU without wide registers: the same text, compiled for the registers there are.
TARGETS = {
    "native": isa.current(torch.bfloat16),
    "portable": isa.PORTABLE,
    "avx512 shapes": dataclasses.replace(isa.AVX512, flags=isa.current().flags),
    "pairs": dataclasses.replace(isa.AVX512_BF16, flags=isa.current().flags),
}


@given(
    m=st.integers(0, 80),
    k=SIZES,
    n=SIZES,
    block=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    activation=st.sampled_from(["none", "gelu"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@PROPERTY
def test_every_role_is_as_accurate_as_dense_in_float32(m, k, n, block, density, activation, bias, seed):
    torch.manual_seed(seed)
    problem = Problem.random(m, k, n, block, density, FLOAT)
    if not bias:
        problem.bias = None
    problem.check_forward(activation)
    problem.check_dgrad()
    problem.check_wgrad()


@given(
    m=st.integers(1, 40),
    k=SIZES,
    n=SIZES,
    dtypes=st.sampled_from([HALF, AUTOCAST]),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
@PROPERTY
def test_every_role_is_as_accurate_as_dense_in_bfloat16(m, k, n, dtypes, density, seed):
    torch.manual_seed(seed)
    problem = Problem.random(m, k, n, (32, 16), density, dtypes)
    problem.check_forward("gelu")
    problem.check_dgrad()
    problem.check_wgrad()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_is_as_accurate_as_dense(activation):
    problem = Problem.random(300, 70, 90, (32, 32), 0.5, FLOAT)
    problem.x *= 4  # where the activations bend, and well beyond
    problem.check_forward(activation)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("block", "dtypes"), [((32, 32), FLOAT), ((24, 96), FLOAT), ((64, 40), HALF), ((24, 96), AUTOCAST)]
)
def test_every_instruction_set_computes_the_same(target, block, dtypes, monkeypatch):
    monkeypatch.setattr(isa, "current", lambda dtype=torch.float32: TARGETS[target])
    problem = Problem.random(61, 210, 150, block, 0.5, dtypes)
    problem.check_forward("gelu")
    problem.check_dgrad()
    problem.check_wgrad()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("m", "k", "n"), [(1200, 96, 160), (700, 1000, 96), (1, 300, 300)])
def test_many_rows_are_shared_out_completely(threads, m, k, n):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem = Problem.random(m, k, n, (32, 32), 0.4, FLOAT)
        problem.check_forward("gelu")
        problem.check_dgrad()
        problem.check_wgrad()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def scratch_of_no_more_than_was_asked_for(patch):
    """Kernels get as much as they asked for, and nothing behind it is written."""
    given = []

    def scratch(size):
        given.append((torch.full((size + 4096,), 0xA5, dtype=torch.uint8), size))
        return given[-1][0]

    patch.setattr(cpu_product, "_scratch", scratch)
    yield
    assert given
    assert all((memory[size:] == 0xA5).all() for memory, size in given)


@given(
    m=st.integers(1, 900),
    k=st.integers(1, 400),
    n=st.integers(1, 400),
    density=st.floats(0.01, 1.0),
    block=st.sampled_from([(32, 32), (64, 16), (16, 64)]),
    dtypes=st.sampled_from([FLOAT, HALF]),
    panel=st.sampled_from([0, 32 << 10]),
    cached=st.sampled_from([0, 60_000, 200_000, 1 << 30]),
    threads=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 2**31),
)
@PROPERTY
def test_weight_gradients_cut_into_strips_ranges_and_slices_add_up(
    m, k, n, density, block, dtypes, panel, cached, threads, seed
):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_product, "_PANEL_BYTES", panel)
        patch.setattr(cpu_product, "_second_level_bytes", lambda: cached)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        problem = Problem.random(m, k, n, block, density, dtypes)
        problem.probes = (~problem.mask).flatten().nonzero().flatten().flip(0).int()
        with scratch_of_no_more_than_was_asked_for(patch):
            problem.check_wgrad()


@pytest.mark.parametrize("dtypes", [FLOAT, HALF])
@pytest.mark.parametrize("block", [(32, 32), (64, 32), (32, 64)])
@pytest.mark.parametrize("m", [256, 1002])
def test_panels_are_complete_that_are_packed_beside_products(m, block, dtypes):
    Problem.random(m, 192, 256, block, 0.6, dtypes).check_wgrad()


@pytest.mark.parametrize("ways", [1, 16])
def test_rows_in_the_same_sets_of_the_cache_are_packed_or_not(ways, monkeypatch):
    monkeypatch.setattr(cpu_product, "_first_level_ways", lambda: ways)
    for dtypes, page in ((FLOAT, 1024), (HALF, 2048)):  # entries of 4096 bytes
        Problem.random(45, page, 96, (32, 32), 0.4, dtypes).check_forward("gelu")
        Problem.random(45, 96, page, (32, 32), 0.4, dtypes).check_dgrad()


@pytest.mark.parametrize("mask", ["empty row", "empty column", "all masked"])
def test_where_nothing_is_active_the_result_is_that_of_a_zero_weight(mask):
    problem = Problem.random(30, 100, 100, (32, 32), 1.0, FLOAT)
    if mask == "empty row":
        problem.mask[2] = False
    elif mask == "empty column":
        problem.mask[:, 3] = False
    else:
        problem.mask[:] = False
    problem.check_forward("gelu")
    problem.check_dgrad()
    problem.check_wgrad()


def test_no_rows_add_up_to_nothing():
    Problem.random(0, 64, 72, (32, 32), 0.5, FLOAT).check_dgrad()


def test_gradients_of_many_rows_add_up_to_the_same_at_each_run(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    problem = Problem.random(20_011, 64, 40, (32, 32), 1.0, FLOAT)
    grad_z, weight, lists = problem.grad_z.abs(), problem.weight.abs(), index_lists.build(problem.mask)
    found = []
    for _ in range(4):
        before = reference.Before(torch.full((20_011, 64), 9.0), "gelu", torch.empty(64))  # where the slope is 1
        cpu_linear.dgrad(grad_z, weight, lists, problem.block, before)
        found.append(before.sums)
    assert all(torch.equal(found[0], other) for other in found[1:])
    exact = (grad_z.double() @ weight.double()).sum(0)
    # Half a unit of rounding, and some; the sums of all tiles, one after the other in float32, would be off by 3.
    assert ((found[0] - exact).abs() / exact).max() < 1.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtypes", [FLOAT, HALF, AUTOCAST])
def test_rows_may_lie_apart(dtypes):
    problem = Problem.random(51, 64, 64, (32, 32), 0.5, dtypes)
    wide_x, wide_grad = torch.randn(51, 101).to(dtypes[0]), torch.randn(51, 99).to(dtypes[0])
    problem.x, problem.grad_z = wide_x[:, 7:71], wide_grad[:, 1:65]
    problem.check_forward("none")
    problem.check_dgrad()
    problem.check_wgrad()


def test_a_weight_may_be_a_transposed_view():
    problem = Problem.random(20, 64, 96, (32, 32), 0.5, FLOAT)
    problem.weight = torch.randn(64, 96).t()
    problem.check_forward("none")
    problem.check_dgrad()
    problem.check_wgrad()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtypes", [FLOAT, HALF])
def test_a_masked_block_meets_neither_its_weight_nor_its_input(value, dtypes):
    problem = Problem.random(41, 96, 96, (32, 32), 1.0, dtypes)
    problem.mask[:, 1] = False
    problem.mask[2, :] = False
    problem.weight[:, 32:64] = value
    problem.weight[64:] = value
    problem.x[:, 32:64] = value
    problem.grad_z[:, 64:] = value
    problem.probes[:] = -1
    lists = index_lists.build(problem.mask)
    y, _ = cpu_linear.forward(problem.x, problem.weight, problem.bias, lists, problem.block, "none")
    grad_x = cpu_linear.dgrad(problem.grad_z, problem.weight, lists, problem.block)
    grad_weight, signals = cpu_linear.wgrad(
        problem.grad_z, problem.x, problem.weight, lists, problem.probes, problem.block
    )
    for result in (y, grad_x, grad_weight, signals):
        assert result.isfinite().all()
    assert torch.equal(y[:, 64:], problem.bias[64:].expand(41, 32))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtypes", [FLOAT, HALF])
def test_an_active_block_passes_infinities_and_nans_on_as_dense_does(value, dtypes):
    problem = Problem.random(20, 70, 70, (32, 32), 1.0, dtypes)
    problem.x[3, 69] = value
    problem.grad_z[5, 1] = value
    lists = index_lists.build(problem.mask)
    y, z = cpu_linear.forward(problem.x, problem.weight, None, lists, problem.block, "gelu")
    grad_x = cpu_linear.dgrad(problem.grad_z, problem.weight, lists, problem.block)
    grad_weight, _ = cpu_linear.wgrad(problem.grad_z, problem.x, problem.weight, lists, problem.probes, problem.block)
    # In float64: with AVX-512 the framework's float32 gelu makes NaN of infinity, and its bfloat16 products do, too.
    x, weight, grad_z = problem.x.double(), problem.weight.double(), problem.grad_z.double()
    dense_z = x @ weight.t()
    dense_results = (
        dense_z / 2 * (1 + torch.erf(dense_z / 2**0.5)),
        dense_z,
        grad_z @ weight,
        grad_z.t() @ x,
    )
    for ours, dense in zip((y, z, grad_x, grad_weight), dense_results, strict=True):
        assert torch.equal(ours.isnan(), dense.isnan())
        assert torch.equal(ours.isposinf(), dense.isposinf())
        assert torch.equal(ours.isneginf(), dense.isneginf())


def test_probes_are_measured_and_not_written():
    problem = Problem.random(64, 160, 160, (32, 32), 0.0, FLOAT)
    problem.probes = torch.tensor([7, -1, 24], dtype=torch.int32)
    lists = index_lists.build(problem.mask)
    grad_weight, signals = cpu_linear.wgrad(
        problem.grad_z, problem.x, problem.weight, lists, problem.probes, problem.block
    )
    assert not grad_weight.any()
    assert signals[1].flatten().nonzero().flatten().tolist() == [7, 24]
    assert not signals[0].any()


@pytest.mark.parametrize(
    ("dtypes", "block", "reason"),
    [
        (FLOAT, (32, 32), None),
        (HALF, (8, 128), None),
        (AUTOCAST, (64, 64), None),
        ((torch.float64, torch.float64), (32, 32), "float64"),
        ((torch.float32, torch.bfloat16), (32, 32), "bfloat16"),
        (FLOAT, (12, 32), "12x32"),
        (FLOAT, (32, 136), "32x136"),
        (FLOAT, (0, 32), "0x32"),
    ],
)
def test_what_is_not_supported_is_said(dtypes, block, reason):
    answer = cpu_linear.supported(*dtypes, block)
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize("dtypes", [FLOAT, HALF])
@pytest.mark.parametrize("n", [1056, 1050])
def test_outputs_that_sum_over_nothing_and_are_larger_than_a_cache(n, dtypes):
    m = cpu_product._second_level_bytes() * 3 // 2 // (n * dtypes[0].itemsize)
    problem = Problem.random(m, 40, n, (32, 8), 0.5, dtypes)
    problem.mask[torch.rand(problem.mask.shape[0]) < 0.7] = False
    problem.mask[-1] = False  # a block that the edge cuts off
    problem.check_forward("gelu")
    problem.check_forward("none")
    turned = Problem.random(m, n, 40, (8, 32), 0.5, dtypes)
    turned.mask[:, torch.rand(turned.mask.shape[1]) < 0.7] = False
    turned.check_dgrad()
