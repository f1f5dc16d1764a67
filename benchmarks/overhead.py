"""What a training step pays for respecialising: while nothing is under way, and while a kernel is compiled beside it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --part build --block 8 --json FILE

Two linears (256 -> 1024 -> 256, relu), SGD, as in `respecialize.py`.

- idle: one model, a step as with "auto" and a step as with "never" in turn, with no trial and no build. The median of
  the differences between neighbours, with its standard error (bootstrap), as a share of the step on 1024 rows, and in
  microseconds per product on 8 rows, where a step is short enough to tell; the mean time of the hook after a step.
- build: steps on 1024 rows while a kernel that is in no cache is compiled, over the median of the steps around it. Next
  to it as many steps beside nothing, since a virtual machine's steps vary by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import describe
from respecialize import ROWS, WIDTH, Contestant, settle

from ctrlcompile import background, respecialize, variants
from ctrlcompile.kernels import build
from ctrlcompile.variants import BLOCK_SPARSE, Types

SHORT_ROWS = 8
PRODUCTS = 6  # of a step: three roles of two layers
WARM_UP = 5  # steps
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")  # each makes another kernel to build
TRIMMED = 0.05  # at each end, of the differences whose mean is taken


def idle(block: int, rows: int, steps: int) -> dict[str, Any]:
    """Seconds of so many pairs of steps, respecialised and not, and the median of their differences."""
    contestant = Contestant(block, BLOCK_SPARSE)
    respecialize.LEAST_SAVED_S = float("inf")  # nothing is worth a try
    for gate in contestant.gates:
        respecialize.adopt(gate, "auto")
    boundary, hook = respecialize.at_boundary, []

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = boundary(*arguments)
        hook.append(time.perf_counter() - started)
        return result

    kept = {gate: (respecialize._plans[gate], variants.open_table(gate)) for gate in contestant.gates}

    def step(on: bool) -> float:
        for gate, (plan, table) in kept.items():
            if on:
                respecialize._plans[gate], variants._tables[gate] = plan, table
            else:
                respecialize._plans.pop(gate, None)
                variants._tables.pop(gate, None)
        contestant.step(torch.randn(rows, WIDTH, requires_grad=True))
        return contestant.seconds[-1]

    for number in range(2 * WARM_UP):
        step(number % 2 == 0)
    settle()
    pairs: list[tuple[float, float]] = []
    with mock.patch.object(respecialize, "at_boundary", timed):
        for number in range(steps):
            first = step(number % 2 == 0)
            second = step(number % 2 == 1)
            pairs.append((first, second) if number % 2 == 0 else (second, first))
    more = [on - off for on, off in pairs]
    cut = int(TRIMMED * len(more))
    mean = statistics.fmean(sorted(more)[cut : len(more) - cut])
    drawn = [statistics.median(random.choices(more, k=len(more))) for _ in range(300)]
    return {
        "rows": rows, "pairs": steps, "step_s": statistics.median(off for _, off in pairs),
        "more_s": statistics.median(more), "error_s": statistics.stdev(drawn), "more_mean_s": mean,
        "hook_s": sum(hook) / steps,
    }  # fmt: skip


def beside_a_build(contestant: Contestant, recipe: background.Recipe) -> dict[str, Any]:
    """Steps while a kernel is compiled that this process has not loaded, and as many after it."""

    def step() -> float:
        contestant.step(torch.randn(ROWS, WIDTH, requires_grad=True))
        return contestant.seconds[-1]

    with tempfile.TemporaryDirectory() as empty:
        before = [step() for _ in range(50)]
        cache, os.environ["CTRLCOMPILE_CACHE_DIR"] = os.environ.get("CTRLCOMPILE_CACHE_DIR"), empty
        started = time.perf_counter()
        begun, beside = background.Builder().build(recipe), []
        while not begun.done.is_set():
            beside.append(step())
        took = time.perf_counter() - started
        del os.environ["CTRLCOMPILE_CACHE_DIR"]
        if cache is not None:
            os.environ["CTRLCOMPILE_CACHE_DIR"] = cache
    if begun.error is not None:
        raise begun.error
    after = [step() for _ in beside]
    found = {
        "build_s": took, "processor_s": build.compile_seconds[-1], "steps": len(beside),
        "step_s": (median := statistics.median(before + after)),
    }  # fmt: skip
    for end, seconds in (("", beside), ("_alone", after)):
        found["median" + end] = statistics.median(seconds) / median
        found["ninth_decile" + end] = sorted(seconds)[len(seconds) * 9 // 10] / median
        found["longest" + end] = max(seconds) / median
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("idle", "build"), help="only this one")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=250, help="pairs of steps of idle")
    parser.add_argument("--builds", type=int, default=2, choices=range(1, len(ACTIVATIONS) + 1), help="default 2")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    result: dict[str, Any] = {"machine": describe(torch.device("cpu")), "block": args.block}
    if args.part != "build":
        whole, short = idle(args.block, ROWS, args.steps), idle(args.block, SHORT_ROWS, 10 * args.steps)
        result["idle"] = [whole, short]
        for found, unit, whole_of in ((whole, "%", whole["step_s"] / 100), (short, "us per product", PRODUCTS * 1e-6)):
            more, error = found["more_s"] / whole_of, found["error_s"] / whole_of
            print(
                f"idle: {more:+.2f} {unit} (standard error {error:.2f}) on average "
                f"{found['more_mean_s'] / whole_of:+.2f}, in steps of {found['step_s'] * 1e3:.2f} ms, of it "
                f"{found['hook_s'] / whole_of:.2f} in the hook on average"
            )
    if args.part != "idle":
        contestant = Contestant(args.block, BLOCK_SPARSE)
        for _ in range(WARM_UP):
            contestant.step(torch.randn(ROWS, WIDTH, requires_grad=True))
        settle()
        result["builds"] = []
        for number in range(args.builds):
            types = Types(torch.float32, torch.float32, ACTIVATIONS[number])
            result["builds"].append(beside_a_build(contestant, ((2 * args.block, 2 * args.block), types)))
        for found in result["builds"]:
            beside, alone = (
                ", ".join(f"{found[name + end]:.2f}" for name in ("median", "ninth_decile", "longest"))
                for end in ("", "_alone")
            )
            print(
                f"build: {found['build_s']:.1f} s, {found['processor_s']:.1f} s of a processor; {found['steps']} steps "
                f"of {found['step_s'] * 1e3:.1f} ms, median, ninth decile and longest {beside}; beside nothing {alone}"
            )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
