"""Block-sparse convolutions against dense ones: how much of the work that is skipped becomes time.

    python benchmarks/convolutions.py                      # a CPU: 3x3, the sizes of a ResNet on CIFAR
    python benchmarks/convolutions.py --shapes 1 --blocks 32 --json FILE
    python benchmarks/convolutions.py --device cuda        # a GPU: bfloat16, the sizes of a ResNet on ImageNet

For each shape, block and role (forward, dgrad, wgrad), in one run and alternating: ours at each density of a random
mask, the dense convolution eager on contiguous and on channels-last tensors, and compiled by Inductor (on the latter),
and the machine's peak. Medians, of random data. On a GPU several calls are captured in one CUDA graph, and what eager
calls is cuDNN. Columns are those of `benchmarks/kernels.py`.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ctrlcompile.inspect import limits
from ctrlcompile.inspect.clock import alternate
from ctrlcompile.kernels import cpu_conv, index_lists, triton_conv
from ctrlcompile.kernels.window import Window, channels_last
from kernels import DENSITIES, GRAPH_CALLS, Block, Row, a_block, break_even, random_mask, together


class Shape(NamedTuple):
    """A 3x3 convolution, padded by 1, of square images."""

    images: int
    inputs: int
    outputs: int
    size: int
    stride: int

    @property
    def flops(self) -> int:
        """Of each role; 2 per multiply-add."""
        return 2 * self.images * (self.size // self.stride) ** 2 * self.inputs * self.outputs * 9


@dataclass(frozen=True)
class Setting:
    """What is measured on a kind of device unless asked otherwise; the first shapes matter most."""

    kernels: Any  # what has forward, dgrad, wgrad and supported
    shapes: tuple[Shape, ...]
    blocks: tuple[Block, ...]
    dtype: torch.dtype
    calls: int  # that are timed together


SETTINGS = {
    "cpu": Setting(
        cpu_conv,
        (
            Shape(32, 64, 64, 32, 1),
            Shape(32, 128, 128, 16, 1),
            Shape(32, 256, 256, 8, 1),
            Shape(32, 512, 512, 4, 1),
            Shape(32, 128, 256, 16, 2),
        ),
        ((16, 16), (32, 32)),
        torch.float32,
        1,
    ),
    "cuda": Setting(
        triton_conv,
        (
            Shape(256, 256, 256, 14, 1),
            Shape(256, 128, 128, 28, 1),
            Shape(256, 512, 512, 7, 1),
            Shape(256, 64, 64, 56, 1),
            Shape(256, 256, 512, 14, 2),
        ),
        ((64, 64), (128, 64)),
        torch.bfloat16,
        GRAPH_CALLS,
    ),
}
ROLES = ("forward", "dgrad", "wgrad")


def compare(shape: Shape, block: Block, rounds: int, device: torch.device) -> list[Row]:
    """What was measured, a row for each role and density."""
    setting = SETTINGS[device.type]
    kernels, out = setting.kernels, [shape.size // shape.stride] * 2

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(setting.dtype)

    x, grad = normal(shape.images, shape.inputs, shape.size, shape.size), normal(shape.images, shape.outputs, *out)
    weight = normal(shape.outputs, shape.inputs, 3, 3) / (9 * shape.inputs) ** 0.5
    last = tuple(channels_last(tensor) for tensor in (x, grad, weight))
    window = Window((shape.stride,) * 2, ((1, 1), (1, 1)), (1, 1))
    grid = index_lists.grid_shape((shape.outputs, shape.inputs), block)
    masks = {density: random_mask(grid, density).to(device) for density in DENSITIES}
    lists = {density: index_lists.build(mask) for density, mask in masks.items()}
    probes = torch.full((max(1, grid[0] * grid[1] // 64),), -1, dtype=torch.int32, device=device)

    def ours(role: str, density: float) -> Tensor:
        if role == "forward":
            return kernels.forward(last[0], weight, None, lists[density], block, "none", window)[0]
        if role == "dgrad":
            return kernels.dgrad(last[1], weight, lists[density], block, window, (shape.size,) * 2)
        return kernels.wgrad(last[1], last[0], weight, lists[density], probes, block, window)[0]

    def timed_together(call: Callable[[], object]) -> Callable[[], object]:
        return together([call] * setting.calls, device)

    peak, rows = limits.peak(device, setting.dtype), []
    for role in ROLES:
        product = dense(role, shape.stride)
        timed: dict[Any, Callable[[], object]] = {
            "peak": peak.run,
            "eager": timed_together(functools.partial(product, x, grad, weight)),
            "channels-last": timed_together(functools.partial(product, *last)),
            "inductor": timed_together(functools.partial(torch.compile(product, dynamic=False), *last)),
        }
        for density in DENSITIES:
            timed[density] = timed_together(functools.partial(ours, role, density))
        times = alternate(timed, rounds, device)
        seconds = {name: statistics.median(values) / setting.calls for name, values in times.items()}
        multiply_adds = peak.amount / statistics.median(times["peak"])  # FLOP/s
        ways = {way: seconds[way] for way in ("eager", "channels-last", "inductor")}
        actual = {density: mask.float().mean().item() for density, mask in masks.items()}
        crossing = break_even({actual[d]: seconds[d] for d in DENSITIES}, min(ways.values()))
        for density in DENSITIES:
            rows.append(
                {
                    "role": role, **shape._asdict(), "block": list(block), "density": actual[density],
                    "ours_ms": seconds[density] * 1e3, "dense_ms": {way: s * 1e3 for way, s in ways.items()},
                    "speedup": min(ways.values()) / seconds[density],
                    "of_best": actual[density] * min(ways.values()) / seconds[density],
                    "of_peak": shape.flops * actual[density] / seconds[density] / multiply_adds,
                    "break_even": crossing,
                }
            )  # fmt: skip
    return rows


def dense(role: str, stride: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The framework's convolution, or a gradient of it, of x, the output's gradient and the weight."""
    if role == "forward":
        return lambda x, grad, weight: torch.ops.aten.conv2d(x, weight, None, [stride] * 2, [1, 1])
    wanted = [role == "dgrad", role == "wgrad", False]

    def gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        arguments = (grad, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, wanted)
        return torch.ops.aten.convolution_backward(*arguments)[wanted.index(True)]

    return gradient


def show(rows: list[Row]) -> None:
    table = Table(header_style="bold", box=None)
    for heading in ("images x in x out, size", "block", "role"):
        table.add_column(heading)
    for heading in ("density", "ours ms", "dense ms", "speed-up", "of best", "of peak", "break-even"):
        table.add_column(heading, justify="right")
    for row in rows:
        best = min(row["dense_ms"], key=lambda way: row["dense_ms"][way])
        stride = f", stride {row['stride']}" if row["stride"] > 1 else ""
        table.add_row(
            f"{row['images']} x {row['inputs']} x {row['outputs']}, {row['size']}{stride}",
            "x".join(map(str, row["block"])), row["role"], f"{row['density']:.3f}", f"{row['ours_ms']:.3f}",
            f"{row['dense_ms'][best]:.3f} {best}", f"{row['speedup']:.2f}x", f"{row['of_best']:.2f}",
            f"{row['of_peak']:.2f}", f"{row['break_even']:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SETTINGS, default="cpu")
    parser.add_argument("--shapes", type=int, nargs="+", help="which of the device's shapes, by number from 0")
    parser.add_argument("--images", type=int, help="of a batch; default: 32 on a CPU, 256 on a GPU")
    parser.add_argument("--blocks", type=a_block, nargs="+", metavar="BLOCK", help="64, or 128x64 as out x in")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape and block after so long")
    parser.add_argument("--json", type=Path, help="write the results here, after every shape and block")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    started, device, setting = time.monotonic(), torch.device(args.device), SETTINGS[args.device]
    numbers, blocks = args.shapes or range(len(setting.shapes)), args.blocks or setting.blocks
    if not all(0 <= number < len(setting.shapes) for number in numbers):
        parser.error(f"--shapes are numbered 0 to {len(setting.shapes) - 1}")
    for block in blocks:
        if (reason := setting.kernels.supported(setting.dtype, setting.dtype, block)) is not None:
            parser.error(reason)
    torch._dynamo.config.recompile_limit = 8 * len(setting.shapes) * len(blocks)
    rows: list[Row] = []
    left_out = [(setting.shapes[number], block) for number in numbers for block in blocks]
    while left_out and not (rows and time.monotonic() - started > args.seconds):
        shape, block = left_out.pop(0)
        rows += compare(shape._replace(images=args.images or shape.images), block, args.rounds, device)
        if args.json:
            left = [{**shape._asdict(), "block": block} for shape, block in left_out]
            found = {"machine": describe(device), "left_out": left, "rows": rows}
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
