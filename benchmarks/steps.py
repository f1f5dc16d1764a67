"""Whole training steps of a GPT: gated against dense, both compiled, alternating in one run.

    python benchmarks/steps.py                          # 6 layers, 768 wide, 8 sequences of 256, AdamW
    python benchmarks/steps.py --width 384 --json FILE
    python benchmarks/steps.py --device cuda            # GPT-2's size, 16 sequences of 1024, bfloat16 autocast

A step is forward, backward, AdamW (fused), and the gradients set to None; on a GPU it ends when the device has ended.
Every contestant takes one step in turn, so that a drift of the machine's clock meets all alike; a row's speed-up is the
median of its time over the dense step's median.

- `inductor`: the dense model, `backend="inductor"`.
- `density D`: `backend="ctrlprune"`, random masks of that density, no controller; at 1 every block is active.
- `controller`: `cc.Controller` on a budget of 0.4, measured after its ramp; also the share of the step that
  `controller.step` takes, and the share of the FLOPs that probes take.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from rich.console import Console
from rich.table import Table

import ctrlcompile as cc

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Shape, adamw

RAMP_STEPS = 12  # of the controller's short run, before its steps are timed
# GPT-2 has 50257 symbols; a multiple of 64 suits tensor cores, whichever the contestant.
SIZES = {
    "cpu": {"layers": 6, "width": 768, "context": 256, "batch": 8, "symbols": 65},
    "cuda": {"layers": 12, "width": 768, "context": 1024, "batch": 16, "symbols": 50304},
}


class Contestant:
    """A model and its training step."""

    def __init__(
        self, shape: Shape, device: torch.device, backend: str, density: float = 1, budget: float | None = None,
        steps: int = 0,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.device = device
        self.model = GPT(shape).to(device)
        self.optimizer, _ = adamw(self.model, 1e-3, 1000)
        self.controller: cc.Controller | None = None
        self.seconds: list[float] = []
        self.controller_seconds: list[float] = []
        if budget is not None:
            self.controller = cc.Controller(
                self.model, budget=budget, optimizer=self.optimizer, total_steps=steps + RAMP_STEPS, interval=1
            )
        if density < 1:
            for gate in cc.gates(self.model).values():
                gate.update_(torch.rand(gate.grid) < density)
        self.compiled = torch.compile(self.model, backend=backend)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        start = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.compiled(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        before = self._now()
        if self.controller is not None:
            self.controller.step()
        end = self._now()
        self.controller_seconds.append(end - before)
        self.seconds.append(end - start)

    @property
    def density(self) -> float:
        """Of the gated weights, by area."""
        gates = cc.gates(self.model).values()
        area = sum(gate.shape[0] * gate.shape[1] for gate in gates)
        return sum(gate.active_share * gate.shape[0] * gate.shape[1] for gate in gates) / area if area else 1.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    shape = Shape(args.layers, args.width, args.width // 64, args.context, args.symbols)
    entrants: dict[str, Callable[[], Contestant]] = {"inductor": lambda: Contestant(shape, device, "inductor")}
    for density in args.densities:
        entrants[f"density {density:g}"] = functools.partial(Contestant, shape, device, "ctrlprune", density)
    if not args.no_controller:
        entrants["controller"] = lambda: Contestant(shape, device, "ctrlprune", budget=0.4, steps=args.steps)

    contestants: dict[str, Contestant] = {}
    console, started = Console(stderr=True), time.monotonic()
    for name, make in entrants.items():
        if len(contestants) >= 2 and time.monotonic() - started > args.seconds:
            break
        torch._dynamo.reset()
        contestants[name] = contestant = make()
        for _ in range(RAMP_STEPS if contestant.controller else 2):
            contestant.step(*_batch(args))
        contestant.seconds.clear()
        contestant.controller_seconds.clear()
        console.print(f"{name}: compiled")
    for number in range(args.steps):
        for contestant in contestants.values():
            contestant.step(*_batch(args))
        console.print(f"round {number + 1} of {args.steps}")

    rows = [_row(name, contestant, contestants["inductor"]) for name, contestant in contestants.items()]
    _print(rows, args)
    left_out = [name for name in entrants if name not in contestants]
    if left_out:
        print(f"left out after {args.seconds:g} seconds: {', '.join(left_out)}")
    if args.json:
        result = {"machine": describe(device), "sizes": {name: getattr(args, name) for name in SIZES["cpu"]}}
        args.json.write_text(json.dumps(result | {"left_out": left_out, "rows": rows}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    for name, size in SIZES["cpu"].items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {size} on a CPU, {SIZES['cuda'][name]} on a GPU")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each contestant")
    parser.add_argument("--densities", type=float, nargs="*", default=[1.0, 0.4, 0.25])
    parser.add_argument("--no-controller", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf, help="compile no third contestant after so long")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    for name, size in SIZES[args.device].items():
        setattr(args, name, size if getattr(args, name) is None else getattr(args, name))
    if args.width % 64 or min(getattr(args, name) for name in ("steps", *SIZES["cpu"])) < 1:
        parser.error("sizes and steps are at least 1, and the width is a multiple of 64, the width of a head")
    return args


def _batch(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    window = torch.randint(args.symbols, (args.batch, args.context + 1), device=args.device)
    return window[:, :-1], window[:, 1:]


def _row(name: str, contestant: Contestant, dense: Contestant) -> dict[str, Any]:
    median, dense_median = statistics.median(contestant.seconds), statistics.median(dense.seconds)
    row = {
        "name": name,
        "density": contestant.density if name != "inductor" else 1.0,
        "median_s": median,
        "speedup": dense_median / median,
        "seconds": contestant.seconds,
    }
    if contestant.controller is not None:
        row["controller_share"] = sum(contestant.controller_seconds) / sum(contestant.seconds)
    return row


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    types = "bfloat16 autocast" if args.device == "cuda" else "float32"
    title = f"GPT, {args.layers} layers, {args.width} wide, {args.batch} x {args.context} tokens, AdamW, {types}"
    table = Table("contestant", "density", "step, s", "times faster", "controller's share", title=title)
    for row in rows:
        share = f"{row['controller_share']:.2%}" if "controller_share" in row else ""
        table.add_row(row["name"], f"{row['density']:.3f}", f"{row['median_s']:.4f}", f"{row['speedup']:.2f}", share)
    Console().print(table)


if __name__ == "__main__":
    main()
