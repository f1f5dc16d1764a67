"""A run's log: each decision of its controller, each mask and change of a variant, in one file that survives a crash.

`log.jsonl` in the run's folder is only ever appended to: at decisions, when a graph of the run is first seen, when a
variant was tried or changed; a JSON object per line, each in one write:

    {"kind": "run", ...}       a process takes the run up: settings, gates, versions, machine, command
    {"kind": "decision", ...}  a record of `Controller.history`, with `masks` and the seconds since this process's first
    {"kind": "graph", ...}     a compiled graph that has gates of the run: its `passes.outline`, and whose gate is where
    {"kind": "variant", ...}   a `proposals.Outcome`, with `step`, `gate` and the seconds since the first decision

`masks` holds those that differ from the ones before; in the first decision of a process, all. A mask is one bit per
block, row by row, highest bit of a byte first, in base64. A number that JSON lacks is text, such as "nan". A run that
is resumed from a checkpoint repeats steps: a decision replaces all that came before of its step or of a later step,
but for the variants of its own step and process.
"""

import base64
import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import io
import json
import math
import platform
import shlex
import sys
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctrlcompile import kernel_choice
from ctrlcompile.controller.checkpoint import identity
from ctrlcompile.controller.contract import Gate
from ctrlcompile.controller.controller import Controller
from ctrlcompile.passes.outline import Outline
from ctrlcompile.proposals import Outcome

FILE = "log.jsonl"
PACKAGES = ("ctrlcompile", "torch", "triton")


def check_folder(folder: Any) -> Path:
    """A folder that a log can be written into, made if need be.

    Raises TypeError for what is no path, ValueError where it cannot be written.
    """
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"log is the folder that a run's log goes into, such as 'runs/a'; got {folder!r}")
    _open(Path(folder)).close()
    return Path(folder)


def start(folder: str | Path | None, controller: Controller) -> "RunLog | None":
    """The log of a controller's run, where one was asked for; of data-parallel processes, the first one writes it.

    Raises TypeError for what is no path, ValueError where the folder cannot be written or holds another run's log.
    """
    if folder is None or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return None
    return RunLog(check_folder(folder), controller)


class RunLog:
    """Writes the log of one controller's run. An error while writing is one warning; training goes on."""

    def __init__(self, folder: Path, controller: Controller) -> None:
        self.path = (folder / FILE).resolve()
        settings = identity(controller)
        self._head = {
            "kind": "run",
            "gates": settings["gates"],
            "settings": {what: settings[what] for what in ("budget", "total_steps", "interval")},
            "started": time.time(),
            "command": shlex.join(sys.orig_argv),
            "versions": {"python": platform.python_version(), **_versions()},
            "machine": {
                "device": kernel_choice.device_name(next(iter(controller.gates.values())).signals.device),
                "threads": torch.get_num_threads(),
                "system": platform.platform(),
            },
        }
        self._check_same_run()
        self._lost = self._warned = False
        if (former := _writers.get(self.path)) is not None:
            former.close()
            former._lost = True
        self._file = _open(folder)
        weakref.finalize(self, self._file.close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # otherwise a file system without locks
                raise ValueError(
                    f"log: {self.path} is being written by another process; name another folder. Data-parallel "
                    "processes call torch.distributed.init_process_group first, then the first one alone writes"
                ) from error
        _writers[self.path] = self
        self._torn = self._file.tell() > 0  # what is there may end amid a line
        self._began: float | None = None
        self._masks: dict[str, Tensor] = {}
        self._names: dict[Gate, str] = {}
        self._seen: list[Outline] = []

    def write(self, record: Mapping[str, Any], gates: Mapping[str, Gate]) -> None:
        """Appends a decision, with the masks that have changed since the last one."""
        if self._lost:
            self._warn("another controller of this process writes it now")
        if self._file.closed:
            return
        now = time.perf_counter()
        if self._began is None:
            if not self._append(self._head):
                return
            self._began = now
            self._names = {gate: name for name, gate in gates.items()}
            graphless.add(self)
        else:
            graphless.discard(self)
        masks = {name: gate.mask for name, gate in gates.items()}
        before = self._masks
        changed = {name: m for name, m in masks.items() if name not in before or not torch.equal(m, before[name])}
        values = {name: _number(value) for name, value in record.items()}
        line = {"kind": "decision", **values, "seconds": round(now - self._began, 6)}
        wrote = self._append({**line, "masks": {name: pack(mask) for name, mask in changed.items()}})
        self._masks = masks if wrote else {}

    def see(self, outline: Outline, gates: Mapping[str, Gate]) -> None:
        """Appends a compiled graph that has gates of this run, once; `gates` are those of its layers, by node."""
        mine = {node: self._names[gate] for node, gate in gates.items() if gate in self._names}
        if mine and not self._file.closed and not any(outline is seen for seen in self._seen):
            self._seen.append(outline)
            self._append({"kind": "graph", "nodes": [dataclasses.asdict(node) for node in outline], "gates": mine})

    def respecialized(self, step: int, gate: Gate, outcome: Outcome) -> None:
        """Appends what became of a variant of a gate of this run; before its first decision, nothing."""
        if gate in self._names and self._began is not None and not self._file.closed:
            values = {name: _number(value) for name, value in dataclasses.asdict(outcome).items()}
            seconds = round(time.perf_counter() - self._began, 6)
            self._append({"kind": "variant", "step": step, "seconds": seconds, "gate": self._names[gate], **values})

    def close(self) -> None:
        """Writes no more."""
        graphless.discard(self)
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_UN)  # also for forked workers that hold the file open
            self._file.close()

    def _append(self, line: Mapping[str, Any]) -> bool:
        data = ("\n" if self._torn else "") + json.dumps(line, allow_nan=False) + "\n"
        try:
            self._torn = self._file.write(encoded := data.encode()) != len(encoded)
            if self._torn:
                raise OSError(errno.ENOSPC, "no room for a whole line")
        except OSError as error:
            self._torn = True
            self._warn(f"{error.strerror}; training goes on")
        return not self._torn

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"the log {self.path} misses records: {why}", RuntimeWarning, stacklevel=2)

    def _check_same_run(self) -> None:
        """Raises ValueError where the file is of another run, or something else."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                first = file.read(len(_BEGINS))
                file.seek(0)
                head = next((line for line in parsed(file) if line["kind"] == "run"), None)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ValueError(f"log: {self.path} cannot be read: {error.strerror}; name another folder") from error
        if head is None:
            if not _BEGINS.startswith(first):  # else the first line was torn
                raise ValueError(f"log: {self.path} is there already and is no log of a run; name another folder")
            return
        for what in ("settings", "gates"):
            mine, theirs = json.loads(json.dumps(self._head[what])), head.get(what) or {}
            if mine != theirs:
                odd = sorted(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
                raise ValueError(
                    f"log: {self.path} is of another run: it differs in {', '.join(odd[:3])}; to go on with that run, "
                    f"use the same {what}, else name another folder"
                )


graphless: "weakref.WeakSet[RunLog]" = weakref.WeakSet()  # those to show graphs to when they run
_BEGINS = '{"kind": "run"'
_writers: "weakref.WeakValueDictionary[Path, RunLog]" = weakref.WeakValueDictionary()


def parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are records of a log; blank, torn and foreign ones are left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            yield record


def pack(mask: Tensor) -> str:
    """A boolean mask as text."""
    bits = torch.nn.functional.pad(mask.flatten().int(), (0, -mask.numel() % 8)).view(-1, 8)
    return base64.b64encode(bytes((bits << torch.arange(7, -1, -1)).sum(1).tolist())).decode()


def unpack(text: str, grid: tuple[int, int]) -> Tensor:
    """The boolean mask `[R, C]` that `pack` made into text. Raises ValueError where it is not one of this grid."""
    data, blocks = base64.b64decode(text, validate=True), grid[0] * grid[1]
    if len(data) != -(-blocks // 8):
        raise ValueError(f"a mask of {blocks} blocks has {-(-blocks // 8)} bytes; got {len(data)}")
    bits = torch.tensor(list(data))[:, None] >> torch.arange(7, -1, -1) & 1
    return bits.flatten()[:blocks].bool().view(grid)


def _number(value: Any) -> Any:
    """A record's value for JSON, which has no NaN and no infinity: as the text that `float` reads."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _open(folder: Path) -> io.FileIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / FILE, "ab", buffering=0)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise ValueError(f"log: cannot be written, {why}; name a folder that can, such as 'runs/a'") from error


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
