"""Which kernel a call gets: C++ on a CPU; on a GPU Triton, or dense above the crossover; dense where one fails."""

import types
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import ctrlcompile as cc
from ctrlcompile import kernel_choice
from ctrlcompile.kernels import cpu_linear, dense_linear, index_lists, reference
from ctrlcompile.kernels.build import KernelBuildError
from ctrlcompile.kernels.verbs import Dgrad, Forward, Wgrad
from ctrlcompile.kernels.window import Window, channels_last

from .kernels.problems import within_budget
from .small_models import random_mask

CUDA, BLOCK, BF16 = torch.device("cuda"), (16, 32), torch.bfloat16


@pytest.fixture
def forgetful(monkeypatch):
    """Nothing is known of any kernel."""
    monkeypatch.setattr(kernel_choice, "_working", set())
    monkeypatch.setattr(kernel_choice, "_broken", {})


@pytest.fixture
def triton(monkeypatch, forgetful):
    """Triton's kernels on a GPU that is not there: they say what they can do, and that dense wins above 0.6."""
    module = types.SimpleNamespace(
        supported=lambda x, weight, block, device: None if x == weight else f"no kernel for {x} with {weight}",
        crossover=lambda role, dtype, block, m, n, k, device: {"forward": 0.6, "dgrad": 0.9, "wgrad": 0.0}[role],
    )
    load = kernel_choice._module
    monkeypatch.setattr(kernel_choice, "_module", lambda name: module if name == "triton_linear" else load(name))
    monkeypatch.setattr(kernel_choice, "_try", lambda types: None)
    return module


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_the_dense_product_is_what_the_specification_says(activation):
    n, k, m = 44, 70, 9
    mask = random_mask(index_lists.grid_shape((n, k), BLOCK))
    entries = index_lists.expand(mask, BLOCK, (n, k))
    x, grad, bias = torch.randn(m, k), torch.randn(m, n), torch.randn(n)
    weight = torch.where(entries, torch.randn(n, k), 0)
    off = (~mask).flatten().nonzero().flatten()[:2].int()
    probes = torch.cat((off, torch.tensor([-1], dtype=torch.int32)))
    lists = index_lists.build(mask)

    y, z = dense_linear.forward(x, weight, bias, lists, BLOCK, activation)
    exact = reference.linear(x.double(), weight.double(), bias.double(), mask, BLOCK, activation)
    plain = reference.linear(x, weight, bias, mask, BLOCK, activation)
    within_budget(y, plain[0], exact[0])
    assert z.numel() == (m * n if activation.startswith("gelu") else 0)
    exact_x = reference.linear_dgrad(grad.double(), weight.double(), mask, BLOCK)
    within_budget(dense_linear.dgrad(grad, weight, lists, BLOCK), grad @ weight, exact_x)
    grad_weight, signals = dense_linear.wgrad(grad, x, weight, lists, probes, BLOCK)
    exact_weight, exact_signals = reference.linear_wgrad(
        grad.double(), x.double(), weight.double(), mask, probes, BLOCK
    )
    assert not grad_weight[~entries].any()
    within_budget(grad_weight, torch.where(entries, grad.t() @ x, 0), exact_weight)
    within_budget(signals, exact_signals.float(), exact_signals, units=32)


def test_on_a_gpu_a_gate_runs_dense_above_its_crossover_and_by_its_lists_below(triton):
    linear = nn.Linear(96, 64)
    gate = cc.gates(linear, BLOCK)["weight"]
    gate.update_((torch.arange(12).view(gate.grid) % 4) < 3)
    by_hand = index_lists.build(gate.mask)
    with FakeTensorMode():
        grad, x, weight = (torch.empty(*shape, device=CUDA) for shape in ((8, 64), (8, 96), (64, 96)))
        verbs = (
            Forward(x, weight, None, gate.lists, BLOCK, "none"),
            Dgrad(grad, weight, gate.lists, BLOCK),
            Wgrad(grad, x, weight, gate.lists, gate.probes, BLOCK),
        )
        chosen = {verb.role: kernel_choice._kernel(verb, kernel_choice.LINEAR) for verb in verbs}
        unknown = kernel_choice._kernel(verbs[0]._replace(lists=by_hand), kernel_choice.LINEAR)
    assert chosen == {"forward": dense_linear, "dgrad": triton, "wgrad": dense_linear}
    assert unknown is triton  # of lists made by hand nothing is known on the host


def test_a_float32_weight_under_a_gpus_autocast_counts_as_its_input_does(triton):
    assert kernel_choice.why_no_kernel(CUDA, torch.bfloat16, torch.float32, BLOCK) is None
    reason = kernel_choice.why_no_kernel(CUDA, torch.bfloat16, torch.float16, BLOCK)
    assert reason == "no kernel for torch.bfloat16 with torch.float16"
    assert kernel_choice.kernel_name(CUDA, torch.bfloat16, torch.float32) == "Triton bfloat16"


def test_on_another_device_the_reason_names_it(forgetful):
    reason = kernel_choice.why_no_kernel(torch.device("meta"), torch.float32, torch.float32, BLOCK)
    assert reason == "no kernels for device type 'meta'"


def test_a_kernel_that_fails_when_it_runs_is_replaced_by_dense_products_with_one_warning(monkeypatch, forgetful):
    mask = random_mask((4, 3))
    lists, weight = index_lists.build(mask), torch.randn(64, 96)
    x, grad, probes = torch.randn(5, 96), torch.randn(5, 64), torch.tensor([-1], dtype=torch.int32)
    assert kernel_choice.why_no_kernel(x.device, x.dtype, weight.dtype, BLOCK) is None

    def fail(*_):
        raise KernelBuildError("no tile runs", "out of registers", "Choose smaller blocks")

    for verb in ("forward", "dgrad", "wgrad"):
        monkeypatch.setattr(cpu_linear, verb, fail)
    with pytest.warns(RuntimeWarning, match="densely: no tile runs: out of registers"):
        y, _ = kernel_choice.forward(x, weight, None, lists, BLOCK, "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad_x = kernel_choice.dgrad(grad, weight, lists, BLOCK)
        grad_weight, _ = kernel_choice.wgrad(grad, x, weight, lists, probes, BLOCK)
    torch.testing.assert_close(y, reference.linear(x, weight, None, mask, BLOCK)[0])
    torch.testing.assert_close(grad_x, reference.linear_dgrad(grad, weight, mask, BLOCK))
    torch.testing.assert_close(grad_weight, reference.linear_wgrad(grad, x, weight, mask, probes, BLOCK)[0])
    reason = kernel_choice.why_no_kernel(x.device, x.dtype, weight.dtype, BLOCK)
    assert reason == "kernel not built: no tile runs: out of registers. Choose smaller blocks"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dense_products_signals_do_not_overflow_a_half_type(dtype):
    mask, probes = torch.ones(2, 2, dtype=torch.bool), torch.tensor([-1], dtype=torch.int32)
    grad, x, weight = torch.randn(2048, 32).to(dtype), torch.randn(2048, 64).to(dtype), torch.randn(32, 64).to(dtype)
    _, signals = dense_linear.wgrad(grad, x, weight, index_lists.build(mask), probes, BLOCK)
    _, exact = reference.linear_wgrad(grad.double(), x.double(), weight.double(), mask, probes, BLOCK)
    assert exact[1].min() > torch.finfo(torch.float16).max
    torch.testing.assert_close(signals[1], exact[1], rtol=0.02, atol=0)


def test_on_a_gpu_a_kernel_that_cannot_be_tuned_is_replaced_by_the_dense_product(triton):
    def fail(*_):
        raise KernelBuildError("no tile runs", "out of registers", "Choose smaller blocks")

    triton.crossover = fail
    layer = nn.Linear(96, 64)
    lists = cc.gates(layer, BLOCK)["weight"].lists
    with FakeTensorMode():
        x, weight, grad = (torch.empty(shape, device=CUDA) for shape in ((8, 96), (64, 96), (8, 64)))
        with pytest.warns(RuntimeWarning, match="densely: no tile runs"):
            y, _ = kernel_choice.forward(x, weight, None, lists, BLOCK, "none")
        grad_x = kernel_choice.dgrad(grad, weight, lists, BLOCK)
    assert (y.shape, grad_x.shape) == (grad.shape, x.shape)


def test_a_convolution_of_one_tap_takes_a_batch_of_no_images():
    lists, probes = index_lists.build(torch.ones(2, 3, dtype=torch.bool)), torch.full((1,), -1, dtype=torch.int32)
    weight, window = torch.randn(32, 48, 1, 1), Window((1, 1), ((0, 0), (0, 0)), (1, 1))
    x = channels_last(torch.randn(0, 48, 5, 4))
    y, _ = kernel_choice.forward(x, weight, None, lists, (16, 16), "none", window)
    grad_x = kernel_choice.dgrad(y, weight, lists, (16, 16), window, (5, 4))
    grad_weight, signals = kernel_choice.wgrad(y, x, weight, lists, probes, (16, 16), window)
    assert y.shape == (0, 32, 5, 4)
    assert grad_x.shape == x.shape
    assert not grad_weight.any()
    assert not signals.any()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(("amx", "dtype", "told"), [(True, BF16, 1), (True, torch.float32, 0), (False, BF16, 0)])
def test_pruning_in_bfloat16_beside_a_matrix_unit_is_told_of_once(amx, dtype, told, monkeypatch):
    monkeypatch.setattr(kernel_choice.isa, "has_amx", lambda: amx)
    kernel_choice._tell_of_amx.cache_clear()
    model = nn.Sequential(nn.Linear(72, 64), nn.Linear(64, 72)).to(dtype)
    run = torch.compile(model, backend="ctrlprune", options={"block": 16})
    x = torch.randn(3, 72, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(x).sum().backward()
        assert all(row.gated for row in cc.explain(run)(x).rows)
    assert sum("saves FLOPs, not time" in str(w.message) for w in caught) == told
