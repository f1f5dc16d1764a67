"""Follows every optimizer: after a step, masked blocks are zero again where they may not be, controllers run, and
kernels are respecialised.

One global hook serves all optimizers. In the one-line form a controller is made at the first step of an optimizer that
owns gated Parameters: for these and for those in the same graphs, which other optimizers may own (Muon for matrices and
AdamW for the rest, say). It runs once in a round, in which each gate is stepped by one gradient.
"""

import functools
import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ctrlcompile import respecialize, run_log
from ctrlcompile.controller import BudgetError, Controller
from ctrlcompile.gate import Gate, registry
from ctrlcompile.meter import meter
from ctrlcompile.options import Options

logger = logging.getLogger(__name__)

# Where weight, gradient and state of an entry are zero, a step of these leaves them zero. Any other optimizer (one that
# mixes entries, as Muon does) has its masked blocks zeroed after each step.
KEEP_ZERO: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.RMSprop,
)  # fmt: skip

LEAST_LEFT = 0.1  # of a run, for layers that come late: in less there is nothing to choose by

_wanted: weakref.WeakKeyDictionary[Gate, Options] = weakref.WeakKeyDictionary()
_in_the_open: weakref.WeakKeyDictionary[Gate, weakref.ref[Controller]] = weakref.WeakKeyDictionary()
_told_of: weakref.WeakSet[Gate] = weakref.WeakSet()  # that they came too late
_ran: set[bool] = set()  # since the last optimizer step, graphs with a budget: with a gate, without one


class _Run:
    """A controller of the one-line form, its gates, and who has stepped them in this round.

    It lives as long as its gates do, which hold it: another optimizer may take the run over. `late` says that it began
    after its optimizer had.
    """

    def __init__(self, controller: Controller, gates: Iterable[Gate], late: bool) -> None:
        self.controller, self.gates, self._late = controller, list(gates), late
        for gate in self.gates:
            gate.run = self
        self._stepped: set[Gate] = set()
        self._by: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def step(self, optimizer: torch.optim.Optimizer, stepped: Mapping[Gate, bool]) -> None:
        """Takes in that an optimizer has stepped these gates, some of them its own; True: by a gradient since the last.

        Without one it belongs to the same round: of optimizers around one another the inner one's hook comes first.
        """
        own = {gate: anew for gate, anew in stepped.items() if gate.run is self}
        again = any(anew and gate in self._stepped for gate, anew in own.items())
        if not self._stepped or again or optimizer in self._by:
            self._stepped.clear()
            self._by.clear()
            self._advance()
        self._stepped.update(own)
        self._by.add(optimizer)

    def _advance(self) -> None:
        try:
            self.controller.advance()
        except BudgetError:
            if not self._late:
                raise
            self.controller.close()  # the rest of the run is too short for it
            for gate in self.gates:
                gate.run = None
            _warn_late(self.gates)


def adopt(gate: Gate, options: Options) -> None:
    """Has a gate driven from whichever optimizer steps its Parameter, as `options` say."""
    if gate in _in_the_open:
        controller = _in_the_open[gate]()
        if controller is not None and options.budget is not None:
            _warn_two_budgets(options.budget.flops, controller.budget.flops)
    elif gate not in _wanted:
        _wanted[gate] = options
        meter.listening = True


def ran(gated: bool) -> None:
    """Notes that a graph with a budget has run, `gated` where it has a gate."""
    _ran.add(gated)


def controller_of(optimizer: torch.optim.Optimizer) -> Controller | None:
    """The controller that the one-line form runs from this optimizer, bare or in a trainer's wrapper; None before its
    first step.

    Raises TypeError for what is no optimizer.

    Its `state_dict()` belongs into a checkpoint. A run is resumed in the open, where the controller is there before the
    first step: `Controller(model, budget=..., total_steps=..., optimizer=optimizer).load_state_dict(state)`.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"controller_of takes the optimizer that trains the model; got {type(optimizer).__name__}")
    runs = _runs(_gates(optimizer))
    return runs[0].controller if runs else None


def leave(gate: Gate, optimizer: torch.optim.Optimizer, controller: Controller) -> None:
    """Has a gate left to a controller that its user steps; `optimizer` is the one that steps its Parameter."""
    gate.owned_by(optimizer)
    _wanted.pop(gate, None)
    _in_the_open[gate] = weakref.ref(controller)


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All Parameters that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gates(optimizer: torch.optim.Optimizer) -> list[Gate]:
    """Those of the Parameters that an optimizer steps."""
    return [gate for parameter in parameters(optimizer) if (gate := registry.get(parameter)) is not None]


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gates = _gates(optimizer)
    if _ran == {False} and not gates:
        _warn_dense()
    _ran.clear()
    if not gates:
        meter.end_step_without_gates()
        return
    keeps_zero = type(optimizer) in KEEP_ZERO
    anew = {gate: gate.stepped_by(optimizer, keeps_zero=keeps_zero) for gate in gates}
    newcomers = [gate for gate in gates if gate.run is None and gate in _wanted]
    if newcomers:
        _start(newcomers, max((run.controller.steps for run in _runs(gates)), default=0))
    for run in _runs(gates):
        run.step(optimizer, anew)
    for gate, outcome in respecialize.at_boundary(gates, _steps_left):
        controller = _controller(gate)
        if controller is not None and isinstance(controller.log, run_log.RunLog):
            step = controller.steps + (not controller.driven)  # one in the open is told of a step after the optimizer's
            controller.log.respecialized(step, gate, outcome)


def _controller(gate: Gate) -> Controller | None:
    """That of the run which a gate is part of."""
    reference = _in_the_open.get(gate)
    own = None if reference is None else reference()
    return own or (None if gate.run is None else gate.run.controller)


def _steps_left(gate: Gate) -> int | None:
    """Of the run that a gate is part of; None where nobody said how long it is."""
    controller = _controller(gate)
    return None if controller is None or controller.total_steps is None else controller.total_steps - controller.steps


def _runs(gates: list[Gate]) -> list[_Run]:
    """Those that control some of these gates."""
    return list(dict.fromkeys(gate.run for gate in gates if gate.run is not None))


def _start(newcomers: list[Gate], done: int) -> None:
    """Begins runs for gates without one, and for those in the same graphs, after so many steps of their optimizer."""
    if done:
        newcomers = [gate for gate in newcomers if gate not in _told_of]
    together = meter.together(newcomers)
    if any(gate.run is not None for gate in together):  # a second controller of one graph would not divide, but haggle
        _warn_late(newcomers)
        return
    groups: dict[Options, dict[str, Gate]] = {}
    for gate in together:
        if (options := _wanted.get(gate)) is not None:
            named = groups.setdefault(options, {})
            named[gate.name if gate.name not in named else f"{gate.name}#{len(named)}"] = gate
    for options, named in groups.items():
        assert options.budget is not None
        total = options.total_steps
        if done and total is not None and total - done < LEAST_LEFT * total:
            _warn_late(list(named.values()))
            continue
        left = None if total is None else total - done
        controller = Controller(named, meter.counter(named.values()), options.budget, left, driven=True)
        controller.log = None if done else run_log.start(options.log, controller)  # a log is of one controller
        _Run(controller, named.values(), late=done > 0)
        logger.info("a controller drives %d gates", len(named))


@functools.cache
def _warn_two_budgets(ignored: float, budget: float) -> None:
    warnings.warn(
        f"ctrlcompile ignores the option budget={ignored:g}: these layers are driven by a Controller on a budget of "
        f"{budget:g}, made from the model",
        RuntimeWarning,
        stacklevel=2,
    )


def _warn_late(late: list[Gate]) -> None:
    """Once of each gate that has come after its optimizer's first step, and is dense from now on."""
    names = [gate.name for gate in late if gate not in _told_of]
    _told_of.update(late)
    if not names:
        return
    warnings.warn(
        f"ctrlcompile trains {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} densely: they were trained for "
        "the first time when the budget of their graph had been divided among its other layers, or too near the end of "
        "the run. Make a ctrlcompile.Controller from the model, which has all layers from the start",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_dense() -> None:
    warnings.warn(
        "ctrlcompile trains a model densely although it was given a budget: none of its layers can be gated. Gated are "
        "linears (torch.nn.functional.linear), products (x @ weight, x @ weight.T, addmm, einsum) and convolutions "
        "whose weight is a Parameter; print(ctrlcompile.explain(model)(*inputs)) tells of each why not",
        RuntimeWarning,
        stacklevel=2,
    )


register_optimizer_step_post_hook(_after_step)
