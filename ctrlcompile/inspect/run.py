"""A run as its log tells it: what was decided when, and every layer's mask at each decision."""

import itertools
import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ctrlcompile.run_log import FILE, parsed, unpack

Record = dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """One decision, or the last step.

    Attributes:
        step: optimizer step.
        seconds: of training since the first decision; what lies between two processes does not count.
        values: the other numbers of `Controller.history`, None where unknown.
        changed: the masks that differ from those before, by the gate's name; bool `[R, C]`.
    """

    step: int
    seconds: float
    values: dict[str, float | None]
    changed: dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What a run's log holds.

    Attributes:
        folder: of the run.
        processes: a record for each process that took the run up: command, versions, machine, settings, gates.
        decisions: in the order of their steps.
        unread: number of lines that hold nothing of a log, a torn last one for instance.
    """

    folder: Path
    processes: tuple[Record, ...]
    decisions: tuple[Decision, ...]
    unread: int

    @property
    def gates(self) -> dict[str, Record]:
        """Shape, block and grid of each gate, by name."""
        return dict(self.processes[-1]["gates"]) if self.processes else {}

    @property
    def steps(self) -> list[int]:
        """Of each decision."""
        return [decision.step for decision in self.decisions]

    def series(self, name: str) -> list[float | None]:
        """A number of `Controller.history` at each decision, None where it is unknown."""
        return [decision.values.get(name) for decision in self.decisions]

    def sums(self, name: str) -> list[float | None]:
        """The same, added up from the first decision on."""
        return list(itertools.accumulate(value or 0.0 for value in self.series(name)))

    def masks(self) -> list[dict[str, Tensor]]:
        """All masks at each decision, by the gate's name; one that did not change is the same tensor."""
        changes = (decision.changed for decision in self.decisions)
        return list(itertools.accumulate(changes, operator.or_))

    def densities(self) -> dict[str, list[float | None]]:
        """Active blocks / all blocks of each gate at each decision, None where its mask is unknown."""
        found: dict[str, list[float | None]] = {}
        for place, decision in enumerate(self.decisions):
            for name, mask in decision.changed.items():
                before = found.setdefault(name, [])
                before += [before[-1] if before else None] * (place - len(before))
                before.append(float(mask.float().mean()))
        return {name: line + line[-1:] * (len(self.decisions) - len(line)) for name, line in found.items()}


def read(folder: Path) -> Run:
    """The run in a folder; a torn or damaged log gives what is readable of it.

    Raises ValueError where there is no log, no decision in it, or it cannot be read.
    """
    path = folder / FILE
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {FILE}: train with options={{'budget': ..., 'log': '{folder}'}}, or with "
            f"Controller(..., log='{folder}')"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    processes: list[Record] = []
    decisions: list[Decision] = []
    understood, earlier = 0, 0.0
    for record in parsed(lines):
        try:
            if record["kind"] == "run":
                processes.append(_process(record))
            elif record["kind"] == "decision":
                made = _decision(record, processes[-1]["gates"] if processes else {})
                while decisions and decisions[-1].step >= made.step:  # done again after a resume
                    decisions.pop()
                if made.seconds == 0:  # the first of a process
                    earlier = decisions[-1].seconds if decisions else 0.0
                decisions.append(replace(made, seconds=earlier + made.seconds))
            else:
                continue
        except (KeyError, TypeError, ValueError):
            continue
        understood += 1
    if not decisions:
        raise ValueError(f"{path} holds no decision of a run{', only lines that are no log' if lines else ' yet'}")
    return Run(folder, tuple(processes), tuple(decisions), len(lines) - understood)


def _process(record: Record) -> Record:
    for gate in record["gates"].values():
        rows, columns = gate["grid"]
        gate["grid"] = (int(rows), int(columns))
    return {"settings": {}, "versions": {}, "machine": {}, "command": "", "started": 0.0, **record}


def _decision(record: Record, gates: Record) -> Decision:
    values: dict[str, float | None] = {
        name: value
        for name, value in record.items()
        if name not in ("step", "seconds") and (value is None or isinstance(value, (int, float)))
    }
    masks = {name: unpack(packed, gates[name]["grid"]) for name, packed in record["masks"].items() if name in gates}
    return Decision(int(record["step"]), float(record["seconds"]), values, masks)
