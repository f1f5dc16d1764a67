"""All that needs a GPU, in one go: the tests, a training run, whole steps, the kernels; at most eight minutes.

    python benchmarks/gpu.py                   # results into benchmarks/results/gpu*.json
    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --sanitize --out FOLDER     # the tests alone, under compute-sanitizer
    python benchmarks/gpu.py --rehearse --out FOLDER     # no GPU: tiny sizes on the CPU, to see that the script works

Runs from a checkout, without network; the package need not be installed. Needs Python 3.10, PyTorch 2.11, Triton 3.6
or newer, and click, rich, pytest, hypothesis, numpy and setuptools 77. Each part is a process with a time limit of its
own, and fails alone. The kernels come last, begin with the shapes that matter most, and have all the time that is left.
The last table says what passed; the exit status is 0 where all did. `gpu.json` holds that table, with commands, machine
and versions, `gpu_steps.json`, `gpu_train.json`, `gpu_convolutions.json` and `gpu_kernels.json` what was measured.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LAST_CASE_S = 45  # what the kernels may need to end the shape and block that they have begun
ROLES = ("forward", "dgrad", "wgrad")
SHOWN_LINES = 40  # of what a failed part wrote last


@dataclass(frozen=True)
class Session:
    """What all parts share: `package` is a scratch folder that holds ctrlcompile, laid out as a wheel has it.

    Parts write there, and what came of them goes to `out`, so that no older result is taken for theirs. `deadline` is
    one of `time.monotonic`.
    """

    out: Path
    package: Path
    deadline: float
    rehearse: bool = False
    sanitize: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Part:
    """A command, how many seconds it may take, and what tells in a line what came of it.

    `summary` raises OSError, KeyError or ValueError where the command left nothing to tell of.
    """

    command: tuple[str, ...]
    limit: float
    summary: Callable[[], str]


@dataclass(frozen=True)
class Outcome:
    """How a part ended; `last_lines` only of one that did not pass."""

    name: str
    passed: bool
    ended: str
    summary: str
    seconds: float
    limit: float
    command: str
    last_lines: str


def tests(session: Session) -> Part:
    """`pytest -m gpu`."""
    found = session.package / "tests.xml"
    launcher: tuple[str, ...] = ()
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={found}"]
    options += ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests")]
    if session.sanitize:
        # Without PyTorch's caching allocator, whose blocks hide what lies beyond a tensor, no graph can be captured.
        launcher = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--target-processes")
        launcher += ("all", "--error-exitcode", "1")
        options += ["-k", "not captured_graph"]
    elif importlib.util.find_spec("xdist") is not None:
        options += ["-n", "8"]  # most of the time is Triton's, compiling

    def summary() -> str:
        suite = next(ElementTree.parse(found).iter("testsuite"))
        count, skipped, failed = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures"))
        failed += int(suite.get("errors", 0))
        if count == skipped and not session.rehearse:
            raise ValueError(f"no test ran: {skipped} skipped")
        return f"{count - skipped - failed} passed, {failed} failed, {skipped} skipped"

    command = (*launcher, sys.executable, "-m", "pytest", *options)
    return Part(command, session.left if session.sanitize else 150, summary)


def train(session: Session) -> Part:
    """The example, pruned on a budget of 0.4."""
    sizes = {"batch": 32, "steps": 300}
    if session.rehearse:
        sizes = {"layers": 1, "width": 128, "heads": 2, "context": 16, "batch": 2, "steps": 30}
    given = [f"--{name}={size}" for name, size in sizes.items()]

    def summary() -> str:
        log = json.loads((session.package / "train_gpt.json").read_text())
        write(session.out / "gpu_train.json", log)
        run = log["runs"][0]
        first, last, median = run["loss"][0], run["validation"], sorted(run["seconds"])[len(run["seconds"]) // 2]
        return f"loss {first:.2f} to {last:.2f}, density {run['density'][-1]:.2f}, median step {median * 1e3:.1f} ms"

    script = str(ROOT / "examples" / "train_gpt.py")
    command = (sys.executable, script, "--device", session.device, *given, "--out", str(session.package))
    return Part(command, 100, summary)


def steps(session: Session) -> Part:
    """Whole steps of a GPT of GPT-2's size."""
    result = session.package / "steps.json"
    sizes = {"steps": 15, "seconds": 80}
    if session.rehearse:
        sizes = {"layers": 1, "width": 128, "context": 16, "batch": 2, "steps": 2}
    given = [f"--{name}={size}" for name, size in sizes.items()]

    def summary() -> str:
        found = json.loads(result.read_text())
        write(session.out / "gpu_steps.json", found)
        rows, left_out = found["rows"], [f"{name} left out" for name in found["left_out"]]
        told = (f"{row['name']} {row['median_s'] * 1e3:.1f} ms {row['speedup']:.2f}x" for row in rows)
        return ", ".join([*told, *left_out])

    options = ("--densities", "0.4", "1.0", "--no-controller", "--json", str(result))
    script = str(ROOT / "benchmarks" / "steps.py")
    return Part((sys.executable, script, "--device", session.device, *given, *options), 130, summary)


def convolutions(session: Session) -> Part:
    """Every role of a convolution against cuDNN."""
    result = session.package / "convolutions.json"
    given = ("--shapes", "3", "--images", "1", "--blocks", "32", "--rounds", "1") if session.rehearse else ()

    def summary() -> str:
        found = json.loads(result.read_text())
        write(session.out / "gpu_convolutions.json", found)
        middle = [row for row in found["rows"] if 0.2 < row["density"] < 0.6]
        worst = (f"{role} {min(row['of_best'] for row in middle if row['role'] == role):.2f}" for role in ROLES)
        return f"worst of the best dense at 0.5 and 0.25: {', '.join(worst)}; {len(found['left_out'])} left out"

    options = ("--seconds", "45", "--json", str(result))
    script = str(ROOT / "benchmarks" / "convolutions.py")
    return Part((sys.executable, script, "--device", session.device, *given, *options), 100, summary)


def kernels(session: Session) -> Part:
    """Every role against the dense product."""
    result, limit = session.package / "kernels.json", session.left
    given = ("--sizes", "64", "128", "128", "--blocks", "16", "--rounds", "1") if session.rehearse else ()

    def summary() -> str:
        found = json.loads(result.read_text())
        write(session.out / "gpu_kernels.json", found)
        show_kernels(found["rows"])
        return f"{len(found['rows'])} figures; {len(found['left_out'])} shapes and blocks left out"

    options = ("--bsr", "--seconds", f"{max(0.0, limit - LAST_CASE_S):.0f}", "--json", str(result))
    script = str(ROOT / "benchmarks" / "kernels.py")
    return Part((sys.executable, script, "--device", session.device, *given, *options), limit, summary)


PARTS: dict[str, Callable[[Session], Part]] = {
    "tests": tests,
    "train": train,
    "steps": steps,
    "convolutions": convolutions,
    "kernels": kernels,
}


def run(name: str, part: Part, package: Path) -> Outcome:
    """Runs a part to its end or its limit, and ends whatever it started."""
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "150"}
    written, complaints = package / f"{name}.stdout", package / f"{name}.stderr"
    started = time.monotonic()
    with written.open("w") as stdout, complaints.open("w") as stderr:
        try:
            # In the package's folder: -m would else find the checkout's ctrlcompile, which lacks kernels and passes.
            process = subprocess.Popen(
                part.command, stdout=stdout, stderr=stderr, cwd=package, env=environment, start_new_session=True
            )
        except OSError as error:
            return Outcome(name, False, str(error), "", 0.0, part.limit, " ".join(part.command), "")
        try:
            status = process.wait(part.limit)
            ended = f"exit status {status}"
        except subprocess.TimeoutExpired:
            status, ended = -1, "stopped at its time limit"
        finally:
            end_all(process)
    seconds, passed = time.monotonic() - started, status == 0
    print(written.read_text(errors="replace"), end="", flush=True)
    try:
        summary = part.summary()
    except (OSError, KeyError, ValueError, ElementTree.ParseError) as error:
        summary, passed = f"no result: {error}", False
    last_lines = "\n".join(
        line for path in (written, complaints) for line in path.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    )
    command = " ".join(part.command)
    return Outcome(name, passed, ended, summary, seconds, part.limit, command, "" if passed else last_lines)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it started and left running."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lay_out(package: Path) -> None:
    """Puts the package, passes and kernels inside it, and its entry point into a folder. Raises CalledProcessError."""
    setup = ["-c", "import setuptools; setuptools.setup()", "-q", "egg_info", "--egg-base", str(package)]
    command = [sys.executable, *setup, "build_py", "--build-lib", str(package)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


def show_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """The worst figure of each block and role over all shapes, at densities of 0.5 and 0.25."""
    table = Table(title="kernels, the worst over shapes at densities 0.5 and 0.25", box=None, header_style="bold")
    for heading in ("block", "role"):
        table.add_column(heading)
    for heading in ("of cuBLAS", "of best dense", "of roofline", "break-even", "BSR", "error"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if 0.2 < row["density"] < 0.6:
            groups.setdefault(("x".join(map(str, row["block"])), row["role"]), []).append(row)
    for key, group in groups.items():
        worst = [f"{min(row[name] for row in group):.2f}" for name in ("of_eager", "of_best", "of_roofline")]
        even, error = min(row["break_even"] for row in group), max(row["error"] for row in group)
        ratios = [row["bsr_ratio"] for row in group if row["bsr_ratio"] is not None]
        bsr = f"{min(ratios):.2f}x" if ratios else ""
        table.add_row(*key, *worst, f"{even:.2f}", bsr, f"{error:.2f}")
    Console(width=100).print(table)


def show(outcomes: Sequence[Outcome]) -> None:
    """What passed, last."""
    console = Console(width=150)
    for outcome in outcomes:
        if outcome.last_lines:
            console.rule(f"{outcome.name}: {outcome.ended}; its last lines")
            console.print(outcome.last_lines, markup=False, highlight=False)
    table = Table(box=None, header_style="bold")
    for heading in ("part", "passed", "seconds", "ended", "result"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for outcome in outcomes:
        table.add_row(
            outcome.name, "yes" if outcome.passed else "NO", f"{outcome.seconds:.0f}", outcome.ended, outcome.summary
        )
    console.print(table)


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="which parts; default: all")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together, default %(default)s")
    parser.add_argument("--sanitize", action="store_true", help="the tests alone, under compute-sanitizer")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    if args.rehearse and args.out == parser.get_default("out"):
        parser.error("--rehearse measures nothing worth keeping: give a folder for it with --out")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU; --rehearse runs on the CPU")
    if args.sanitize and shutil.which("compute-sanitizer") is None:
        parser.error("--sanitize: compute-sanitizer, which comes with the CUDA toolkit, is not on the PATH")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="ctrlcompile-gpu-") as folder:
        session = Session(out, Path(folder), deadline, args.rehearse, args.sanitize)
        try:
            lay_out(session.package)
        except subprocess.CalledProcessError as error:
            parser.error(f"setuptools cannot lay out the package: {error.stderr.strip().splitlines()[-1]}")
        outcomes = []
        for name in ["tests"] if args.sanitize else args.only or PARTS:
            part = PARTS[name](session)
            print(f"{name}: {' '.join(part.command)}", flush=True)
            outcomes.append(run(name, part, session.package))
        sys.path.insert(0, str(session.package))
        from machine import describe  # which imports the package

        found = {"machine": describe(torch.device(session.device)), "parts": [asdict(outcome) for outcome in outcomes]}
        write(out / "gpu.json", found)
    show(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
