"""A run as its log tells it: what was decided when, every layer's mask at each decision, which variants changed."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrlcompile.passes.outline import Node, Outline
from ctrlcompile.proposals import Outcome
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
class GatedGraph:
    """A compiled graph; `gates` maps the nodes of its gated layers to the names of their gates."""

    outline: Outline
    gates: dict[str, str]


@dataclass(frozen=True)
class Respecialised:
    """A variant of a gated product that was tried or changed, at a step, with its `seconds` as in `Decision`."""

    step: int
    seconds: float
    gate: str
    outcome: Outcome


@dataclass(frozen=True)
class Run:
    """What a run's log holds.

    Attributes:
        folder: of the run.
        processes: for each process that took the run up: `command`, `started` (seconds since 1970), `versions`,
            `machine`, `settings`, and the `gates` by name with `shape`, `block` and `grid`.
        decisions: in the order of their steps.
        graphs: those compiled with gates of the run, as its last process had them.
        respecialised: in the order of their steps.
        unread: number of lines that hold nothing of a log, a torn last one for instance.
    """

    folder: Path
    processes: tuple[Record, ...]
    decisions: tuple[Decision, ...]
    graphs: tuple[GatedGraph, ...]
    respecialised: tuple[Respecialised, ...]
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

    def curves(self) -> dict[str, list[float | None]]:
        """What is drawn against steps, by name."""
        return {
            "loss": self.series("loss"),
            "FLOPs used": self.series("flops_used"),
            "of the dense run": self.series("flops_dense"),
            "seconds": [decision.seconds for decision in self.decisions],
            "density": self.series("density"),
            "target": self.series("target"),
            "price": self.series("price"),
            "blocks reactivated": self.sums("reactivated"),
            "switched off": self.sums("switched_off"),
        }

    def frames(self, most: int) -> list[int]:
        """Where masks changed, by index into `decisions`: all, or so many with the first and the last."""
        places = [place for place, decision in enumerate(self.decisions) if decision.changed]
        if len(places) > most:
            places = [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]
        return places

    def masks(self, gate: str, places: Sequence[int]) -> list[Tensor]:
        """The mask of a gate at decisions in ascending order, bool `[R, C]`; without an active block where unknown."""
        found, mask, place = [], torch.zeros(self.gates[gate]["grid"], dtype=torch.bool), 0
        for wanted in places:
            for decision in self.decisions[place : wanted + 1]:
                mask = decision.changed.get(gate, mask)
            found.append(mask)
            place = wanted + 1
        return found

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
    graphs: list[GatedGraph] = []
    variants: list[tuple[int, Respecialised]] = []  # each with the number of its process
    graphs_of = understood = 0  # the process that had them; lines
    earlier = 0.0
    for record in parsed(lines):
        try:
            if record["kind"] == "run":
                processes.append(_process(record))
            elif record["kind"] == "decision":
                made = _decision(record, processes[-1]["gates"] if processes else {})
                while decisions and decisions[-1].step >= made.step:  # done again after a resume
                    decisions.pop()
                while variants and variants[-1][1].step >= made.step + (variants[-1][0] == len(processes)):
                    variants.pop()
                if made.seconds == 0:  # the first of a process
                    earlier = decisions[-1].seconds if decisions else 0.0
                decisions.append(replace(made, seconds=earlier + made.seconds))
            elif record["kind"] == "graph":
                graph = _graph(record)
                if graphs_of != len(processes):
                    graphs_of, graphs = len(processes), []
                graphs.append(graph)
            elif record["kind"] == "variant":
                became = _respecialised(record)
                variants.append((len(processes), replace(became, seconds=earlier + became.seconds)))
            else:
                continue
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
        understood += 1
    if not decisions:
        raise ValueError(f"{path} holds no decision of a run{', only lines that are no log' if lines else ' yet'}")
    respecialised = tuple(became for _, became in variants)
    return Run(
        folder, tuple(processes), tuple(decisions), tuple(graphs), respecialised, len(lines) - understood
    )  # fmt: skip


def _process(record: Record) -> Record:
    gates = {
        name: {part: tuple(map(int, gate[part])) for part in ("shape", "block", "grid")}
        for name, gate in record["gates"].items()
    }
    told = {part: dict(record[part]) for part in ("settings", "versions", "machine")}
    return {"gates": gates, "command": str(record["command"]), "started": float(record["started"]), **told}


def _decision(record: Record, gates: Record) -> Decision:
    values: dict[str, float | None] = {
        name: float(value) if isinstance(value, str) else value
        for name, value in record.items()
        if name not in ("kind", "step", "seconds", "masks") and (value is None or isinstance(value, (int, float, str)))
    }
    masks = {name: unpack(packed, gates[name]["grid"]) for name, packed in record["masks"].items() if name in gates}
    return Decision(int(record["step"]), float(record["seconds"]), values, masks)


def _respecialised(record: Record) -> Respecialised:
    role, current, proposed, error = (str(record[name]) for name in ("role", "current", "proposed", "error"))
    density, gain, saved, cost = (float(record[name]) for name in ("density", "gain", "saved_s", "cost_s"))
    measured, known = (None if (v := record[name]) is None else float(v) for name in ("measured", "model_error"))
    outcome = Outcome(
        role, density, current, proposed, gain, saved, cost, measured, bool(record["in_force"]), known, error
    )  # fmt: skip
    return Respecialised(int(record["step"]), float(record["seconds"]), str(record["gate"]), outcome)


def _graph(record: Record) -> GatedGraph:
    nodes: dict[str, Node] = {}
    for node in record["nodes"]:
        name, what, module, shape = (str(node[part]) for part in ("name", "operator", "module", "shape"))
        if not nodes.keys() >= set(node["sources"]):
            raise ValueError(f"{name} reads what comes later or not at all")
        nodes[name] = Node(name, what, module, shape, tuple(node["sources"]))
    return GatedGraph(tuple(nodes.values()), dict(record["gates"]))
