"""Whole training steps of a GPT: gated against dense, both compiled, alternating in one run.

    python benchmarks/steps.py                          # 6 layers, 768 wide, 8 sequences of 256, AdamW
    python benchmarks/steps.py --width 384 --json FILE

A step is forward, backward, AdamW, and the gradients set to None. Every contestant takes one step in turn, so that a
drift of the machine's clock meets all alike; a row's speed-up is the median of its time over the dense step's median.

- `inductor`: the dense model, `backend="inductor"`.
- `nothing masked`: `backend="ctrlprune"`, every block active, no controller.
- `density D`: random masks of that density, no controller.
- `controller`: `cc.Controller` on a budget of 0.4, measured after its ramp; also the share of the step that
  `controller.step` takes, and the share of the FLOPs that probes take.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ctrlcompile as cc
from ctrlcompile.kernels import isa

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT, Shape, adamw

RAMP_STEPS = 12  # of the controller's short run, before its steps are timed


class Contestant:
    """A model and its training step."""

    def __init__(
        self, shape: Shape, backend: str, density: float | None = None, budget: float | None = None, steps: int = 0
    ):
        torch.manual_seed(0)
        self.model = GPT(shape)
        self.optimizer, _ = adamw(self.model, 1e-3, 1000)
        self.controller: cc.Controller | None = None
        self.seconds: list[float] = []
        self.controller_seconds: list[float] = []
        if budget is not None:
            self.controller = cc.Controller(
                self.model, budget=budget, optimizer=self.optimizer, total_steps=steps + RAMP_STEPS, interval=1
            )
        if density is not None:
            for gate in cc.gates(self.model).values():
                gate.update_(torch.rand(gate.grid) < density)
        self.compiled = torch.compile(self.model, backend=backend)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        start = time.perf_counter()
        self.compiled(tokens, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        before = time.perf_counter()
        if self.controller is not None:
            self.controller.step()
        end = time.perf_counter()
        self.controller_seconds.append(end - before)
        self.seconds.append(end - start)

    @property
    def density(self) -> float:
        gates = cc.gates(self.model).values()
        area = sum(gate.shape[0] * gate.shape[1] for gate in gates)
        return sum(gate.active_share * gate.shape[0] * gate.shape[1] for gate in gates) / area


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each contestant")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.4, 0.25])
    parser.add_argument("--no-controller", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    shape = Shape(args.layers, args.width, args.width // 64, args.context, 65)
    entrants: dict[str, Callable[[], Contestant]] = {
        "inductor": lambda: Contestant(shape, "inductor"),
        "nothing masked": lambda: Contestant(shape, "ctrlprune"),
    }
    for density in args.densities:
        entrants[f"density {density:g}"] = functools.partial(Contestant, shape, "ctrlprune", density)
    if not args.no_controller:
        entrants["controller"] = lambda: Contestant(shape, "ctrlprune", budget=0.4, steps=args.steps)

    contestants: dict[str, Contestant] = {}
    console = Console(stderr=True)
    for name, make in entrants.items():
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
    if args.json:
        machine = {"cpu": _cpu(), "threads": torch.get_num_threads(), "isa": isa.current().name}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        command = " ".join(["python", "benchmarks/steps.py", *sys.argv[1:]])
        result = {"command": command, "machine": machine, "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _batch(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    window = torch.randint(65, (args.batch, args.context + 1))
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
    title = f"GPT, {args.layers} layers, {args.width} wide, {args.batch} x {args.context} tokens, AdamW"
    table = Table("contestant", "density", "step, s", "times faster", "controller's share", title=title)
    for row in rows:
        share = f"{row['controller_share']:.2%}" if "controller_share" in row else ""
        table.add_row(row["name"], f"{row['density']:.3f}", f"{row['median_s']:.3f}", f"{row['speedup']:.2f}", share)
    Console().print(table)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
