"""Block-sparse kernels against dense products: how much of the work that is skipped becomes time.

    python benchmarks/kernels.py                    # a CPU: all shapes, blocks, densities; about ten minutes
    python benchmarks/kernels.py --quick            # two shapes, blocks of 32, without autotuning: about a minute
    python benchmarks/kernels.py --device cuda      # a GPU: bfloat16; see `--seconds`

For each shape, block and role (forward, dgrad, wgrad), in one run and alternating: ours at each density of a random
mask, the dense product eager (cuBLAS on a GPU) and autotuned by Inductor, and the machine's own limits. Medians, of
random data. On a GPU several calls are captured in one CUDA graph and timed by events, so that no host time is in them,
over more inputs than the second-level cache holds. `--bsr` times PyTorch's own block-sparse linear, called as it is.

- `dense`: the best of the dense ways; `speed-up`: its time over ours.
- `of eager`, `of best`: density x dense time / ours, of the eager way and of the best: 1 where a skipped block costs
  nothing and the others what they cost the dense product; the rate as a fraction of the dense product's at equal FLOPs.
- `of peak`: our FLOP rate over that of nothing but multiply-adds, medians of the same rounds.
- `of roofline`: the least time, max(FLOPs / peak, bytes / bandwidth), over ours, with the highest peak and bandwidth
  that the run saw.
- `break-even`: the density below which ours is faster than the best dense way; `tuned`: what the tuner takes it to be.
- `BSR`: the time of PyTorch's block-sparse linear over ours.
- `error`: root mean square against float64, over that of the dense product in the same type.

On two cores of an AMD EPYC (Zen 3, AVX2), `--shapes 1 --blocks 64` measures (columns to the right left out):

    M, K, N          block  role     density  ours ms         dense ms  speed-up  of best  of roofline
    2048, 768, 3072  64x64  forward    0.500   30.000  68.180 autotuned    2.27x     1.09         0.76
    2048, 768, 3072  64x64  dgrad      0.500   29.660      66.020 eager    2.23x     1.06         0.77
    2048, 768, 3072  64x64  wgrad      0.500   29.980      58.340 eager    1.95x     0.93         0.76
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ctrlcompile.inspect import limits
from ctrlcompile.inspect.clock import alternate
from ctrlcompile.kernels import cpu_linear, index_lists, triton_linear

DENSITIES = (1.0, 0.5, 0.25, 0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAPH_CALLS = 8  # at least so many calls in one CUDA graph, whose launch costs as much as a small product

Sizes = tuple[int, int, int]  # M, K, N
Block = tuple[int, int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is measured on a kind of device unless asked otherwise; the first shapes matter most."""

    kernels: Any  # what has forward, dgrad, wgrad and supported
    shapes: tuple[Sizes, ...]
    blocks: tuple[Block, ...]
    dtype: str
    rounds: int


SETTINGS = {
    "cpu": Setting(
        cpu_linear,
        ((512, 1024, 3072), (2048, 768, 3072), (2048, 3072, 768), (4096, 768, 768), (2048, 384, 1536)),
        ((32, 32), (64, 64)),
        "float32",
        7,
    ),
    "cuda": Setting(
        triton_linear,
        ((8192, 4096, 4096), (16384, 1024, 4096), (16384, 4096, 1024), (4096, 8192, 8192), (4096, 1024, 1024)),
        ((128, 64), (128, 128), (64, 64)),
        "bfloat16",
        15,
    ),
}


class Inputs(NamedTuple):
    """x `[M, K]`, the gradient of the output `[M, N]` and the weight `[N, K]`."""

    x: Tensor
    grad: Tensor
    weight: Tensor


class Rates(NamedTuple):
    """What the machine can do at most: FLOP/s and bytes/s."""

    peak: float
    bandwidth: float

    def least_seconds(self, flops: float, moved: float) -> float:
        """The roofline: work of so many FLOPs on so many bytes takes at least so long."""
        return max(flops / self.peak, moved / self.bandwidth)


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward": lambda x, grad, weight: F.linear(x, weight),
    "dgrad": lambda x, grad, weight: grad @ weight,
    "wgrad": lambda x, grad, weight: grad.t() @ x,
}
Ways = Mapping[str, Callable[..., Tensor]]


def dense_ways(device: torch.device, autotune: bool) -> dict[str, Ways]:
    """For each role, the dense product by the ways that PyTorch has of computing it."""
    ways: dict[str, Ways] = {}
    for role, product in PRODUCTS.items():
        known: dict[str, Callable[..., Tensor]] = {"eager": product}
        if device.type == "cpu":  # on a GPU Inductor calls what eager calls, unless it tunes
            known["inductor"] = torch.compile(product, dynamic=False)
        if autotune:
            known["autotuned"] = torch.compile(product, mode="max-autotune-no-cudagraphs", dynamic=False)
        ways[role] = known
    return ways


def compare(
    shape: Sizes, block: Block, dtype: torch.dtype, device: torch.device, kernels: Any, dense: Mapping[str, Ways],
    rounds: int, bsr: bool,
) -> tuple[list[Row], Rates]:  # fmt: skip
    """What was measured, one row for each role and density, and the rates of the machine meanwhile."""
    m, k, n = shape
    sets = draw(shape, dtype, device)
    grid = index_lists.grid_shape((n, k), block)
    masks = {density: random_mask(grid, density).to(device) for density in DENSITIES}
    lists = {density: index_lists.build(mask) for density, mask in masks.items()}
    entries = {density: index_lists.expand(mask, block, (n, k)) for density, mask in masks.items()}
    actual = {density: mask.float().mean().item() for density, mask in masks.items()}
    probes = torch.full((max(1, grid[0] * grid[1] // 64),), -1, dtype=torch.int32, device=device)

    def ours(role: str, density: float, inputs: Inputs) -> Tensor:
        x, grad, weight = inputs
        if role == "forward":
            return kernels.forward(x, weight, None, lists[density], block, "none")[0]
        if role == "dgrad":
            return kernels.dgrad(grad, weight, lists[density], block)
        return kernels.wgrad(grad, x, weight, lists[density], probes, block)[0]

    peak, copy = limits.peak(device, dtype), limits.copy(device)
    rates: list[Rates] = []
    rows: list[Row] = []
    for role, ways in dense.items():
        refused: dict[float, str] = {}
        timed: dict[Any, Callable[[], object]] = {"peak": peak.run, "copy": copy.run}
        for way, product in ways.items():
            timed[way] = together([functools.partial(product, *inputs) for inputs in sets], device)
        for density in DENSITIES:
            timed[density] = together([functools.partial(ours, role, density, inputs) for inputs in sets], device)
        for density in DENSITIES if bsr and role == "forward" else ():
            try:
                timed["bsr", density] = block_sparse(sets, entries[density], block)
            except Exception as error:  # whatever it does not take: other contestants run all the same
                refused[density] = f"{type(error).__name__}: {error}"
        times = alternate(timed, rounds, device)
        seconds = {name: statistics.median(values) / len(sets) for name, values in times.items()}
        rates.append(Rates(peak.amount / min(times["peak"]), copy.amount / min(times["copy"])))
        best = min(seconds[way] for way in ways)
        tuned = kernels.crossover(role, dtype, block, m, n, k, sets[0].x.device) if kernels is triton_linear else None
        crossing, inputs = break_even({actual[density]: seconds[density] for density in DENSITIES}, best), sets[0]
        for density in DENSITIES:
            rows.append(
                {
                    "role": role, "M": m, "K": k, "N": n, "block": list(block),
                    "dtype": str(dtype).removeprefix("torch."), "density": actual[density],
                    "ours_ms": seconds[density] * 1e3, "dense_ms": {way: seconds[way] * 1e3 for way in ways},
                    "peak_flops": peak.amount / statistics.median(times["peak"]),
                    "bsr_ms": seconds["bsr", density] * 1e3 if ("bsr", density) in seconds else None,
                    "bsr_refused": refused.get(density),
                    "break_even": crossing, "tuned_break_even": tuned,
                    "error": error_ratio(role, inputs, entries[density], ours(role, density, inputs)),
                }
            )  # fmt: skip
    return rows, fastest(rates)


def draw(shape: Sizes, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """Random inputs; on a GPU so many sets in turn that its second-level cache never holds what the next call reads."""
    m, k, n = shape
    bytes_of_a_set = (m * k + m * n + n * k) * dtype.itemsize
    cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = [
        Inputs(*(torch.randn(size, device=device).to(dtype) for size in ((m, k), (m, n), (n, k))))
        for _ in range(max(1, math.ceil(cache / bytes_of_a_set)))
    ]
    calls = max(GRAPH_CALLS, len(sets)) if device.type == "cuda" else 1
    return [sets[i % len(sets)] for i in range(calls)]


def random_mask(grid: tuple[int, int], density: float) -> Tensor:
    """Boolean `grid`, with exactly so many of its blocks active, one at least."""
    blocks = grid[0] * grid[1]
    mask = torch.zeros(blocks, dtype=torch.bool)
    mask[torch.randperm(blocks)[: max(1, round(density * blocks))]] = True
    return mask.view(grid)


def together(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """All of the calls as one; on a GPU captured in a CUDA graph, after a first time that compiles and tunes."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(kept: object = calls) -> None:  # they hold the memory that the graph reads
        graph.replay()

    return replay


def block_sparse(sets: Sequence[Inputs], entries: Tensor, block: Block) -> Callable[[], object]:
    """PyTorch's block-sparse linear on all of the inputs, ready to call. Raises what it raises."""
    weights = {id(inputs): torch.where(entries, inputs.weight, 0).to_sparse_bsr(block) for inputs in sets}

    def run() -> None:
        for inputs in sets:
            F.linear(inputs.x, weights[id(inputs)])

    run()
    return run


def error_ratio(role: str, inputs: Inputs, entries: Tensor, ours: Tensor) -> float:
    """Root mean square error of ours against float64, over that of the dense product in the same type."""

    def dense(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        if role == "wgrad":
            return torch.where(entries, PRODUCTS[role](x, grad, weight), 0)
        return PRODUCTS[role](x, grad, torch.where(entries, weight, 0))

    exact = dense(*(tensor.double() for tensor in inputs))
    error, dense_error = ((result.double() - exact).square().mean().sqrt().item() for result in (ours, dense(*inputs)))
    return error / dense_error


def break_even(ours: Mapping[float, float], dense: float) -> float:
    """The density below which ours is faster, on the line between the two measured densities around it.

    `ours` are seconds by density, `dense` seconds. 1 where ours is faster at the highest density measured, 0 where it
    is slower at the lowest.
    """
    densities = sorted(ours, reverse=True)
    if ours[densities[0]] <= dense:
        return 1.0
    for above, below in itertools.pairwise(densities):
        if ours[below] <= dense:
            return below + (above - below) * (dense - ours[below]) / (ours[above] - ours[below])
    return 0.0


def fastest(rates: Sequence[Rates]) -> Rates:
    """The highest of each rate."""
    return Rates(max(rate.peak for rate in rates), max(rate.bandwidth for rate in rates))


def ratios(row: Row, rates: Rates) -> Row:
    """A measured row with what follows from it."""
    m, k, n, density, ours = row["M"], row["K"], row["N"], row["density"], row["ours_ms"] / 1e3
    way = min(row["dense_ms"], key=lambda name: row["dense_ms"][name])
    best, eager = row["dense_ms"][way] / 1e3, row["dense_ms"]["eager"] / 1e3
    flops = 2 * m * k * n * density
    # Input and output whole, of the weight the active blocks; wgrad also writes its gradient, zeros and all.
    moved = (m * (k + n) + n * k * (density + (row["role"] == "wgrad"))) * DTYPES[row["dtype"]].itemsize
    return row | {
        "dense_way": way, "speedup": best / ours, "of_eager": density * eager / ours, "of_best": density * best / ours,
        "flops": flops / ours, "of_peak": flops / row["peak_flops"] / ours,
        "of_roofline": rates.least_seconds(flops, moved) / ours,
        "bsr_ratio": row["bsr_ms"] / row["ours_ms"] if row["bsr_ms"] is not None else None,
    }  # fmt: skip


def show(rows: Sequence[Row], rates: Rates) -> None:
    """A line for each shape, block, role and density."""
    peak, bandwidth = rates.peak / 1e9, rates.bandwidth / 1e9
    table = Table(title=f"at most {peak:.4g} GFLOP/s and {bandwidth:.4g} GB/s, measured", header_style="bold", box=None)
    for heading in ("M, K, N", "block", "role"):
        table.add_column(heading)
    for heading in ("density", "ours ms", "dense ms", "speed-up", "of eager", "of best", "of peak", "of roofline"):
        table.add_column(heading, justify="right")
    for heading in ("break-even", "tuned", "BSR", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        tuned, bsr = row["tuned_break_even"], row["bsr_ratio"]
        table.add_row(
            f"{row['M']}, {row['K']}, {row['N']}", "x".join(map(str, row["block"])), row["role"],
            f"{row['density']:.3f}", f"{row['ours_ms']:.3f}",
            f"{row['dense_ms'][row['dense_way']]:.3f} {row['dense_way']}", f"{row['speedup']:.2f}x",
            f"{row['of_eager']:.2f}", f"{row['of_best']:.2f}", f"{row['of_peak']:.2f}", f"{row['of_roofline']:.2f}",
            f"{row['break_even']:.2f}", "" if tuned is None else f"{tuned:.2f}",
            "" if bsr is None else f"{bsr:.1f}x", f"{row['error']:.2f}",
        )  # fmt: skip
    Console(width=160).print(table)


def a_block(text: str) -> Block:
    """`64` or `128x64`, as block_out x block_in. Raises ValueError for anything else."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0], sides[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SETTINGS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, the first block, no autotuning")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--blocks", type=a_block, nargs="+", metavar="BLOCK", help="64, or 128x64 as out x in")
    parser.add_argument("--shapes", type=int, nargs="+", help="which of the device's shapes, by number from 0")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=("M", "K", "N"), help="a shape of one's own instead")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: 7 on a CPU, 15 on a GPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape and block after so long")
    parser.add_argument("--no-autotune", action="store_true", help="leave out Inductor's autotuned products")
    parser.add_argument("--bsr", action="store_true", help="time PyTorch's own block-sparse linear, too")
    parser.add_argument("--json", type=Path, help="write the results here, after every shape and block")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support")

    started, device, setting = time.monotonic(), torch.device(args.device), SETTINGS[args.device]
    dtype = DTYPES[args.dtype or setting.dtype]
    numbers = args.shapes or ([1, 2] if args.quick else range(len(setting.shapes)))
    if not all(0 <= number < len(setting.shapes) for number in numbers):
        parser.error(f"--shapes are numbered 0 to {len(setting.shapes) - 1}")
    shapes = [tuple(args.sizes)] if args.sizes else [setting.shapes[number] for number in numbers]
    blocks = args.blocks or (setting.blocks[:1] if args.quick else setting.blocks)
    for block in blocks:
        if (reason := setting.kernels.supported(dtype, dtype, block)) is not None:
            parser.error(reason)
    dense = dense_ways(device, autotune=not (args.quick or args.no_autotune))
    torch._dynamo.config.recompile_limit = 8 * len(shapes)

    rows: list[Row] = []
    rates: list[Rates] = []
    cases = [(shape, block) for shape in shapes for block in blocks]
    for number, (shape, block) in enumerate(cases):
        if rows and time.monotonic() - started > args.seconds:
            break
        rounds = args.rounds or setting.rounds
        measured, case_rates = compare(shape, block, dtype, device, setting.kernels, dense, rounds, args.bsr)
        rows += measured
        rates.append(case_rates)
        if args.json:
            left_out = [{"sizes": shape, "block": block} for shape, block in cases[number + 1 :]]
            at_most = fastest(rates)
            result = {
                "machine": describe(device, dtype), "peak_flops": at_most.peak, "copy_bytes": at_most.bandwidth,
                "left_out": left_out, "rows": [ratios(row, at_most) for row in rows],
            }  # fmt: skip
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    show([ratios(row, fastest(rates)) for row in rows], fastest(rates))
    if left := len(cases) - len(rates):
        print(f"{left} of {len(cases)} shapes and blocks left out after {args.seconds:g} seconds")


if __name__ == "__main__":
    main()
