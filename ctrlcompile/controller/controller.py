"""The feedback loop: measure → settle → ramp → price → decide → act, once per optimizer step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint
from .budget import Budget, Ledger, parse_steps
from .contract import Gate, Log, StepCost
from .coupling import Lattice
from .decide import Blocks, Decision, Exchange, decide, evenly, swap_limit
from .host import on_cpu
from .layout import Layout
from .price import Feedback
from .probes import Prober
from .ramp import OPEN_ENDED, Ramp
from .signals import Inbox, Signals

log = logging.getLogger(__name__)

MIN_DENSITY = 0.02  # of each gate's blocks; at least one


class Controller:
    """Lands a training run on its budget by switching the blocks of gates off, and on again.

    Args:
        gates: name -> `Gate`, all on one device, in any order.
        meter: returns the `StepCost` of the optimizer step that has just run.
        budget: a `Budget`, or the share of the dense run's training FLOPs in (0, 1].
        total_steps: optimizer steps of the run. None holds the rate: after a dense start and a ramp of fixed length,
            what comes costs `budget` times dense; the dense start is not paid back.
        interval: optimizer steps between decisions; by default a hundredth of the run, 5 to 50.
        min_density: share of each gate's blocks that always stays.
        driven: True where a hook calls `advance` after each optimizer step; `step` then only notes the loss.

    Attributes:
        steps: optimizer steps seen.
        price: benefit (loss) per share of the gateable FLOPs at which the marginal block is kept.
        settled: 0 to 1, how far the ranking of blocks has stopped changing.
        reactivations: blocks brought back so far.
        history: a record per decision and one of the last step, plain numbers.
        log: told of each record, with the gates, when it is made; None: nobody.

    Raises:
        TypeError, ValueError: a wrong argument.
        BudgetError: after the first step, where the model cannot meet the budget; after the second, where it cannot
            because some weights turn out to be stepped by nobody.
    """

    @on_cpu
    def __init__(
        self,
        gates: Mapping[str, Gate],
        meter: Callable[[], StepCost],
        budget: float | Budget,
        total_steps: int | None = None,
        *,
        interval: int | None = None,
        min_density: float = MIN_DENSITY,
        driven: bool = False,
    ) -> None:
        self.budget = Budget.of(budget)
        self.total_steps = None if total_steps is None else parse_steps("total_steps", total_steps)
        length = self.total_steps or OPEN_ENDED
        default = min(50, max(5, length // 100))
        self.interval = default if interval is None else parse_steps("interval", interval, "steps between decisions")
        if not 0 <= min_density <= 1:
            raise ValueError(f"min_density: got {min_density!r}; allowed is 0 to 1, a share of each gate's blocks")
        if not gates:
            raise ValueError(
                "gates: got none; the model has no weight that can be gated, so there is nothing to control"
            )
        devices = {str(gate.signals.device) for gate in gates.values()}
        if len(devices) > 1:
            raise ValueError(f"gates: got weights on {', '.join(sorted(devices))}; allowed is one device for all")

        self.gates = dict(sorted(gates.items(), key=lambda item: _natural(item[0])))
        self.meter = meter
        self.driven = driven
        self._list = list(self.gates.values())
        self._own = set(self._list)
        self._layout = Layout.of(self._list)
        self._device = self._list[0].signals.device
        self._heard = self._layout.to(self._device)  # the layout of what the signals are kept in
        self._inbox = Inbox(self._list, self._layout)
        self._lattice = Lattice(self._list, self._layout)
        self._least = (self._layout.lengths * min_density).ceil().long().clamp(min=1)
        self._slow = max(10, 2 * self.interval)
        self._dwell = max(2 * self.interval, length // 20)

        self.steps = 0
        self.price = 0.0
        self.settled = 0.0
        self.reactivations = 0
        self.history: list[dict[str, Any]] = []
        self.log: Log | None = None
        self._loss: float | Tensor | None = None
        self._next = 1  # step of the next decision
        self._planned = 1.0  # share of the gateable FLOPs that the steps since the last decision were to use
        self._since = [0.0, 0.0]  # gateable FLOPs since then: used, at density 1
        self._ledger = Ledger()
        self._signals = Signals.of(self._heard, (self._slow / 4, self._slow))
        self._blocks = Blocks.of(self._masks())
        self._density = float(self._cost()[self._blocks.active].sum())
        self._ramp = Ramp(level=self._density)
        self._feedback = Feedback()
        self._exchange = Exchange()
        self._decided = 0  # step of the last decision
        self._prober = Prober(self._list, self._layout)
        self._left_at = self._updates()

    # ---------------------------------------------------------------- what users read

    @property
    def density(self) -> float:
        """Active share of the FLOPs that gates can switch, 0 to 1."""
        return self._density

    @property
    def flops_used(self) -> float:
        """FLOPs used so far, everything counted."""
        return self._ledger.used

    @property
    def flops_dense(self) -> float:
        """FLOPs that the dense run would have used so far."""
        return self._ledger.dense

    @property
    def budget_used(self) -> float:
        """Used part of the whole run's allowance; without `total_steps`, FLOPs used over FLOPs allowed so far."""
        left = max(0, (self.total_steps or 0) - self.steps)
        allowance = self.budget.flops * (self._ledger.dense + left * self._ledger.average_dense)
        return self._ledger.used / allowance if allowance else 0.0

    def __repr__(self) -> str:
        of = "open-ended" if self.total_steps is None else f"of {self.total_steps}"
        return (
            f"Controller(budget={self.budget.flops:g}, step {self.steps} {of}, {len(self._list)} gates, "
            f"{self._blocks.active.numel()} blocks, density {self.density:.3f}, budget used {self.budget_used:.1%}, "
            f"{self.reactivations} reactivations)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers from which `load_state_dict` resumes exactly."""
        return checkpoint.save(self)

    @on_cpu
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes where `state` was saved, bit for bit; also switches the gates to the saved masks.

        Raises:
            ValueError: `state` is of another model, version, budget or length of run. Nothing is changed then.
        """
        checkpoint.load(self, state)

    @on_cpu
    def close(self) -> None:
        """Leaves the gates as they are: no signals, no probes."""
        self._prober.stop()
        self._inbox.close()
        if self.log is not None:
            self.log.close()

    # ---------------------------------------------------------------- the loop

    def step(self, loss: float | Tensor | None = None) -> None:
        """Call once after each `optimizer.step()`. With `driven=True` a hook does; this then notes the loss."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        if not self.driven:
            self.advance()

    @on_cpu
    @torch.no_grad()
    def advance(self) -> None:
        """Takes in the optimizer step that has just run, and decides when a decision is due."""
        self.steps += 1
        left = None if self.total_steps is None else self.total_steps - self.steps
        if self._updates() != self._left_at:  # the user has switched blocks, and their gates' probes were not made
            self._prober.stop()
            self._next = self.steps
        self._measure()
        if left == 0:
            self._prober.stop()
            self._note(self._planned, 0, 0)
            self._tell_share()
        elif left == -1:
            log.info("past total_steps=%d: holding density %.3f", self.total_steps, self.density)
        elif self.steps >= self._next and self._ledger.gated and (left is None or left > 0):
            self._decide(left)
        self._prober.hand_out()
        self._left_at = self._updates()

    def _measure(self) -> None:
        cost = self.meter()
        gated = [float(cost.gated.get(gate, 0.0)) for gate in self._list]
        others = sum(flops * gate.density for gate, flops in cost.gated.items() if gate not in self._own)
        self._lattice.learn(cost.coupled)
        known = self._lattice.fingerprint
        normalised = [float(gate.normalised) for gate in self._list]
        numbers = [known, known**2, cost.dense, cost.fixed + others, cost.used, *gated, *normalised]
        arrived = self._inbox.collect()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shared = torch.tensor(numbers, dtype=torch.float64, device=arrived.device)
            dist.all_reduce(arrived)
            dist.all_reduce(shared)
            numbers = shared.tolist()
            self._lattice.trusted = numbers[0] ** 2 == dist.get_world_size() * numbers[1]  # all know the same
        dense, fixed, used, *rest = numbers[2:]
        gated = rest[: len(self._list)]
        self._lattice.normalised = torch.tensor(rest[len(self._list) :]) > 0  # by any replica's word
        ran = torch.tensor(gated) > 0
        self._signals.observe(arrived, self._sent(self._prober.current.ids), self._sent(ran), self._heard)
        if dense <= 0:
            if self.steps == 1:
                log.warning("no cost was measured in the first step: is the model compiled with backend='ctrlprune'?")
            return
        self._ledger.add(dense, fixed, used, gated)
        self._since[0] += used - fixed
        self._since[1] += sum(gated)
        if self._ledger.measured <= 2 and (self.total_steps is None or self.steps <= self.total_steps):
            # In the first step, an optimizer whose turn comes later has not been seen yet.
            first = self._ledger.measured == 1
            untrained = [] if first else [name for name, gate in self.gates.items() if not gate.trained]
            left = None if self.total_steps is None else self.total_steps - self.steps
            self._ledger.check(self.budget, left, self._lowest(self._least if first else self._floor()), untrained)

    def _decide(self, left: int | None) -> None:
        """Settle, ramp, price, decide and act; then the probes until the next decision."""
        self._hear()
        cost, floor = self._cost(), self._floor()
        self._density = float(cost[self._blocks.active].sum())
        wanted, take = self._plan(left, cost, floor)
        self._next = self.steps + take
        returned, dropped = self._act(self._choose(wanted, cost, floor)) if self._ramp.started >= 0 else (0, 0)
        self._decided = self.steps
        if take == left:
            self._prober.stop()  # no decision is left that they could inform
        else:
            self._plan_probes(take, wanted, cost)
        self._note(wanted, returned, dropped)

    def _hear(self) -> None:
        """Folds what has been reported since the last decision, and takes in what users have switched."""
        self._signals.fold(self._sent(self._blocks.active), self._heard, self._presumed())
        if len(self.history) == 1 and not self._signals.reported().any():
            log.warning(
                "after %d steps no gated weight has had a finite gradient: nothing is pruned before one has. Gradients "
                "taken by torch.autograd.grad(loss, parameters) leave out what blocks report; loss.backward() does not",
                self.steps,
            )
        masks = self._masks()
        if not torch.equal(masks, self._blocks.active):
            self._signals.forget_(self._sent(masks ^ self._blocks.active))
            self._blocks.switch_(masks, self.steps)

    def _plan(self, left: int | None, cost: Tensor, floor: Tensor) -> tuple[float, int]:
        """The mean share of the gateable FLOPs until the next decision, and the steps until then; see `Ramp.plan`."""
        ledger, ramp = self._ledger, self._ramp
        if left is None and ramp.progress < 1:
            ledger.forgive()
        allowed = ledger.allowed(self.budget, left or OPEN_ENDED)
        if ramp.progress < 1:
            share = min(0.9, max(0.1, allowed / max(ramp.level, 1e-12)))
            self.settled = self._signals.settled(self._sent(self._blocks.active), self._sent(cost), share)
        before = ramp.started, ramp.progress
        wanted, take = ramp.plan(
            self.steps,
            self.interval,
            allowed,
            self.settled,
            total_steps=self.total_steps,
            first=self._slow,
            least=ledger.gated_at(self._lowest(floor)) / ledger.gated,
            normalised=float(cost[self._saturating()].sum()),
        )
        if before[0] < 0 <= ramp.started:
            log.info("step %d: dense warm-up ends, gradients settled to %.2f", self.steps, self.settled)
        if before[1] < 1 <= ramp.progress:
            log.info("step %d: ramp ends at density %.3f", self.steps, wanted)

        if ramp.started >= 0 and self._planned > 0 and self._since[1] > 0:
            planned = self._planned * self._since[1]
            self._feedback.update((self._since[0] - planned) / planned)
        self._planned, self._since = wanted, [0.0, 0.0]
        return wanted, take

    def _choose(self, wanted: float, cost: Tensor, floor: Tensor) -> Decision:
        """The blocks that are worth most for what they cost, within what may go and come back."""
        active = self._blocks.active
        worth = self._lattice.weigh(self._signals.benefit(self._sent(active), self._heard).cpu(), active, cost)
        may_come = swap_limit(self.steps, self.steps - self._decided, self.total_steps) * wanted
        ask = self._feedback.ask(wanted)
        held = ~self._signals.reported().cpu()
        least = torch.where(held, self._layout.lengths, floor)
        return decide(
            self._blocks,
            worth,
            cost,
            self._layout,
            step=self.steps,
            ask=ask,
            dwell=self._dwell,
            swap=self._exchange.grant(may_come, float(cost.max())),
            least=evenly(ask, least, active, worth, cost, self._layout, apart=self._lattice.normalised),
            held=held[self._layout.gate_of],
            saturating=self._saturating(),
        )

    def _note(self, wanted: float, returned: int, dropped: int) -> None:
        record = {
            "step": self.steps,
            "loss": None if self._loss is None else float(self._loss),
            "density": self._density,
            "target": wanted,
            "price": self.price,
            "settled": self.settled,
            "reactivated": returned,
            "switched_off": dropped,
            "flops_used": self._ledger.used,
            "flops_dense": self._ledger.dense,
        }
        self.history.append(record)
        log.debug("%s", record)
        if self.log is not None:
            self.log.write(record, self.gates)

    def _act(self, decision: Decision) -> tuple[int, int]:
        """Switches the gates; returns how many blocks came back and how many went."""
        blocks = self._blocks
        changed = decision.active ^ blocks.active
        back = changed & decision.active
        counts = self._layout.sums(torch.stack((changed, back)).float()).tolist()
        for gate, mask, count in zip(self._list, self._layout.split(decision.active), counts[0], strict=True):
            if count:
                gate.update_(mask.view(gate.grid))
        blocks.switch_(decision.active, self.steps)
        self._exchange.spend(decision.exchanged)
        self._signals.forget_(self._sent(changed))
        self.price, self._density = decision.price, decision.density
        returned = int(sum(counts[1]))
        self.reactivations += returned
        return returned, int(sum(counts[0])) - returned

    def _plan_probes(self, steps: int, wanted: float, cost: Tensor) -> None:
        active = self._blocks.active
        unspent = min(wanted, self._feedback.ask(wanted)) - self._density  # feedback holds back what probes cost
        if not bool((~active & (cost > 0) & (cost <= 2 * unspent)).any()):  # nothing that it would bring back
            unspent = 0.0
        if swap_limit(self.steps, self.interval, self.total_steps) == 0 == unspent:  # nothing comes back any more
            self._prober.stop()
        else:
            known = active | self._lattice.useless(active)  # of these nothing is to be learnt
            self._prober.plan(known, self._ledger, steps=steps, wanted=wanted, unspent=unspent)

    def _sent(self, decided: Tensor) -> Tensor:
        """A tensor of decisions on the device of the signals, without waiting for it."""
        return decided.to(self._device, non_blocking=True)

    # ---------------------------------------------------------------- flat views of the gates

    def _saturating(self) -> Tensor:
        """bool [N]: blocks before a batch norm."""
        return self._lattice.normalised[self._layout.gate_of]

    def _presumed(self) -> Tensor | None:
        """‖w‖/√n [N] of blocks before a batch norm, 0 of others; the same on all replicas. None: there are none."""
        normalised = self._lattice.normalised
        if not normalised.any():
            return None
        sizes = [
            gate.norms().flatten() if known else torch.zeros(gate.mask.numel(), device=self._device)
            for gate, known in zip(self._list, normalised.tolist(), strict=True)
        ]
        area = torch.cat([gate.block_area.flatten() for gate in self._list])
        presumed = torch.cat(sizes) / self._sent(area.sqrt())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(presumed)
        return presumed

    def _floor(self) -> Tensor:
        """Blocks of each gate that stay at least: all where nobody trains the weight."""
        return torch.where(torch.tensor([gate.trained for gate in self._list]), self._least, self._layout.lengths)

    def _lowest(self, floor: Tensor) -> list[float]:
        """Density of each gate with so many blocks."""
        densities: list[float] = (floor / self._layout.lengths).tolist()
        return densities

    def _updates(self) -> list[int]:
        return [gate.updates for gate in self._list]

    def _masks(self) -> Tensor:
        return torch.cat([gate.mask.flatten() for gate in self._list])

    def _cost(self) -> Tensor:
        """Share of the gateable FLOPs, float64 [N]; before the first step, of the gateable weight entries."""
        per_gate = self._ledger.average_gated or [float(gate.block_area.sum()) for gate in self._list]
        scale = torch.tensor(per_gate, dtype=torch.float64)
        return self._layout.area * (scale / scale.sum())[self._layout.gate_of]

    def _tell_share(self) -> None:
        """At the end of the run: what it used and, where that is over the budget by more than 1 %, a warning."""
        share = self._ledger.used / self._ledger.dense if self._ledger.dense else 0.0
        if share <= 1.01 * self.budget.flops:
            log.info("step %d, the last: %.4f of the dense FLOPs used", self.steps, share)
            return
        silent = int((~self._signals.reported()).sum())
        why = f": {silent} of {len(self._list)} gates never had a finite gradient" if silent else ""
        log.warning(
            "step %d, the last: %.4f of the dense FLOPs used, more than the budget of %g%s",
            self.steps, share, self.budget.flops, why,
        )  # fmt: skip


def _natural(name: str) -> list[int | str]:
    """To sort names by: numbers in them as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
