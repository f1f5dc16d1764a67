"""Block-sparse kernels against dense products: how much of the work that is skipped becomes time.

    python benchmarks/kernels.py            # all shapes, blocks, densities: about ten minutes
    python benchmarks/kernels.py --quick    # two shapes, blocks of 32, without autotuning: about a minute

For each shape, block and density, in one run and alternating: ours and the dense product, eager, compiled by Inductor
and autotuned by it (the best of the three counts). Two ratios are printed for each role, forward, dgrad, wgrad: density
x dense time / our time, which is 1 where a skipped block costs nothing and the others what they cost the dense product;
and our FLOP rate over the peak rate of fused multiply-adds, measured in the same run. With `--bsr`, PyTorch's own
block-sparse linear is timed as well. Times are medians; results go to `benchmarks/results/kernels.json`.

On two cores of an AMD EPYC (Zen 3, AVX2), `--shapes 1 2 --blocks 32 64 --rounds 7` ends in (columns: density):

    M, K, N          block  role      dense of peak          1.0          0.5         0.25          0.1
    2048, 768, 3072     64  forward  0.70 autotuned  1.08 (0.76)  1.09 (0.76)  1.06 (0.74)  0.91 (0.64)
    2048, 768, 3072     64  dgrad        0.72 eager  1.08 (0.78)  1.06 (0.77)  1.03 (0.74)  0.93 (0.68)
    2048, 768, 3072     64  wgrad        0.82 eager  0.95 (0.78)  0.93 (0.76)  0.91 (0.75)  0.80 (0.65)
    ...
"""

import argparse
import ctypes
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ctrlcompile.kernels import build, cpp_vectors, cpu_linear, index_lists, isa

SHAPES = [(512, 1024, 3072), (2048, 768, 3072), (2048, 3072, 768), (4096, 768, 768), (2048, 384, 1536)]  # M, K, N
DENSITIES = [1.0, 0.5, 0.25, 0.1]
ROLES = ["forward", "dgrad", "wgrad"]
Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PEAK = """
}  // namespace

// Multiply-adds of `rounds` rounds on each of `threads` threads: twelve independent sums each, as many as hide latency.
extern "C" void multiply_adds(int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Wide::f sums[12] = {}, a = {}, b = {};
    for (int64_t i = 0; i < rounds; ++i) {
      UNROLL for (int j = 0; j < 12; ++j) sums[j] += a * b;
      UNROLL for (int j = 0; j < 12; ++j) asm volatile("" : "+x"(sums[j]));
    }
  }
}
"""


def measure_peak() -> Callable[[], float]:
    """A function that measures the machine's rate of fused multiply-adds, in FLOP/s."""
    target, threads, rounds = isa.current(), torch.get_num_threads(), 2_000_000
    source = cpp_vectors.prelude(target) + f"typedef v{target.lanes} Wide;\n" + PEAK
    library = build.load("peak", source, target.flags)
    library.multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int]

    def measure() -> float:
        started = time.perf_counter()
        library.multiply_adds(rounds, threads)
        return 2 * 12 * target.lanes * rounds * threads / (time.perf_counter() - started)

    return measure


def dense_products(autotune: bool) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """For each role, the dense product by every way that PyTorch has of computing it."""
    products: dict[str, Callable[..., Tensor]] = {
        "forward": lambda x, g, w: F.linear(x, w),
        "dgrad": lambda x, g, w: g @ w,
        "wgrad": lambda x, g, w: g.t() @ x,
    }
    ways = {}
    for role, product in products.items():
        ways[role] = {"eager": product, "inductor": torch.compile(product, dynamic=False)}
        if autotune:
            ways[role]["autotuned"] = torch.compile(product, mode="max-autotune", dynamic=False)
    return ways


def compare(
    shape: tuple[int, int, int], block: int, dtype: torch.dtype, dense: dict[str, dict[str, Callable[..., Tensor]]],
    rounds: int, bsr: bool,
) -> list[Row]:  # fmt: skip
    """One row of results for each role and density."""
    m, k, n = shape
    x, g, w = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    grid, sides = index_lists.grid_shape((n, k), (block, block)), (block, block)
    masks = {density: torch.rand(grid) < density for density in DENSITIES}
    lists = {density: index_lists.build(mask) for density, mask in masks.items()}
    probes = torch.full((8,), -1, dtype=torch.int32)
    ours: dict[str, Callable[[float], object]] = {
        "forward": lambda d: cpu_linear.forward(x, w, None, lists[d], sides, "none"),
        "dgrad": lambda d: cpu_linear.dgrad(g, w, lists[d], sides),
        "wgrad": lambda d: cpu_linear.wgrad(g, x, w, lists[d], probes, sides),
    }
    rows = []
    for role in ROLES:
        calls: dict[object, Callable[[], object]] = {
            way: functools.partial(function, x, g, w) for way, function in dense[role].items()
        }
        calls |= {density: functools.partial(ours[role], density) for density in DENSITIES}
        if bsr and role == "forward":
            for density in DENSITIES:
                entries = index_lists.expand(masks[density], sides, (n, k))
                sparse = torch.where(entries, w, 0).to_sparse_bsr(sides)
                calls["bsr", density] = functools.partial(F.linear, x, sparse)
        times = alternate(calls, rounds)
        way = min(dense[role], key=lambda name: times[name])
        for density in DENSITIES:
            active = masks[density].float().mean().item()
            rows.append(
                {
                    "role": role, "M": m, "K": k, "N": n, "block": block, "density": density,
                    "dtype": str(dtype).removeprefix("torch."), "ours_ms": times[density] * 1e3,
                    "dense_ms": times[way] * 1e3, "dense_way": way,
                    "efficiency": active * times[way] / times[density],
                    "flops": 2 * m * k * n * active / times[density],
                    "bsr_ms": times["bsr", density] * 1e3 if ("bsr", density) in times else None,
                }
            )  # fmt: skip
    return rows


def alternate(calls: dict[object, Callable[[], object]], rounds: int) -> dict[object, float]:
    """The median time of each call, in seconds, over rounds that make each call once."""
    for call in calls.values():  # compiles, and settles the allocator
        call()
        call()
    times: dict[object, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def show(rows: list[Row], peak: float) -> None:
    """A line for each shape and block; a cell holds density x dense time / our time, and the fraction of peak."""
    table = Table(title=f"density x dense time / our time (our rate / {peak / 1e9:.0f} GFLOP/s)")
    for heading in ("M, K, N", "block", "type", "role", "dense of peak", *map(str, DENSITIES)):
        table.add_column(heading, justify="left" if heading in ("M, K, N", "role") else "right")
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        line = (f"{row['M']}, {row['K']}, {row['N']}", row["block"], row["dtype"], row["role"])
        lines.setdefault(line, []).append(row)
    for key, cells in lines.items():
        first = cells[0]
        dense = 2e3 * first["M"] * first["K"] * first["N"] / first["dense_ms"] / peak
        texts = [f"{cell['efficiency']:.2f} ({cell['of_peak']:.2f})" for cell in cells]
        table.add_row(*map(str, key), f"{dense:.2f} {first['dense_way']}", *texts)
    Console(width=130).print(table)


def machine() -> dict[str, object]:
    """What the figures were taken on and with."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    version = subprocess.run([*build.compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {
        "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": isa.current().name,
        "torch": torch.__version__, "python": platform.python_version(), "compiler": version,
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Block-sparse kernels against dense products.")
    parser.add_argument("--quick", action="store_true", help="two shapes, blocks of 32, no autotuning")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--shapes", type=int, nargs="+", help="which of the shapes, by number from 0")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-autotune", action="store_true", help="leave out Inductor's autotuned products")
    parser.add_argument("--bsr", action="store_true", help="time PyTorch's own block-sparse linear, too")
    parser.add_argument("--json", type=Path, help="where results go")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support")

    chosen = arguments.shapes or ([1, 2] if arguments.quick else range(len(SHAPES)))
    blocks = [32] if arguments.quick else arguments.blocks
    dense = dense_products(autotune=not (arguments.quick or arguments.no_autotune))
    measure = measure_peak()
    peak = max(measure() for _ in range(5))
    torch._dynamo.config.recompile_limit = 8 * len(SHAPES)
    rows: list[Row] = []
    for i in chosen:
        for block in blocks:
            rows += compare(SHAPES[i], block, DTYPES[arguments.dtype], dense, arguments.rounds, arguments.bsr)
            peak = max(peak, measure())
    for row in rows:
        row["of_peak"] = row["flops"] / peak
    show(rows, peak)
    name = "kernels.json" if arguments.dtype == "float32" else f"kernels_{arguments.dtype}.json"
    path = arguments.json or Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "peak_flops": peak, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
