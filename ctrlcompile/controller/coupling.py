"""How the gates are coupled: which block rows of some feed which block columns of others, and what follows for a block.

A block row is dead when all its blocks are masked: its output channels are constant, whatever the input. A block column
is dead when all its blocks are masked: nobody reads its input channels there. (Of a weight stored [in, out], what is
called a row here is a block column of its mask.) So

- a column is *unfed* when every row that feeds it is dead: its input channels are constants (0, the bias, or what batch
  norm and activation make of it), and its blocks compute a bias, no feature;
- a row is *unread* when every column that reads it is dead: its gradient is exactly zero.

Blocks of both are useless. They are rated 0, so they go first and do not come back; this is advice, and the masks stay
the only truth: until a block is switched off, its constant is computed. A block whose going would leave others useless,
the last one of its row or column, is weighed against their cost too, since that is freed with its own.

Where a row is dead and the columns that it feeds are dead as well, both have zero weights and the row's gradient is
exactly zero, but not the column's, if the constant that it reads is not 0. That is also the condition for the pair to
learn: the column first, as a bias, then the row through it. So a column that is unfed *and* dead is rated by its
probes, and a pair comes back through it: while the column rests after its return, the row is read, probed and rated as
any other. Where the constant is 0 no first-order signal could bring the pair back, and none does.

A row that a batch norm follows does not come back once it is dead, or has active blocks in unfed columns only; nor does
what it alone feeds. Its channels have no variance, so the norm multiplies their gradient by 1/√ε, some hundreds: a
probe finds that much too much, and the first step from zero would make a weight so large that the norm leaves next to
no gradient to change it again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .contract import Gate
from .layout import Layout, rows_and_columns

OTHER = -1
TINY = torch.finfo(torch.float64).tiny

Members: TypeAlias = "frozenset[int] | None"  # None: something that no gate switches is among them


@dataclass(frozen=True, eq=False)
class Sets:
    """For each of n targets, the set of members on which it depends; equal sets are kept once.

    Attributes:
        of: int64 [n], which set; OTHER where the target depends on something that no gate switches.
        sets, members: int64 [E], set by set, the members.
    """

    of: Tensor
    sets: Tensor
    members: Tensor

    @classmethod
    def from_members(cls, targets: Iterable[Members]) -> Sets:
        """From each target's members, numbered by first appearance."""
        number: dict[frozenset[int], int] = {}
        of = [OTHER if members is None else number.setdefault(members, len(number)) for members in targets]
        pairs = [(index, member) for members, index in number.items() for member in sorted(members)]
        sets, members = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        return cls(torch.tensor(of, dtype=torch.int64), sets.contiguous(), members.contiguous())

    def to_members(self) -> list[Members]:
        """Each target's members."""
        found: list[set[int]] = [set() for _ in range(self.count)]
        for index, member in zip(self.sets.tolist(), self.members.tolist(), strict=True):
            found[index].add(member)
        frozen = [frozenset(members) for members in found]
        return [None if index == OTHER else frozen[index] for index in self.of.tolist()]

    @property
    def count(self) -> int:
        """How many sets there are."""
        return max(int(self.of.max()), OTHER) + 1 if self.of.numel() else 0

    def cut_off(self, alive: Tensor) -> Tensor:
        """bool [n]: targets that have members, none of them `alive` (bool, one entry per member)."""
        living, size = self._living(alive), torch.bincount(self.sets, minlength=self.count)
        gone = torch.cat(((living == 0) & (size > 0), torch.zeros(1, dtype=torch.bool)))  # the last entry is OTHER's
        return gone[self.of]

    def hanging(self, alive: Tensor, cost: Tensor) -> Tensor:
        """float64, one entry per member: `cost` [n] of the targets for which it is the only member alive."""
        living = self._living(alive)
        last = torch.full((self.count + 1,), alive.numel())
        single = alive[self.members] & (living[self.sets] == 1)
        last[self.sets[single]] = self.members[single]
        return torch.bincount(last[self.of], weights=cost, minlength=alive.numel() + 1)[:-1]

    def _living(self, alive: Tensor) -> Tensor:
        return torch.bincount(self.sets[alive[self.members]], minlength=self.count)


class Heads(NamedTuple):
    """Of each of an attention's heads the block rows that feed its values, those that feed its weights (queries and
    keys), and the block columns that read what comes out.

    Weights have members only where queries and keys are the same at every position once these are dead.
    """

    values: Sets
    weights: Sets
    outputs: Sets


@dataclass(frozen=True, eq=False)
class Coupling:
    """Block rows and block columns of several gates, each numbered through, gate by gate.

    Attributes:
        rows, columns: per gate, how many it has; 0 for a weight without a gate.
        feeds: for each column, the rows whose channels reach its input channels without passing a gate.
        reads: for each row, the columns that its channels reach so.
        heads: of each attention, by node.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    feeds: Sets
    reads: Sets
    heads: Mapping[str, Heads] = field(default_factory=dict)


Coupled: TypeAlias = tuple[Coupling, tuple[Any, ...]]  # with the gates that it numbers, None where there is none


class Lattice:
    """The block rows and columns of a controller's gates, and what is known of their coupling.

    Args:
        gates: in the order in which their blocks lie in flat vectors [N].
        layout: of these.

    Attributes:
        coupling: what is known; None for nothing.
        normalised: bool [G], gates before a batch norm.
        trusted: False while data-parallel replicas know different things: then nothing counts as known.
        fingerprint: of what is known, below 2**14, so that sums of squares over replicas are exact.
    """

    def __init__(self, gates: Sequence[Gate], layout: Layout) -> None:
        self._gates = list(gates)
        self._rows, self._columns = map(tuple, zip(*map(rows_and_columns, gates), strict=True))
        self._row_of, self._column_of = layout.row_of, layout.column_of
        self._known: set[Coupled] = set()
        self.coupling: Coupling | None = None
        self.normalised = torch.tensor([gate.normalised for gate in gates])
        self.trusted = True
        self.fingerprint = 0

    def learn(self, coupled: Iterable[Coupled]) -> None:
        """Takes in how gates are coupled in graphs that have run.

        What feeds or reads a row or column in any graph counts. Gates of other controllers count as always alive.
        """
        for coupling, gates in coupled:
            if (coupling, gates) not in self._known:
                self._known.add((coupling, gates))
                self._join(coupling, gates)

    def _join(self, coupling: Coupling, gates: tuple[Any, ...]) -> None:
        at = {gate: index for index, gate in enumerate(self._gates)}
        number = [None if gate is None else at.get(gate) for gate in gates]
        rows = _renumbering(coupling.rows, self._rows, number)
        columns = _renumbering(coupling.columns, self._columns, number)
        before = self.coupling
        self.coupling = Coupling(
            self._rows,
            self._columns,
            _joined(coupling.feeds, columns, rows, sum(self._columns), None if before is None else before.feeds),
            _joined(coupling.reads, rows, columns, sum(self._rows), None if before is None else before.reads),
        )
        self.fingerprint = self._fingerprint()

    def useless(self, active: Tensor) -> Tensor:
        """bool [N]: blocks of unfed columns and of unread rows, except those through which a dead pair comes back."""
        if self.coupling is None or not self.trusted:
            return torch.zeros_like(active)
        rows, columns = self._living(active)
        unfed, unread = self.coupling.feeds.cut_off(rows > 0), self.coupling.reads.cut_off(columns > 0)
        for_good = self.coupling.feeds.cut_off(~self._gone(active))
        return (unfed & (columns > 0) | for_good)[self._column_of] | unread[self._row_of]

    def weigh(self, benefit: Tensor, active: Tensor, cost: Tensor) -> Tensor:
        """Benefit [N] as coupling leaves it: 0 where useless, and per the whole cost that a block's going frees.

        Args:
            benefit: float32 [N].
            active: bool [N].
            cost: float64 [N], of each block if active.
        """
        rows, columns = self._living(active)
        benefit = torch.where(self._gone(active)[self._row_of], 0.0, benefit)
        if self.coupling is None or not self.trusted:
            return benefit
        spent = cost * active
        of_row = torch.bincount(self._row_of, weights=spent, minlength=rows.numel())
        of_column = torch.bincount(self._column_of, weights=spent, minlength=columns.numel())
        by_row = self.coupling.feeds.hanging(rows > 0, of_column) * (rows == 1)
        by_column = self.coupling.reads.hanging(columns > 0, of_row) * (columns == 1)
        frees = (by_row[self._row_of] + by_column[self._column_of]) * active
        benefit = benefit * (cost / (cost + frees).clamp(min=TINY)).float()
        return torch.where(self.useless(active), 0.0, benefit)

    def state(self) -> list[Tensor]:
        """What is known, as plain tensors; empty for nothing."""
        c = self.coupling
        return (
            [] if c is None else [t.clone() for sets in (c.feeds, c.reads) for t in (sets.of, sets.sets, sets.members)]
        )

    def fits(self, state: Sequence[Tensor]) -> bool:
        """Whether `state` is of gates with as many rows and columns."""
        sizes = [tensor.numel() for tensor in state[::3]]
        return not state or (len(state) == 6 and sizes == [sum(self._columns), sum(self._rows)])

    def load(self, state: Sequence[Tensor]) -> None:
        """Knows again what `state` was made from."""
        self._known.clear()
        self.coupling = None
        if state:
            own = [tensor.to("cpu", copy=True) for tensor in state]
            feeds, reads = Sets(*own[:3]), Sets(*own[3:])
            self.coupling = Coupling(self._rows, self._columns, feeds, reads)
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> int:
        return zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in self.state())) % 2**14

    def _gone(self, active: Tensor) -> Tensor:
        """bool, per row: normalised, and without an active block in a column that is fed."""
        if not self.normalised.any():
            return torch.zeros(sum(self._rows), dtype=torch.bool)
        rows, _ = self._living(active)
        if self.coupling is not None and self.trusted:
            rows, _ = self._living(active & ~self.coupling.feeds.cut_off(rows > 0)[self._column_of])
        return (rows == 0) & self.normalised.repeat_interleave(torch.tensor(self._rows))

    def _living(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """How many active blocks each row, each column has."""
        rows = torch.bincount(self._row_of[active], minlength=sum(self._rows))
        return rows, torch.bincount(self._column_of[active], minlength=sum(self._columns))


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]


def _renumbering(theirs: Sequence[int], ours: Sequence[int], number: Sequence[int | None]) -> list[int | None]:
    """For each row (or column) of a graph's gates, which of the controller's it is; None: of another controller."""
    starts = _starts(ours)
    return [
        None if gate is None else starts[gate] + index
        for count, gate in zip(theirs, number, strict=True)
        for index in range(count)
    ]


def _joined(sets: Sets, targets: list[int | None], members: list[int | None], count: int, before: Sets | None) -> Sets:
    """Renumbered, and joined with what was known before, if anything was."""
    result: list[Members] = [frozenset()] * count if before is None else before.to_members()
    renumbered: dict[Members, Members] = {None: None}
    for target, found in zip(targets, sets.to_members(), strict=True):
        if target is None:
            continue
        if found not in renumbered:
            assert found is not None
            new = {members[member] for member in found}
            renumbered[found] = None if None in new else frozenset(new)  # type: ignore[arg-type]
        known, new_members = result[target], renumbered[found]
        result[target] = None if known is None or new_members is None else known | new_members
    return Sets.from_members(result)
