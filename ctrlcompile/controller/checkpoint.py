"""Saving the controller's state as plain tensors and numbers, and resuming from it exactly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .budget import Ledger
from .decide import Exchange
from .price import Feedback
from .probes import Probes
from .ramp import Ramp

if TYPE_CHECKING:
    from .controller import Controller

VERSION = 2
NUMBERS = (
    "steps",
    "price",
    "settled",
    "reactivations",
    "history",
    "_next",
    "_decided",
    "_planned",
    "_since",
    "_density",
)


def save(controller: Controller) -> dict[str, Any]:
    """The whole state, sharing nothing with the controller."""
    c = controller
    loss = c._loss if c._loss is None else float(c._loss)
    return {
        **identity(c),
        "numbers": copy.deepcopy({name: getattr(c, name) for name in NUMBERS}) | {"_loss": loss},
        "ledger": copy.deepcopy(vars(c._ledger)),
        "ramp": dict(vars(c._ramp)),
        "feedback": dict(vars(c._feedback)),
        "exchange": dict(vars(c._exchange)),
        "cursor": list(c._prober.rotation.cursor),
        "credit": list(c._prober.rotation.credit),
        "probes": [c._prober.current.ids.clone(), list(c._prober.current.counts)],
        "probing": [[probes.ids.clone(), list(probes.counts)] for probes in c._prober.coming],
        "tensors": {name: tensor.clone() for name, tensor in _tensors(c).items()},
        "coupling": c._lattice.state(),
    }


def load(controller: Controller, state: Mapping[str, Any]) -> None:
    """Checks everything, then resumes; see `Controller.load_state_dict`."""
    c = controller
    _check(c, state)
    own = _tensors(c)
    masks = state["tensors"]["active"].to(own["active"].device)
    for gate, mask in zip(c._list, c._layout.split(masks), strict=True):
        if not torch.equal(gate.mask.flatten(), mask):
            gate.update_(mask.view(gate.grid))
    for name, tensor in own.items():
        tensor.copy_(state["tensors"][name])
    for name, value in copy.deepcopy(dict(state["numbers"])).items():
        setattr(c, name, value)
    c._ledger = Ledger(**copy.deepcopy(dict(state["ledger"])))
    c._ramp = Ramp(**state["ramp"])
    c._feedback = Feedback(**state["feedback"])
    c._exchange = Exchange(**state["exchange"])
    rotation = c._prober.rotation
    rotation.cursor, rotation.credit = list(state["cursor"]), list(state["credit"])
    c._prober.coming = [
        Probes(ids.to(masks.device, copy=True), list(counts)) for ids, counts in (state["probes"], *state["probing"])
    ]
    c._lattice.load(state["coupling"])
    c._inbox.collect()
    c._prober.hand_out(always=True)
    c._left_at = c._updates()


def identity(c: Controller) -> dict[str, Any]:
    """What a checkpoint and the controller that resumes from it must have in common."""
    return {
        "version": VERSION,
        "gates": {
            name: {"shape": list(gate.shape), "block": list(gate.block), "grid": list(gate.grid)}
            for name, gate in c.gates.items()
        },
        "budget": c.budget.flops,
        "total_steps": c.total_steps,
        "interval": c.interval,
    }


def _tensors(c: Controller) -> dict[str, Tensor]:
    return {
        "active": c._blocks.active,
        "switched": c._blocks.switched,
        "bar": c._blocks.bar,
        **{f"signals.{name}": tensor for name, tensor in vars(c._signals).items()},
        "order": c._prober.rotation.order,
    }


def _check(c: Controller, state: Mapping[str, Any]) -> None:
    """Raises ValueError, in the words of who passed `state`, unless it is a checkpoint of this run."""
    mine = identity(c)
    if "version" in state and state["version"] != VERSION:
        raise ValueError(
            f"state: version {state['version']!r}; this release reads version {VERSION}; nothing was changed. "
            f"Resume with the release that saved it, or start a new controller"
        )
    parts = "numbers ledger ramp feedback exchange cursor credit probes probing tensors coupling"
    expected = {*mine, *parts.split()}
    if missing := expected - state.keys():
        raise ValueError(
            f"state: no state_dict of a Controller, {', '.join(sorted(missing))} missing; nothing was changed. "
            f"Pass what controller.state_dict() returned"
        )
    theirs, ours = state["gates"], mine["gates"]
    if list(theirs) != list(ours):
        odd = sorted(set(theirs) ^ set(ours)) or ["the same names in another order"]
        raise ValueError(
            f"state: saved with another model; it has {len(theirs)} gates, this model has {len(ours)}; they differ in "
            f"{', '.join(odd[:3])}{' …' if len(odd) > 3 else ''}; nothing was changed. "
            f"Load it into the model it was saved with"
        )
    for name, gate in ours.items():
        for what, value in gate.items():
            if list(theirs[name][what]) != value:
                raise ValueError(
                    f"state: saved with another model; {what} of gate {name!r} is {tuple(theirs[name][what])} in the "
                    f"checkpoint and {tuple(value)} here; nothing was changed"
                )
    for what in ("budget", "total_steps", "interval"):
        if state[what] != mine[what]:
            raise ValueError(
                f"state: saved with {what}={state[what]!r}, this controller has {what}={mine[what]!r}; nothing was "
                f"changed. Make the controller with {what}={state[what]!r} to resume"
            )
    for name, tensor in _tensors(c).items():
        saved = state["tensors"].get(name)
        if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise ValueError(f"state: tensor {name!r} is damaged or missing; nothing was changed")
    if not all(c._prober.fits(ids, counts) for ids, counts in (state["probes"], *state["probing"])):
        raise ValueError("state: 'probes' or 'probing' is damaged; nothing was changed")
    if not c._lattice.fits(state["coupling"]):
        raise ValueError("state: 'coupling' is damaged; nothing was changed")
