"""What the training examples share: options, the timed run, dense runs beside it, and the table, log and picture.

An example brings a model, its data and an ordinary training loop over `Run.steps`. Of its runs, which all see the same
batches, `ctrlprune` is pruned to the budget, `dense` starts from the same weights, `narrow` is a smaller dense model.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ctrlcompile as cc

RUNS = ("ctrlprune", "dense", "narrow")
AnyShape = TypeVar("AnyShape")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every example has."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.4, help="share of the dense FLOPs, default %(default)s")
    parser.add_argument("--run", choices=RUNS, default="ctrlprune", help="what to train, default %(default)s")
    parser.add_argument("--compare", action="store_true", help="train all of them, and end in a table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda trains under bf16 autocast")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the log and the picture")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: Iterable[str]) -> None:
    """Refuses what no run could use; `sizes` names the options that have to be at least 1. Makes the folder `--out`."""
    for name in sizes:
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it has to be at least 1")
    if not 0 < args.budget <= 1:
        parser.error(f"--budget is {args.budget}; it is a share of the dense FLOPs, above 0 and at most 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(str(problem))


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Counts the matrix FLOPs of what runs inside, which runs on tensors without data; attention counts in full."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def narrowest(shapes: Sequence[AnyShape], share: float, flops: Callable[[AnyShape], int]) -> AnyShape:
    """The first of `shapes`, which widen up to the dense model's, of at least `share` of the last one's FLOPs."""
    return shapes[bisect_left(shapes, share * flops(shapes[-1]), key=flops)]


def start_over(seed: int) -> None:
    """Leaves nothing of the run before; the next model starts from the weights that `seed` gives."""
    gc.collect()
    torch._dynamo.reset()
    torch.manual_seed(seed)


def compiled(model: nn.Module, name: str, budget: float, steps: int) -> Callable[..., Tensor]:
    """The model as the run of this name trains it."""
    if name == "ctrlprune":
        options: dict[str, Any] = {"budget": budget, "total_steps": steps}
        return torch.compile(model, backend="ctrlprune", options=options)
    return torch.compile(model, backend="inductor")


@dataclass
class Run:
    """One training run; the lists hold a number for each optimizer step."""

    name: str
    shape: Any
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    price: list[float] = field(default_factory=list)
    reactivations: list[int] = field(default_factory=list)
    validation: float = math.nan
    validation_error: float = math.nan

    def steps(
        self,
        batches: Iterable[tuple[Tensor, ...]],
        total: int,
        optimizer: torch.optim.Optimizer,
        dense_flops: float,
        device: str,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields the batches, `total` of them, on the device; the loop's body trains on each and appends its loss.

        `dense_flops` is what a dense step uses. The clock runs while the body does.
        """
        with progress_bar() as bar:
            task = bar.add_task(self.name, total=total, state="compiling")
            for step, batch in enumerate(batches, start=1):
                on_device = tuple(tensor.to(device) for tensor in batch)
                start = time.perf_counter()
                yield on_device
                self.seconds.append(time.perf_counter() - start)

                controller = cc.controller_of(optimizer)
                state = f"loss {self.loss[-1]:.3f}"
                if controller is not None:
                    state += f" density {controller.density:.2f} price {controller.price:.2g}"
                    state += f" budget {controller.budget_used:.0%}"
                self.flops.append(controller.flops_used if controller else dense_flops * step)
                self.density.append(controller.density if controller else 1.0)
                self.price.append(controller.price if controller else 0.0)
                self.reactivations.append(controller.reactivations if controller else 0)
                bar.update(task, advance=1, state=state)

    @property
    def compile_seconds(self) -> float:
        """The graph compiles inside the first step: what that took beyond the median of the steps after it."""
        return max(0.0, self.seconds[0] - statistics.median(self.seconds[1:20] or self.seconds))

    @property
    def train_seconds(self) -> float:
        """All steps, less `compile_seconds`; validation is not in it."""
        return sum(self.seconds) - self.compile_seconds


def progress_bar() -> Progress:
    parts = (
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    )
    return Progress(*parts, TimeRemainingColumn(compact=True), TextColumn("left"), expand=True, refresh_per_second=2)


@dataclass(frozen=True)
class Wording:
    """How an example calls what its runs reach."""

    script: str  # the name of the log and the picture
    size: str  # heading of the column with the shapes
    validation: str  # heading of the column with what held-out data say
    caption: str  # what that is, in full
    title: str  # of the picture
    dots: bool  # whether held-out data are judged by the training loss, and so have a place in its picture


def report(runs: list[Run], dense_flops: float, args: argparse.Namespace, wording: Wording) -> None:
    """Prints the table and writes the log and the picture; `dense_flops` is what the dense run uses."""
    Console().print(table(runs, dense_flops, wording))
    log, picture = args.out / f"{wording.script}.json", args.out / f"{wording.script}.png"
    write_log(log, runs, args)
    try:
        draw(picture, runs, wording)
    except ImportError:
        print(f"log: {log}; no picture, which needs matplotlib: pip install 'ctrlcompile[examples]'")
    else:
        print(f"log: {log}; picture: {picture}")


def table(runs: list[Run], dense_flops: float, wording: Wording) -> Table:
    """A row per run: what it reached and what it used."""
    error = max(run.validation_error for run in runs)
    caption = f"{wording.caption}, standard error {error:.3f}; seconds of training, compiling apart"
    result = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption)
    for heading in ("run", wording.size, wording.validation, "FLOPs", "of dense", "seconds", "compile", "density"):
        result.add_column(heading, justify="left" if heading == "run" else "right")
    for run in runs:
        used = f"{run.flops[-1]:.3g}", f"{run.flops[-1] / dense_flops:.3f}"
        clock = f"{run.train_seconds:.1f}", f"{run.compile_seconds:.1f}"
        result.add_row(run.name, str(run.shape), f"{run.validation:.4f}", *used, *clock, f"{run.density[-1]:.2f}")
    return result


def write_log(path: Path, runs: list[Run], args: argparse.Namespace) -> None:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    rows = [asdict(r) | {"train_seconds": r.train_seconds, "compile_seconds": r.compile_seconds} for r in runs]
    path.write_text(json.dumps({"settings": vars(args), "machine": machine, "runs": rows}, default=str))


def draw(path: Path, runs: list[Run], wording: Wording) -> None:
    """Loss against FLOPs and against seconds, then what the controller did. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(wording.title)
    by_flops, by_seconds, by_step, density, price, reactivations = figure.subplots(2, 3).flat
    for run in runs:
        losses, clock = smooth(run.loss), list(accumulate(run.seconds))
        seconds = [elapsed - run.compile_seconds for elapsed in clock]
        label = f"{run.name}, {wording.size} {run.shape}: {run.validation:.4f}"
        for axes, x in ((by_flops, run.flops), (by_seconds, seconds), (by_step, range(1, len(losses) + 1))):
            (line,) = axes.plot(x, losses, label=label)
            if wording.dots:
                axes.plot(x[-1], run.validation, "o", color=line.get_color())
        for axes, y in ((density, run.density), (price, run.price), (reactivations, run.reactivations)):
            axes.plot(y)
    settled = max(smooth(run.loss)[len(run.loss) // 10] for run in runs)
    for axes, label in ((by_flops, "training FLOPs"), (by_seconds, "seconds, compiling apart"), (by_step, "step")):
        axes.set(xlabel=label, ylabel="loss", ylim=(None, settled))
    for axes, label in ((density, "density"), (price, "price"), (reactivations, "blocks reactivated")):
        axes.set(xlabel="step", ylabel=label)
    by_flops.legend(title=wording.validation)
    figure.savefig(path, dpi=110)


def smooth(values: list[float], memory: float = 0.9) -> list[float]:
    """Exponential moving average, without bias toward the first value."""

    def decayed(series: list[float]) -> Iterable[float]:
        return accumulate(series, lambda total, value: memory * total + value)

    return [total / weight for total, weight in zip(decayed(values), decayed([1.0] * len(values)), strict=True)]
