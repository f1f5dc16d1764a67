"""Changes which variant computes a gated product where that pays, at optimizer-step boundaries, without a stall.

After each step of the optimizer that owns a weight, its nodes (a role of a gate) take in what their calls took. Where
the masks have changed, or some steps have passed, the cost model says what each variant would take. A variant that a
node has run before is put in force at once where it is faster by a margin. One that it has not is first built, where it
has a kernel of its own, by one thread in the background, and then tried: for a few steps it takes turns with the one in
force, and it stays where its calls are faster by the margin. All of that only where the predicted seconds saved over
the steps that remain exceed what building costs.

Which variant wins is decided by the clock, and variants round differently: `"never"` is for runs that must agree to
the last bit.
"""

import logging
import statistics
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ctrlcompile import variants
from ctrlcompile.background import Build, Builder, Recipe
from ctrlcompile.gate import Gate
from ctrlcompile.kernels import build
from ctrlcompile.proposals import Outcome, Proposal
from ctrlcompile.variant_cost import KEPT_OWN, CostModel, Observation, Size
from ctrlcompile.variants import BLOCK_SPARSE, COMPACT, DENSE, Call, Types, Variant

log = logging.getLogger(__name__)

HORIZON = 1000  # steps that a change has to pay in where the length of the run is not known
MARGIN = 0.05  # of a call's time: what a variant has to be faster by
LEAST_SAVED_S = 1.0  # over the steps that remain, by all nodes together: less is not worth a try
FIRST_LOOK = 5  # step of one look more: dense products may be faster while nothing is masked
LOOK_EVERY, SETTLED_LOOK = 25, 100  # steps between looks at a gate: after something has changed, and else
FEWEST_CALLS = 3  # of a node, for a median that counts
TRIAL_TURNS = 4  # steps of each of the two in a trial, after one that warms up
MOST_BUILDS = 8  # of a process
BUILD_GUESS_S = 5.0  # before any kernel was compiled in this process

# Rate at equal FLOPs before anything was measured, by the smaller side of a kernel's block; on the bright side where a
# try costs little. It only decides what is tried.
_GUESSED_RATE = {8: 0.6, 16: 0.85, 24: 0.95, 32: 1.0}
_OTHERS_RATE = 1.1


Mode: TypeAlias = Literal["auto", "never"] | Callable[[Proposal], bool]


def check_mode(mode: Any) -> Mode:
    """ "auto", "never" or a callable. Raises ValueError for another string, TypeError for anything else."""
    if callable(mode):
        decide: Callable[[Proposal], bool] = mode
        return decide
    if not isinstance(mode, str):
        raise TypeError(
            f'respecialize is "auto", "never" or a callable that says yes or no to each Proposal; got {mode!r}'
        )
    if mode not in ("auto", "never"):
        raise ValueError(f'respecialize is "auto", "never" or a callable; got {mode!r}')
    return "auto" if mode == "auto" else "never"


def adopt(gate: Gate, mode: Mode) -> None:
    """Has a gate's variants changed from now on as `mode` says; the first mode that it is given stays."""
    if mode != "never" and gate not in _plans and gate.signals.device.type == "cpu":
        _plans[gate] = _Plan(mode, variants.open_table(gate))


def at_boundary(gates: Iterable[Gate], steps_left: Callable[[Gate], int | None]) -> list[tuple[Gate, Outcome]]:
    """Call it after an optimizer step, with the gates of the weights that it stepped; tells what has changed.

    `steps_left` are those of a gate's run, None where that is not known.
    """
    told: list[tuple[Gate, Outcome]] = []
    with _lock:
        wishes: list[_Wish] = []
        for gate in gates:
            if (plan := _plans.get(gate)) is not None:
                wishes += plan.advance(gate, steps_left)
                told += [(gate, outcome) for outcome in plan.outcomes]
                plan.outcomes.clear()
        if wishes:
            _grant(wishes)
    build.give_turn()
    return told


def in_force(gate: Gate) -> dict[str, str]:
    """The name of the variant in force for each role; empty on a GPU, where a crossover decides."""
    if gate.signals.device.type != "cpu":
        return {}
    table = variants.table_of(gate)
    named = {role: BLOCK_SPARSE if table is None else table.nodes[role].variant for role in variants.ROLES}
    return {role: variant.name(gate.block) for role, variant in named.items()}


def model_error() -> float | None:
    """The median relative error of the cost model's latest predictions; None before any could be checked."""
    return _model.error


@dataclass
class _Change:
    """A variant that a node should run, what is predicted of it, and its build where it needs one."""

    variant: Variant
    gain: float
    saved_s: float
    cost_s: float = 0.0
    build: Build | None = None


@dataclass
class _Trial:
    """A change whose variant takes turns with the one in force: odd turns are its own."""

    change: _Change
    calls: dict[Variant, list[Call]]
    turns: int = 0


@dataclass
class _Course:
    """What is known of a node: its latest times by variant, what serves it, and what is under way."""

    settled: Variant = BLOCK_SPARSE
    own: dict[Variant, deque[Observation]] = field(default_factory=dict)
    waiting: _Change | None = None
    trial: _Trial | None = None
    declined: set[Variant] = field(default_factory=set)  # until the mask changes


class _Plan:
    """The courses of a gate's nodes, and what has come of them since it was last told."""

    def __init__(self, mode: Mode, table: variants.Table) -> None:
        self.mode, self.table = mode, table
        self.outcomes: list[Outcome] = []
        self.courses = {role: _Course() for role in variants.ROLES}
        self.steps = self.updates = 0
        self.moved = True  # something has changed since the last look, or at it
        self.busy = False  # something may be under way: a build waited for, a trial

    def advance(self, gate: Gate, steps_left: Callable[[Gate], int | None]) -> "list[_Wish]":
        """Takes a step in, carries on what is under way, and returns what would pay to build and try."""
        self.steps += 1
        changed, self.updates = gate.updates != self.updates, gate.updates
        # Gates are looked at in the same steps, since what they save counts together.
        due = changed or self.steps % (LOOK_EVERY if self.moved else SETTLED_LOOK) == 0
        if due:
            self.moved = changed
        due |= self.steps == FIRST_LOOK
        if not due and not self.busy:
            return []
        wishes: list[_Wish] = []
        for role, course in self.courses.items():
            if changed:
                course.declined.clear()
            waited = course.waiting
            built = waited is not None and waited.build is not None and waited.build.done.is_set()
            if course.trial is None and not (due or built):
                continue
            node = _At(gate, role, self)
            if course.trial is not None:
                self.moved = True
                node.carry_on(course.trial)
            elif node.take_in():
                left = HORIZON if (known_left := steps_left(gate)) is None else known_left
                better = node.better(left)
                known = next((change for change in better if change.variant in course.own), None)
                if known is not None and node.accepted(known):
                    self.moved = True
                    node.put_in_force(known)
                    better = node.better(left)
                new = [change for change in better if change.variant not in course.own]
                if built and waited is not None:
                    course.waiting = None
                    node.receive(waited, still=waited.variant in [change.variant for change in new])
                elif course.waiting is None:
                    wishes += [(node, change) for change in new]
            elif node.node.count:  # called, but nothing is known of it yet
                self.moved = True
        under_way = (course.trial is not None or course.waiting is not None for course in self.courses.values())
        self.busy = bool(wishes) or any(under_way)
        return wishes


class _At:
    """A node at a boundary."""

    def __init__(self, gate: Gate, role: str, plan: _Plan) -> None:
        self.gate, self.role, self.plan = gate, role, plan
        self.course, self.node = plan.courses[role], plan.table.nodes[role]

    def take_in(self) -> bool:
        """Hands the calls recorded to the cost model; whether anything is known of the variant in force."""
        settled, types, recorded = self.course.settled, self.node.types, tuple(self.node.calls)
        calls = [call for call in recorded if (call.variant, call.types) == (settled, types)]
        if len(calls) >= FEWEST_CALLS or len(recorded) >= variants.KEPT_CALLS:
            self.node.calls.clear()
        if len(calls) >= FEWEST_CALLS:
            self._observe(settled, calls)
        return settled in self.course.own and _model.knows(self._kind(settled))

    def better(self, left: int) -> list[_Change]:
        """To variants that are faster by prediction than the one in force, by the margin; the fastest comes first."""
        now, found = self._predict(self.course.settled), []
        per_step = self.node.count / self.plan.steps
        for variant in variants.candidates(self.gate, self.role, self.node.groups) if left > 0 else ():
            out = variant in self.course.declined or self.recipe(variant) in _failed
            if variant != self.course.settled and not out:
                saved = now - self._predict(variant)
                if saved > MARGIN * now:
                    found.append(_Change(variant, saved / now, saved * left * per_step))
        return sorted(found, key=lambda change: -change.gain)

    def recipe(self, variant: Variant) -> Recipe | None:
        """The kernel that a variant needs and a block-sparse node has not: its outputs and inputs, and its types."""
        if variant.kind != "coarse" or self.node.types is None:
            return None
        down, across = variant.block(self.gate.block)
        return (down, across) if self.role == "forward" else (across, down), self.node.types

    def accepted(self, change: _Change) -> bool:
        """Asks a callable mode; what it declines it is not asked again before the mask changes."""
        if not callable(self.plan.mode):
            return True
        block, current = self.gate.block, self.course.settled
        node, names = f"{self.gate.name} {self.role}", (current.name(block), change.variant.name(block))
        if self.plan.mode(Proposal(node, *names, change.gain, change.saved_s, change.cost_s)):
            return True
        self.course.declined.add(change.variant)
        return False

    def receive(self, waited: _Change, *, still: bool) -> None:
        """A build has ended: its variant is tried where it is faster by prediction still, given up where it failed."""
        assert waited.build is not None
        if waited.build.error is not None:
            self._give_up(waited, waited.build)
        elif still:
            self.begin(waited)

    def begin(self, change: _Change) -> None:
        """Starts the trial of a variant that needs no build, or whose build has ended well."""
        if change.build is not None:
            self.node.ready.add((change.variant, change.build.recipe[1]))
        self.course.trial = _Trial(change, {self.course.settled: [], change.variant: []})
        self.node.calls.clear()

    def carry_on(self, trial: _Trial) -> None:
        """The next turn of a trial, or its end."""
        calls, tried, course = tuple(self.node.calls), trial.change.variant, self.course
        self.node.calls.clear()
        if trial.turns >= 2:  # both have run once
            for call in calls:
                if call.variant in trial.calls and call.types == self.node.types and call.share:
                    trial.calls[call.variant].append(call)
        trial.turns += 1
        if trial.turns < 2 * (TRIAL_TURNS + 1):
            self.node.variant = tried if trial.turns % 2 else course.settled
            return
        course.trial = None
        if all(len(calls) >= FEWEST_CALLS for calls in trial.calls.values()):
            now, then = (
                statistics.median(map(_rate, calls)) * self._share(variant) for variant, calls in trial.calls.items()
            )
            for variant, its_calls in trial.calls.items():
                self._observe(variant, its_calls)
            wins = then < (1 - MARGIN) * now
            self._report(trial.change, measured=1 - then / now if now else 0.0, in_force=wins)
            if wins:
                course.settled = tried
        else:  # the layer was not called
            course.declined.add(tried)
        self.node.variant = course.settled

    def put_in_force(self, change: _Change) -> None:
        """A variant that the node has run before serves it again."""
        self._report(change, measured=None, in_force=True)
        self.course.settled = self.node.variant = change.variant

    def _observe(self, variant: Variant, calls: list[Call]) -> None:
        """Hands the call of the median rate to the cost model."""
        middle = sorted(calls, key=_rate)[len(calls) // 2]
        if middle.share and middle.rows:
            own = self.course.own.setdefault(variant, deque(maxlen=KEPT_OWN))
            size = Size(middle.rows, middle.inputs, middle.outputs, middle.share, self._types.x_dtype.itemsize)
            _model.observe(self._kind(variant), own, Observation(size, middle.seconds))

    def _predict(self, variant: Variant) -> float:
        """Seconds of the latest call under the present mask; by guessed rates where nothing was measured."""
        settled, own = self.course.settled, self.course.own
        last, share = own[settled][-1].size, self._share(variant)
        known = _model.predict(self._kind(variant), own.get(variant, ()), last._replace(share=share))
        if known is not None:
            return known
        now, base = self._predict(settled), self._share(settled)
        more = share / base if base else 1.0
        return now * more * self._guessed_rate(settled) / self._guessed_rate(variant)

    def _share(self, variant: Variant) -> float:
        return self.plan.table.share(variant, self.gate)

    def _guessed_rate(self, variant: Variant) -> float:
        side = min(variant.block(self.gate.block))
        return _OTHERS_RATE if variant in (DENSE, COMPACT) or side > max(_GUESSED_RATE) else _GUESSED_RATE[side]

    def _kind(self, variant: Variant) -> tuple[Any, ...]:
        """What shares coefficients in the cost model."""
        return variant.kind, variant.block(self.gate.block), self.role, self.node.family, self._types.x_dtype

    @property
    def _types(self) -> Types:
        assert self.node.types is not None  # it was called
        return self.node.types

    def _give_up(self, change: _Change, failed: Build) -> None:
        self._report(change, measured=None, in_force=False, error=str(failed.error))
        if failed.recipe in _failed:
            return
        _failed.add(failed.recipe)
        name = change.variant.name(self.gate.block)
        warnings.warn(
            f"ctrlcompile goes on without the {name} kernels of {self.gate.name} {self.role}: {failed.error}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _report(self, change: _Change, *, measured: float | None, in_force: bool, error: str = "") -> None:
        current, proposed = (variant.name(self.gate.block) for variant in (self.course.settled, change.variant))
        outcome = Outcome(
            self.role, self.gate.density, current, proposed, change.gain, change.saved_s, change.cost_s, measured,
            in_force, _model.error, error,
        )  # fmt: skip
        log.info("%s %s", self.gate.name, outcome)
        self.plan.outcomes.append(outcome)


_Wish: TypeAlias = tuple[_At, _Change]


def _grant(wishes: list[_Wish]) -> None:
    """Starts builds and trials where nodes together save more than that costs; those that save the most come first."""
    together: dict[Recipe | Variant, list[_Wish]] = {}
    for node, change in wishes:
        together.setdefault(node.recipe(change.variant) or change.variant, []).append((node, change))
    for what, group in sorted(together.items(), key=lambda item: -sum(change.saved_s for _, change in item[1])):
        recipe = None if isinstance(what, Variant) else what
        unbuilt = recipe is not None and recipe not in _builder.finished
        cost = statistics.median(build.compile_seconds or [BUILD_GUESS_S]) if unbuilt else 0.0
        free = [(node, change) for node, change in group if node.course.trial is None and node.course.waiting is None]
        saved = sum(change.saved_s for _, change in free)
        if saved < max(cost, LEAST_SAVED_S) or (unbuilt and _builder.started >= MOST_BUILDS):
            continue
        for node, change in free:
            change.cost_s = cost / len(free)
            if node.accepted(change):
                change.build = None if recipe is None else _builder.build(recipe)
                if unbuilt:
                    node.course.waiting = change
                else:
                    node.begin(change)


def _rate(call: Call) -> float:
    """Seconds per row and share of the weight."""
    return call.seconds / max(call.rows * call.share, 1e-9)


_lock = threading.Lock()
_model = CostModel()
_builder = Builder()
_failed: set[Recipe | None] = set()  # not tried again
_plans: weakref.WeakKeyDictionary[Gate, _Plan] = weakref.WeakKeyDictionary()
