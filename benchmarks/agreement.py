"""What `explain` and `profile` say against measurements of another kind: kernels timed alone, and `torch.profiler`.

    python benchmarks/agreement.py
    python benchmarks/agreement.py --json FILE

Two linears (768 -> 3072 -> 768, relu) on 512 rows under random masks. In turn, several times over: `cc.profile`; each
operator of ours, its kernel without what PyTorch does around an operator, each dense product and the whole step called
alone by `torch.utils.benchmark`; training steps under `torch.profiler`, which names our operators' calls. Prints the
median of each, and the median of what `profile` says over what others measure right after it; for the dense products,
which are the same calls, that is the machine's noise. Then how far the FLOPs of `explain` are from those of PyTorch's
own counter and of the masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc
from ctrlcompile.kernels import cpu_linear
from kernels import random_mask

ROWS, WIDTH, HIDDEN = 512, 768, 3072
CALLS = 4  # timed at once; `profile` takes as many of these as 10 ms have room for

Key = tuple[str, str]  # a layer's weight and the role, or the step and how it is computed


class Subject:
    """A model under random masks, compiled, with its inputs."""

    def __init__(self, density: float) -> None:
        self.model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
        self.gates = cc.gates(self.model)
        for gate in self.gates.values():
            gate.update_(random_mask(gate.grid, density))
        self.run = cast(nn.Module, torch.compile(self.model, backend="ctrlprune", options={"respecialize": "never"}))
        self.x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def step(self) -> None:
        y = self.run(self.x)
        torch.autograd.grad(y, [self.x, *self.model.parameters()], torch.ones_like(y))

    def products(self) -> dict[tuple[Key, str], Callable[[], object]]:
        """Each product of the step on tensors of its shapes, by our operator, its kernel, and the framework."""
        calls: dict[tuple[Key, str], Callable[[], object]] = {}
        for (name, gate), activation in zip(self.gates.items(), ("relu", "none"), strict=True):
            weight, bias = gate.weight.detach(), torch.randn(gate.shape[0])
            x, grad = torch.randn(ROWS, gate.shape[1]), torch.randn(ROWS, gate.shape[0])
            ours = gate.lists, gate.block
            calls[(name, "forward"), "kernel"] = partial(cpu_linear.forward, x, weight, bias, *ours, activation)
            calls[(name, "dgrad"), "kernel"] = partial(cpu_linear.dgrad, grad, weight, *ours)
            calls[(name, "wgrad"), "kernel"] = partial(
                cpu_linear.wgrad, grad, x, weight, gate.lists, gate.probes, gate.block
            )
            ops, lists, probes = torch.ops.ctrlprune, list(gate.lists), gate.probes
            calls[(name, "forward"), "gated"] = partial(
                ops.linear, x, weight, bias, gate.signals.detach(), lists, probes, *gate.block, activation
            )
            calls[(name, "dgrad"), "gated"] = partial(ops.linear_dgrad, grad, weight, lists, *gate.block)
            calls[(name, "wgrad"), "gated"] = partial(ops.linear_wgrad, grad, x, weight, lists, probes, *gate.block)
            calls[(name, "forward"), "dense"] = partial(F.linear, x, weight, bias)
            calls[(name, "dgrad"), "dense"] = partial(torch.mm, grad, weight)
            calls[(name, "wgrad"), "dense"] = partial(torch.mm, grad.t(), x)
        return calls


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, on average of some after others, by PyTorch's own timer."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(CALLS).mean * 1e3


def in_steps(subject: Subject) -> dict[Key, list[float]]:
    """Milliseconds of our operators' calls in a training step, as `torch.profiler` records them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        subject.step()
        subject.step()
    found: dict[Key, list[float]] = defaultdict(list)
    for event in recorded.events() or ():
        called = event.name.split(" ")
        if called[0] in subject.gates and called[1] in ("forward", "dgrad", "wgrad"):
            found[called[0], called[1]].append(event.cpu_time_total / 1e3)
    return {key: taken[-1:] for key, taken in found.items()}  # the first step starts the profiler


def flops_apart(subject: Subject) -> tuple[float, float]:
    """What `explain` counts for a step over what others do, dense and gated, less 1."""
    explanation = cc.explain(subject.run)(subject.x)
    with FlopCounterMode(display=False) as counter:
        subject.model(subject.x).sum().backward()
    dense = counter.get_total_flops()
    active = sum(int(gate.weight.count_nonzero()) for gate in subject.gates.values())
    return explanation.dense_flops / dense - 1, explanation.flops / (3 * 2 * ROWS * active) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    subject = Subject(args.density)
    products = subject.products()
    for call in (subject.step, *products.values()):
        call()
    said: dict[tuple[Key, str], list[float]] = defaultdict(list)  # by `profile`, of each product, gated and dense
    alone: dict[tuple[Key, str], list[float]] = defaultdict(list)
    within: dict[Key, list[float]] = defaultdict(list)
    whole: Key = ("step", "forward and backward")
    for _ in range(args.repeats):
        profile = cc.profile(subject.run, rounds=1)(subject.x)
        for product in profile:
            said[(product.name, product.role), "gated"].append(product.gated_ms)
            said[(product.name, product.role), "dense"].append(product.dense_ms)
        said[whole, "gated"].append(profile.step.gated_ms)
        for named, call in products.items():
            alone[named].append(milliseconds(call))
        alone[whole, "gated"].append(milliseconds(subject.step))
        for key, taken in in_steps(subject).items():
            within[key] += taken

    rows: list[dict[str, Any]] = []
    for (key, way), values in said.items():
        found = {"profile": values, "alone": alone[key, way]}
        if way == "gated":
            found |= {"kernel": alone[key, "kernel"], "in_step": within[key]}
        row: dict[str, Any] = {"name": key[0], "role": key[1], "way": way}
        for what, taken in found.items():
            if not taken:
                continue
            row |= {f"{what}_ms": statistics.median(taken), f"{what}_least_ms": min(taken)}
            if what != "profile":
                row[f"of_{what}"] = statistics.median(ours / other for ours, other in zip(values, taken, strict=True))
        rows.append(row)
    dense_apart, gated_apart = flops_apart(subject)

    table = Table("layer", "role", "", "profile ms", "alone ms", "ratio", "kernel ms", "ratio", "in steps ms", "ratio")
    for row in rows:
        others = [
            f"{row[name]:.3f}" if name in row else ""
            for name in ("alone_ms", "of_alone", "kernel_ms", "of_kernel", "in_step_ms", "of_in_step")
        ]
        table.add_row(row["name"], row["role"], row["way"], f"{row['profile_ms']:.3f}", *others)
    Console(width=120).print(table)
    measures = ("of_alone", "of_kernel", "of_in_step")
    apart = {what: [abs(row[what] - 1) for row in rows if what in row] for what in measures}
    for what, values in apart.items():
        print(f"{what}: median {statistics.median(values):.1%}, at most {max(values):.1%} apart")
    print(f"FLOPs of explain: dense {dense_apart:+.2%}, gated {gated_apart:+.2%} apart")
    if args.json:
        result = {
            "machine": describe(torch.device("cpu")), "density": args.density, "repeats": args.repeats, "rows": rows,
            "dense_flops_apart": dense_apart, "flops_apart": gated_apart,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
