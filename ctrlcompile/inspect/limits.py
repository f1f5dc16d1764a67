"""What this machine can do at most, measured: its rate of arithmetic and its rate of moving memory.

Together they are the roofline (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009): work of so many FLOPs on
so many bytes takes at least max(FLOPs / peak, bytes / bandwidth).
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ctrlcompile.kernels import build, cpp_factors, cpp_vectors, isa

_COPIED_BYTES = 128 << 20  # more than a last-level cache holds
_ROUNDS = 200_000

_MULTIPLY_ADDS = """
}  // namespace

// Multiply-adds of `rounds` rounds on each of `threads` threads: twelve independent sums each, as many as hide latency.
extern "C" void multiply_adds(int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    factors<Wide> row = {}, columns = {};
    Wide::f sums[12] = {};
    asm volatile("" : "+x"(row), "+x"(columns));  // could be anything
    for (int64_t i = 0; i < rounds; ++i) {
      UNROLL for (int j = 0; j < 12; ++j) sums[j] = multiply_add<Wide>(sums[j], row, columns);
      UNROLL for (int j = 0; j < 12; ++j) asm volatile("" : "+x"(sums[j]));
    }
  }
}
"""


class Load(NamedTuple):
    """Something to be timed: one call of `run` does `amount` FLOPs, or moves as many bytes."""

    run: Callable[[], object]
    amount: float


def peak(device: torch.device, dtype: torch.dtype) -> Load:
    """Arithmetic at full rate.

    On a CPU, what our kernels multiply with: fused multiply-adds in float32, or of pairs in bfloat16 where the CPU has
    these; on another device, or where no kernel can be built, a large dense product in the type.
    """
    if device.type == "cpu":
        try:
            multiply_adds, terms = _multiply_adds(dtype)
        except build.KernelBuildError:
            return _product(1024, device, dtype)
        threads = torch.get_num_threads()
        return Load(functools.partial(multiply_adds, _ROUNDS, threads), 2.0 * 12 * terms * _ROUNDS * threads)
    return _product(8192, device, dtype)


def copy(device: torch.device) -> Load:
    """A copy between two arrays that no cache holds; what is read and what is written both count."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return Load(functools.partial(target.copy_, source), 2.0 * _COPIED_BYTES)


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Load:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return Load(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), 2.0 * side**3)


@functools.cache
def _multiply_adds(dtype: torch.dtype) -> tuple[Callable[[int, int], None], int]:
    """Runs so many rounds on so many threads, and how many products each adds up in one instruction."""
    target = isa.current(dtype)
    source = (
        cpp_vectors.prelude("The most multiply-adds that a CPU does", target)
        + cpp_factors.source(target, dtype)
        + _MULTIPLY_ADDS
    )
    library = build.load("multiply_adds", source, target.flags)
    library.multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.multiply_adds.restype = None
    return library.multiply_adds, target.lanes * (2 if cpp_factors.takes_pairs(target, dtype) else 1)
