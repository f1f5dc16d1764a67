"""Follows every optimizer: after a step, masked blocks are zero again where they may not be, and controllers run.

One global hook serves all optimizers. In the one-line form a controller is made at the first step of the optimizer that
owns the gated Parameters.
"""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ctrlcompile import run_log
from ctrlcompile.controller import Controller
from ctrlcompile.cost import counter_for, meter
from ctrlcompile.gate import Gate, registry
from ctrlcompile.options import Options

logger = logging.getLogger(__name__)

# Where weight, gradient and state of an entry are zero, a step of these leaves them zero. Any other optimizer (one that
# mixes entries, as Muon does) has its masked blocks zeroed after each step.
KEEP_ZERO: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.RMSprop,
)  # fmt: skip

_wanted: weakref.WeakKeyDictionary[Gate, Options] = weakref.WeakKeyDictionary()
_in_the_open: weakref.WeakSet[Gate] = weakref.WeakSet()
_driven: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Controller]] = weakref.WeakKeyDictionary()


def adopt(gate: Gate, options: Options) -> None:
    """Has a gate driven from whichever optimizer steps its Parameter, as `options` say."""
    if gate not in _wanted and gate not in _in_the_open:
        _wanted[gate] = options
        meter.listening = True


def controller_of(optimizer: torch.optim.Optimizer) -> Controller | None:
    """The controller that the one-line form runs from this optimizer; None before its first step.

    Its `state_dict()` belongs into a checkpoint. A run is resumed in the open, where the controller is there before the
    first step: `Controller(model, budget=..., total_steps=..., optimizer=optimizer).load_state_dict(state)`.
    """
    controllers = _driven.get(optimizer)
    return controllers[0] if controllers else None


def leave(gate: Gate, optimizer: torch.optim.Optimizer) -> None:
    """Has a gate left to a controller that its user steps; `optimizer` is the one that steps its Parameter."""
    gate.owned_by(optimizer)
    _wanted.pop(gate, None)
    _in_the_open.add(gate)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All Parameters that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gates = [gate for parameter in parameters(optimizer) if (gate := registry.get(parameter)) is not None]
    if not gates:
        return
    keeps_zero = type(optimizer) in KEEP_ZERO
    for gate in gates:
        gate.stepped_by(optimizer, keeps_zero=keeps_zero)
    if optimizer not in _driven:
        _start(optimizer, gates)
    for controller in _driven.get(optimizer, ()):
        controller.advance()


def _start(optimizer: torch.optim.Optimizer, gates: list[Gate]) -> None:
    groups: dict[Options, dict[str, Gate]] = {}
    for gate in gates:
        if (options := _wanted.get(gate)) is not None:
            named = groups.setdefault(options, {})
            named[gate.name if gate.name not in named else f"{gate.name}#{len(named)}"] = gate
    controllers = []
    for options, named in groups.items():
        assert options.budget is not None
        controller = Controller(named, counter_for(named), options.budget, options.total_steps, driven=True)
        controller.log = run_log.start(options.log, controller)
        controllers.append(controller)
        logger.info("a controller drives %d gates from %s", len(named), type(optimizer).__name__)
    if controllers:
        _driven[optimizer] = controllers


register_optimizer_step_post_hook(_after_step)
