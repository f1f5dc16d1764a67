"""limits: what one call does is what it says, with a compiler and without."""

import pytest
import torch

from ctrlcompile.inspect import limits

CPU = torch.device("cpu")


def test_a_copy_moves_the_bytes_that_it_counts(one_thread):
    load = limits.copy(CPU)
    target, source = load.run.func.__self__, load.run.args[0]
    target.zero_()
    load.run()
    assert torch.equal(target, source)
    assert load.amount == 2 * target.numel() * target.element_size()
    assert target.untyped_storage().nbytes() >= 100e6, "no cache holds it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_compiler_the_peak_is_that_of_multiply_adds(one_thread, dtype):
    load = limits.peak(CPU, dtype)
    multiply_adds, terms = limits._multiply_adds(dtype)
    assert load.run.func is multiply_adds
    assert terms in (4, 8, 16, 32)
    assert load.amount == 2 * 12 * terms * load.run.args[0]
    load.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_the_peak_is_a_dense_product(one_thread, monkeypatch, tmp_path, dtype):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path))
    limits._multiply_adds.cache_clear()
    load = limits.peak(CPU, dtype)
    a, b = load.run.args
    load.run()
    torch.testing.assert_close(load.run.keywords["out"], a @ b)
    assert a.dtype == dtype
    assert load.amount == 2 * a.shape[0] * a.shape[1] * b.shape[1]
