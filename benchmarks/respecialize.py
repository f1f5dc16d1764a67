"""A run whose density goes 1.0 -> 0.5 -> 0.2 -> 0.6: respecialised as it goes, against every fixed variant.

    python benchmarks/respecialize.py                 # blocks of 32
    python benchmarks/respecialize.py --block 8 --json FILE

Two linears (256 -> 1024 -> 256, relu) on 1024 rows, SGD; every contestant takes one step in turn, under the same random
masks. A stage's best fixed variant is chosen in hindsight. Prints the total against the sum of those; the longest step
while anything was built or tried, over the median step of its stage; and the cost model's median relative error.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import nn

import ctrlcompile as cc
from ctrlcompile import respecialize, variants
from ctrlcompile.variants import BLOCK_SPARSE, DENSE, Types, Variant

DENSITIES = (1.0, 0.5, 0.2, 0.6)
ROWS, WIDTH, HIDDEN = 1024, 256, 1024
WARM_UP = 2  # steps of each contestant before the first stage


class Contestant:
    """A model under one fixed variant, or respecialised where that is None."""

    def __init__(self, block: int, fixed: Variant | None) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
        self.gates = list(cc.gates(model, block).values())
        mode = "auto" if fixed is None else "never"
        self.run = torch.compile(model, backend="ctrlprune", options={"respecialize": mode})
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        self.seconds: list[float] = []
        for gate in self.gates if fixed is not None and fixed != BLOCK_SPARSE else ():
            for role, node in variants.open_table(gate).nodes.items():
                offered = variants.candidates(gate, role, 1)
                node.variant = fixed if fixed in offered else BLOCK_SPARSE
                for activation in ("none", "relu"):
                    node.ready.add((node.variant, Types(torch.float32, torch.float32, activation)))

    def step(self, x: torch.Tensor) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.run(x).square().mean().backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)

    @property
    def busy(self) -> bool:
        """Whether anything is built or tried at the moment."""
        courses = [course for gate in self.gates for course in respecialize._plans[gate].courses.values()]
        return any(course.trial is not None or course.waiting is not None for course in courses)


def settle() -> None:
    """Has Python's collector, which takes 0.15 s after compiling, done with what is there before anything is timed."""
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of each stage")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    probe = cc.gates(nn.Linear(WIDTH, HIDDEN), args.block)["weight"]
    coarse = [v for v in variants.candidates(probe, "forward", 1) if v.merged in ((2, 2), (4, 4))]
    fixed = {variant.name(probe.block): variant for variant in (BLOCK_SPARSE, DENSE, *coarse)}
    contestants = {"respecialised": Contestant(args.block, None)}
    contestants |= {name: Contestant(args.block, variant) for name, variant in fixed.items()}
    own = contestants["respecialised"]
    for contestant in contestants.values():
        for _ in range(WARM_UP):
            contestant.step(torch.randn(ROWS, WIDTH, requires_grad=True))
        contestant.seconds.clear()
    settle()

    rows: list[dict[str, Any]] = []
    busy: list[float] = []
    for density in DENSITIES:
        masks = [torch.rand(gate.grid) < density for gate in own.gates]
        for contestant in contestants.values():
            for gate, mask in zip(contestant.gates, masks, strict=True):
                gate.update_(mask)
            contestant.seconds.clear()
        under_way = []
        for number in range(args.steps):
            x = torch.randn(ROWS, WIDTH, requires_grad=True)
            under_way.append(own.busy)
            order = list(contestants.values())
            for contestant in order if number % 2 == 0 else reversed(order):
                contestant.step(x)
        median = statistics.median(own.seconds)
        busy += [taken / median for taken, now in zip(own.seconds, under_way, strict=True) if now]
        rows.append(
            {
                "density": density,
                "in_force": [respecialize.in_force(gate) for gate in own.gates],
                "seconds": {name: sum(contestant.seconds) for name, contestant in contestants.items()},
                "median_s": {name: statistics.median(contestant.seconds) for name, contestant in contestants.items()},
                "longest_s": {name: max(contestant.seconds) for name, contestant in contestants.items()},
            }
        )

    best = sum(min(row["seconds"][name] for name in fixed) for row in rows)
    total = sum(row["seconds"]["respecialised"] for row in rows)
    result = {
        "machine": describe(torch.device("cpu")), "block": args.block, "steps": args.steps, "rows": rows,
        "against_hindsight": total / best,
        "against_block_sparse": total / sum(row["seconds"]["block-sparse"] for row in rows),
        "longest_step": max(busy, default=None), "busy_steps": len(busy), "model_error": respecialize.model_error(),
    }  # fmt: skip
    roles = ", ".join(variants.ROLES)
    table = Table("density", *contestants, f"in force at its end ({roles})", title=f"seconds, blocks {args.block}")
    for row in rows:
        now = ", ".join("/".join(gate.values()) for gate in row["in_force"])
        table.add_row(f"{row['density']:g}", *(f"{row['seconds'][name]:.3f}" for name in contestants), now)
    Console(width=150).print(table)
    print({name: value for name, value in result.items() if name not in ("rows", "machine")})
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
