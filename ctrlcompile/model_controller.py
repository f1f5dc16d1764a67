"""The controller in the open: made from a model, stepped in the user's own loop."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ctrlcompile import controller, follow, run_log
from ctrlcompile.blocks import BlockChoice
from ctrlcompile.controller.budget import Budget
from ctrlcompile.meter import meter
from ctrlcompile.named_gates import gates


class Controller(controller.Controller):
    """Lands a model's training run on its budget by switching blocks of its weights off, and on again.

    Make it before the model's first compiled call, and call `step` once after each `optimizer.step()`, of several the
    last:

    >>> controller = cc.Controller(model, budget=0.4, total_steps=5000, optimizer=optimizer)  # doctest: +SKIP
    >>> model = torch.compile(model, backend="ctrlprune")  # doctest: +SKIP
    >>> loss.backward(); optimizer.step(); controller.step(loss)  # doctest: +SKIP

    Args:
        model: plain or compiled; its weights are gated as `ctrlcompile.gates` does. One that a plain matrix product
            reads (`x @ weight`) has its gate from the first compiled call on: make the controller after that call.
        budget: what the run may use: a `Budget`, or the share of the dense run's training FLOPs, in (0, 1].
        total_steps: optimizer steps of the whole run; None: the budget is a rate to hold.
        optimizer: the one, or the several, that step the model's Parameters; state of a pruned block is zeroed with it.
        block, exclude: as for `ctrlcompile.gates`.
        interval: optimizer steps between decisions; by default a hundredth of the run, 5 to 50.
        log: folder for the run's log, which `ctrlcompile report` reads; a resumed run goes on in the same.

    Raises:
        TypeError, ValueError: a wrong argument, a model without a weight to gate, an optimizer of another model, a log
            that cannot be written or is of another run.
        BudgetError: from the first `step`, where the model cannot meet the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: float | Budget,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        total_steps: int | None = None,
        block: BlockChoice = "auto",
        exclude: Sequence[str] = (),
        interval: int | None = None,
        log: str | Path | None = None,
    ) -> None:
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for one in optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(
                    "optimizer is the torch.optim.Optimizer that trains the model, or a list of those that do; got "
                    f"{type(one).__name__}"
                )
        found = gates(model, block, exclude=exclude)
        if not found:
            raise ValueError(
                "the model has no weight that can be gated, so there is nothing to control. One that it multiplies by "
                "itself (x @ weight, as HuggingFace's GPT-2 does) has a gate once the compiled model has run: call it "
                "once, then make the controller"
            )
        steps = {id(parameter): one for one in optimizers for parameter in follow.parameters(one)}
        trained = {name: gate for name, gate in found.items() if id(gate.weight) in steps}
        if found and not trained:
            raise ValueError(
                "the optimizer steps none of the model's gated Parameters; pass the one that trains this model"
            )
        for gate in trained.values():
            gate.signals.grad = None  # what came before does not count
        super().__init__(trained, meter.counter(trained.values()), budget, total_steps, interval=interval)
        self.log = run_log.start(log, self)
        for gate in trained.values():
            follow.leave(gate, steps[id(gate.weight)], self)
