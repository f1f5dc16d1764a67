"""Whole training steps of a GPT or a ResNet: gated against dense, both compiled, alternating in one run.

    python benchmarks/steps.py                          # GPT, 6 layers, 768 wide, 8 sequences of 256, AdamW
    python benchmarks/steps.py --width 384 --json FILE
    python benchmarks/steps.py --model resnet18         # 32 images of CIFAR's size, SGD; or another ResNet by name
    python benchmarks/steps.py --autocast               # in bfloat16
    python benchmarks/steps.py --device cuda            # GPT-2's size, 16 sequences of 1024, bfloat16 autocast

A step is forward, backward, the optimizer, and the gradients set to None; on a GPU it ends when the device has ended.
Memory once freed is kept. On a CPU the first steps of a gated model without a controller are not timed: in these
variants of its products are tried.
Every contestant takes one step in turn, so that a drift of the machine's clock meets all alike; a row's speed-up is the
median of its time over the dense step's median.

- `inductor` and `eager`: the dense model; for a ResNet also with model and images channels-last. All are compared with
  the fastest of these.
- `density D`: `backend="ctrlprune"`, random masks of that density, no controller; at 1 every block is active.
- `controller`: `cc.Controller` on a budget of 0.4, measured after its ramp, when it decides after every tenth step, as
  in a run of 1000; also the share of the time that `controller.step` takes, of twenty steps more.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe, keep_freed_memory
from rich.console import Console
from rich.table import Table

import ctrlcompile as cc
from ctrlcompile import respecialize

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import train_cifar
import train_gpt

RAMP = 0.45  # part of the controller's short run that is over before its steps are timed; it decides after each
INTERVAL, SHARE_STEPS = 10, 20  # between its decisions from then on; of which its share is taken
# Of a gated model, before its steps are timed: until two looks have had variants of its products tried.
WARM_UP = respecialize.FIRST_LOOK + respecialize.LOOK_EVERY + 2 * (respecialize.TRIAL_TURNS + 1) + 1
# GPT-2 has 50257 symbols; a multiple of 64 suits tensor cores, whichever the contestant.
SIZES = {
    "cpu": {"layers": 6, "width": 768, "context": 256, "batch": 8, "symbols": 65},
    "cuda": {"layers": 12, "width": 768, "context": 1024, "batch": 16, "symbols": 50304},
}
IMAGE, CLASSES = (3, 32, 32), 10
RESNET_BATCH = {"cpu": 32, "cuda": 512}

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """What is trained: a model with its optimizer, on the batches that `batch` draws; `layouts` are tried densely."""

    title: str
    make: Callable[[], tuple[torch.nn.Module, torch.optim.Optimizer]]
    batch: Callable[[], Batch]
    layouts: tuple[torch.memory_format, ...] = (torch.contiguous_format,)


def gpt(args: argparse.Namespace) -> Work:
    shape = train_gpt.Shape(args.layers, args.width, args.width // 64, args.context, args.symbols)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = train_gpt.GPT(shape).to(args.device)
        return model, train_gpt.adamw(model, 1e-3, 1000)[0]

    def batch() -> Batch:
        window = torch.randint(args.symbols, (args.batch, args.context + 1), device=args.device)
        return window[:, :-1], window[:, 1:]

    size = f"{args.layers} layers, {args.width} wide, {args.batch} x {args.context} tokens"
    return Work(f"GPT, {size}, AdamW", make, batch)


def resnet(args: argparse.Namespace) -> Work:
    channels, depth, pool = train_cifar.MODELS[args.model]
    shape = train_cifar.Shape(channels, depth, IMAGE, CLASSES, pool)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = train_cifar.ResNet(shape).to(args.device)
        return model, train_cifar.sgd(model, 0.01, 1000)[0]

    def batch() -> Batch:
        images = torch.randn(args.batch, *IMAGE, device=args.device)
        return images, torch.randint(CLASSES, (args.batch,), device=args.device)

    title = f"{args.model}, {args.batch} images of {IMAGE[1]} x {IMAGE[2]}, SGD"
    return Work(title, make, batch, (torch.contiguous_format, torch.channels_last))


WORKS = {"gpt": gpt} | dict.fromkeys(train_cifar.MODELS, resnet)


class Contestant:
    """A model and its training step."""

    def __init__(
        self, work: Work, device: torch.device, backend: str, density: float = 1, budget: float | None = None,
        steps: int = 0, layout: torch.memory_format = torch.contiguous_format, autocast: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.device, self.layout, self.autocast = device, layout, autocast
        self.model, self.optimizer = work.make()
        self.model.to(memory_format=layout)  # type: ignore[call-overload]  # missing in its stubs
        self.controller: cc.Controller | None = None
        self.seconds: list[float] = []
        self.controller_seconds: list[float] = []
        self.controller_share: float | None = None
        if budget is not None:
            self.controller = cc.Controller(
                self.model, budget=budget, optimizer=self.optimizer, total_steps=steps, interval=1
            )
        if density < 1:
            for gate in cc.gates(self.model).values():
                gate.update_(torch.rand(gate.grid) < density)
        self.compiled = torch.compile(self.model, backend=backend)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        inputs = inputs.contiguous(memory_format=self.layout)
        start = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.compiled(inputs, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        before = self._now()
        if self.controller is not None:
            self.controller.step()
        end = self._now()
        self.controller_seconds.append(end - before)
        self.seconds.append(end - start)

    def measure_share(self, work: Work) -> None:
        """Of the time that the controller takes, in steps by themselves that do not count."""
        if self.controller is not None:
            counted, self.seconds = self.seconds, []
            self.controller_seconds.clear()
            for _ in range(SHARE_STEPS):
                self.step(*work.batch())
            self.controller_share = sum(self.controller_seconds) / sum(self.seconds)
            self.seconds = counted

    @property
    def density(self) -> float:
        """Of the gated weights, by area."""
        gates = cc.gates(self.model).values()
        area = sum(gate.weight.numel() for gate in gates)
        return sum(gate.active_share * gate.weight.numel() for gate in gates) / area if area else 1.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    args = _arguments()
    kept = keep_freed_memory()
    device = torch.device(args.device)
    work = WORKS[args.model](args)
    contestant_of = functools.partial(Contestant, work, device, autocast=args.autocast)
    entrants: dict[str, Callable[[], Contestant]] = {}
    for backend, layout in itertools.product(("inductor", "eager"), work.layouts):
        name = backend if layout is torch.contiguous_format else f"{backend}, channels-last"
        entrants[name] = functools.partial(contestant_of, backend, layout=layout)
    dense = list(entrants)
    for density in args.densities:
        entrants[f"density {density:g}"] = functools.partial(contestant_of, "ctrlprune", density)
    if not args.no_controller:
        timed = args.steps + 2 * SHARE_STEPS  # towards a run's end it would decide more often
        ramp = max(WARM_UP, math.ceil(RAMP / (1 - RAMP) * timed))
        entrants["controller"] = lambda: contestant_of("ctrlprune", budget=0.4, steps=ramp + timed)

    contestants: dict[str, Contestant] = {}
    console, started = Console(stderr=True), time.monotonic()
    for name, make in entrants.items():
        if len(contestants) > len(dense) and time.monotonic() - started > args.seconds:
            break
        torch._dynamo.reset()
        contestants[name] = contestant = make()
        tried = name not in dense and device.type == "cpu"
        for _ in range(ramp if contestant.controller else WARM_UP if tried else 2):
            contestant.step(*work.batch())
        contestant.seconds.clear()
        if contestant.controller is not None:
            contestant.controller.interval = INTERVAL
        console.print(f"{name}: compiled")
    for number in range(args.steps):
        for contestant in contestants.values():
            contestant.step(*work.batch())
        console.print(f"round {number + 1} of {args.steps}")

    for contestant in contestants.values():
        contestant.measure_share(work)

    best = min((contestants[name] for name in dense), key=lambda contestant: statistics.median(contestant.seconds))
    rows = [
        _row(name, contestant, 1.0 if name in dense else contestant.density, best)
        for name, contestant in contestants.items()
    ]
    title = f"{work.title}, {'bfloat16 autocast' if args.autocast else 'float32'}"
    _print(rows, title)
    left_out = [name for name in entrants if name not in contestants]
    if left_out:
        print(f"left out after {args.seconds:g} seconds: {', '.join(left_out)}")
    if args.json:
        sizes = {name: getattr(args, name) for name in SIZES["cpu"]} if args.model == "gpt" else {"batch": args.batch}
        machine = describe(device, torch.bfloat16 if args.autocast else torch.float32) | {"freed_memory_kept": kept}
        result = {"machine": machine, "work": title, "sizes": sizes}
        args.json.write_text(json.dumps(result | {"left_out": left_out, "rows": rows}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKS, default="gpt")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    for name, size in SIZES["cpu"].items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {size} on a CPU, {SIZES['cuda'][name]} on a GPU")
    parser.add_argument("--autocast", action="store_true", help="in bfloat16, as always on a GPU")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each contestant")
    parser.add_argument("--densities", type=float, nargs="*", default=[1.0, 0.4, 0.25])
    parser.add_argument("--no-controller", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="compile no second gated contestant after so long"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    args.autocast |= args.device == "cuda"
    if args.model in train_cifar.MODELS and args.batch is None:
        args.batch = RESNET_BATCH[args.device]
    for name, size in SIZES[args.device].items():
        setattr(args, name, size if getattr(args, name) is None else getattr(args, name))
    if args.width % 64 or min(getattr(args, name) for name in ("steps", *SIZES["cpu"])) < 1:
        parser.error("sizes and steps are at least 1, and the width is a multiple of 64, the width of a head")
    return args


def _row(name: str, contestant: Contestant, density: float, dense: Contestant) -> dict[str, Any]:
    median, dense_median = statistics.median(contestant.seconds), statistics.median(dense.seconds)
    row = {
        "name": name,
        "density": density,
        "median_s": median,
        "speedup": dense_median / median,
        "seconds": contestant.seconds,
    }
    if contestant.controller_share is not None:
        row["controller_share"] = contestant.controller_share
    return row


def _print(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("contestant", "density", "step, s", "times faster", "controller's share", title=title)
    for row in rows:
        share = f"{row['controller_share']:.2%}" if "controller_share" in row else ""
        table.add_row(row["name"], f"{row['density']:.3f}", f"{row['median_s']:.4f}", f"{row['speedup']:.2f}", share)
    Console().print(table)


if __name__ == "__main__":
    main()
