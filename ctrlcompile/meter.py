"""What an optimizer step has used: each training call of a region, booked to the controllers of its gates."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ctrlcompile.controller.contract import StepCost
from ctrlcompile.controller.coupling import Coupled
from ctrlcompile.cost import BoundCost, saved_tensors_are_hooked
from ctrlcompile.gate import Gate


@dataclass
class _Account:
    """FLOPs that regions used, and how they couple their gates.

    `closed` says that the optimizer step that it belongs to has been.
    """

    dense: float = 0.0
    used: float = 0.0
    skipped: float = 0.0  # of attention, for heads that need no weights
    gated: dict[Gate, float] = field(default_factory=dict)
    coupled: set[Coupled] = field(default_factory=set)
    closed: bool = False

    def add(self, other: "_Account") -> None:
        self.dense += other.dense
        self.used += other.used
        self.skipped += other.skipped
        for gate, flops in other.gated.items():
            self.gated[gate] = self.gated.get(gate, 0.0) + flops
        self.coupled |= other.coupled


class Counter:
    """What the regions that read some gates used since the last call of this: called once per optimizer step.

    Regions of several controllers' gates (two optimizers share a model) count for each of them.
    """

    def __init__(self, meter: "Meter", gates: Iterable[Gate]) -> None:
        self.gates = frozenset(gates)
        self._meter = meter
        self._account = _Account()

    def add(self, account: _Account) -> None:
        """Notes the cost of a call."""
        self._account.add(account)

    def __call__(self) -> StepCost:
        """The cost of an optimizer step, which has just run."""
        self._account.add(self._meter.end_step(self.gates))
        account, self._account = self._account, _Account()
        fixed = account.dense - account.skipped - sum(account.gated.values())
        return StepCost(account.dense, fixed, account.gated, account.used, account.coupled)


class Meter:
    """Hands what each training call of a region cost to the counters of its gates.

    A region without gates (an embedding behind a graph break, say) counts for the first counter that is called, unless
    an optimizer without gates steps and then a region runs: it was of another model. What a region cost before all its
    gates had a counter is kept until its next step, for those that come yet.
    """

    def __init__(self) -> None:
        self.listening = False
        self._counters: weakref.WeakSet[Counter] = weakref.WeakSet()
        self._gateless = _Account()
        # Since the last step: calls inside checkpoints that will make them again, by ids of their cost and gates.
        self._checkpointed: dict[tuple[int, ...], int] = {}
        self._unclaimed: dict[tuple[int, ...], _Account] = {}  # by ids of gates, which the account keeps alive

    def counter(self, gates: Iterable[Gate]) -> Counter:
        """A new counter of the regions that read any of these gates."""
        self.listening = True
        counter = Counter(self, gates)
        self._counters.add(counter)
        for key, account in list(self._unclaimed.items()):
            if not counter.gates.isdisjoint(account.gated):
                counter.add(account)
                if self._all_counted(account.gated):
                    del self._unclaimed[key]
        return counter

    def together(self, gates: Iterable[Gate]) -> list[Gate]:
        """These gates, and those in regions that ran with them and have gates without a counter."""
        found = dict.fromkeys(gates)
        waiting = [account.gated for account in self._unclaimed.values()]
        while near := [gated for gated in waiting if not found.keys().isdisjoint(gated)]:
            waiting = [gated for gated in waiting if not any(gated is other for other in near)]
            for gated in near:
                found.update(dict.fromkeys(gated))
        return list(found)

    def record(
        self,
        cost: BoundCost,
        gates: Sequence[Gate | None],
        coupled: Coupled | None = None,
        skipped: float = 0.0,
        wanted: bool = True,
    ) -> None:
        """Notes one training call of a region.

        `gates` are those of its layers, in order, `coupled` says how; `skipped` is what its attentions saved; `wanted`
        says that a counter may yet come for gates that have none.
        """
        if self._is_recomputed((id(cost), *map(id, gates))):
            return
        if self._gateless.closed:
            self._gateless = _Account()
        known = set() if coupled is None else {coupled}
        account = _Account(cost.dense, used_flops(cost, gates) - skipped, skipped, coupled=known)
        for gate, (total, _) in zip(gates, cost.products, strict=True):
            if gate is not None:
                account.gated[gate] = account.gated.get(gate, 0.0) + total
        if not account.gated:
            self._gateless.add(account)
            return
        for counter in self._counters:
            if not counter.gates.isdisjoint(account.gated):
                counter.add(account)
        if wanted and not self._all_counted(account.gated):
            key = tuple(map(id, gates))
            if (before := self._unclaimed.get(key)) is None or before.closed:
                self._unclaimed[key] = account
            else:
                before.add(account)

    def end_step_without_gates(self) -> None:
        """Notes that an optimizer has stepped that owns no gate."""
        self._gateless.closed = True

    def end_step(self, gates: frozenset[Gate]) -> _Account:
        """Notes that the optimizer has stepped these gates; what nobody's regions used since the last step of any."""
        for waiting in self._unclaimed.values():
            waiting.closed = waiting.closed or not gates.isdisjoint(waiting.gated)
        account, self._gateless = self._gateless, _Account()
        self._checkpointed.clear()
        return account

    def _is_recomputed(self, call: tuple[int, ...]) -> bool:
        """Whether a call makes one again, for backward, that counts already.

        That is one under saved-tensor hooks, as a checkpoint's forward pass is. A reentrant one's has no gradients.
        """
        earlier = self._checkpointed.get(call, 0)
        if torch._C._current_graph_task_id() >= 0:
            self._checkpointed[call] = max(0, earlier - 1)
            return earlier > 0
        if saved_tensors_are_hooked():
            self._checkpointed[call] = earlier + 1
        return False

    def _all_counted(self, gates: Iterable[Gate]) -> bool:
        return all(any(gate in counter.gates for counter in self._counters) for gate in gates)


def used_flops(cost: BoundCost, gates: Sequence[Gate | None]) -> float:
    """FLOPs of a region's call under its gates' present masks and probes."""
    saved = sum(
        total * (1 - gate.active_share) - wgrad * gate.probed_share
        for gate, (total, wgrad) in zip(gates, cost.products, strict=True)
        if gate is not None
    )
    return cost.dense - saved


meter = Meter()
