"""The variants that a gated product can be computed by on a CPU, and the one in force for each gate and role.

Each is right for every mask, and fast for some: the block-sparse kernel in the gate's own blocks; the same kernel in
`coarse` blocks, several of the gate's merged into one that is active where any of them is; the framework's `dense`
product, of everything or, `compact`, of the rows and columns that have an active block. All but the first multiply
masked blocks, which the gate keeps zero. The weight gradient, which reports on every block of the gate, is block-sparse
or dense.

What is in force is read here at each call, and changed by `respecialize` only after a step of the optimizer that owns
the weight: never between a forward pass and its backward or recomputation.
"""

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlcompile.blocks import LARGEST_SIDE, Block, no_room
from ctrlcompile.gate import Gate
from ctrlcompile.kernels import compact, index_lists
from ctrlcompile.kernels.index_lists import BlockLists
from ctrlcompile.kernels.verbs import Verb

ROLES = ("forward", "dgrad", "wgrad")
KEPT_CALLS = 8  # of a role, until they are taken: those after are not timed


@dataclass(frozen=True)
class Variant:
    """One way to compute a product: `merged` blocks of the gate, down and across, make one of the kernel's."""

    kind: str
    merged: tuple[int, int] = (1, 1)

    def block(self, own: Block) -> Block:
        """Sides of the kernel's blocks for a gate with blocks of `own`."""
        return own[0] * self.merged[0], own[1] * self.merged[1]

    def name(self, own: Block) -> str:
        """What users call it."""
        return self.kind if self.kind != "coarse" else "coarse {}x{}".format(*self.block(own))


BLOCK_SPARSE, DENSE, COMPACT = Variant("block-sparse"), Variant("dense"), Variant("compact")
COARSEST = 64  # sides of merged blocks: larger ones were no faster on any machine
COMPACTED = 8  # smaller side of the blocks up to which compact is tried: in larger ones it was never faster


def candidates(gate: Gate, role: str, groups: int) -> list[Variant]:
    """All variants that can compute a gate's product; `groups` are those of its convolution, 1 for a linear."""
    found = [BLOCK_SPARSE, DENSE]
    if role == "wgrad":
        # Of some convolutions in 3 dimensions oneDNN (in PyTorch 2.13) crashes in the weight gradient.
        return found[:1] if gate.weight.dim() == 5 else found
    alive = bool(gate.active) and groups == 1
    if alive and min(gate.block) <= COMPACTED and not (gate.mask.any(0).all() and gate.mask.any(1).all()):
        found.append(COMPACT)
    for merged in ((1, 2), (2, 1), (2, 2), (4, 4)):
        variant = Variant("coarse", merged)
        block = variant.block(gate.block)
        fits = block[0] <= gate.shape[0] and block[1] <= gate.shape[1] and max(block) <= min(COARSEST, LARGEST_SIDE)
        if fits and no_room(gate.shape, block, groups) is None:
            found.append(variant)
    return found


class Types(NamedTuple):
    """What a call's kernel is generated for, but for its block."""

    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    activation: str


class Call(NamedTuple):
    """One call of a product: M, K, N, the share of the weight that it multiplied, and what it took."""

    variant: Variant
    types: Types
    rows: int
    inputs: int
    outputs: int
    share: float
    seconds: float


@dataclass
class Node:
    """A role of a gate: the variant in force, its first calls since they were taken, and what the last of these was.

    `ready` holds the coarse variants whose kernels are built, with the types that they were built for.
    """

    variant: Variant = BLOCK_SPARSE
    ready: set[tuple[Variant, Types]] = field(default_factory=set)
    calls: deque[Call] = field(default_factory=deque)
    count: int = 0
    types: Types | None = None
    groups: int = 1
    family: str = ""


class Table:
    """The nodes of a gate by role, and the index lists of its merged blocks."""

    def __init__(self) -> None:
        self.nodes = {role: Node() for role in ROLES}
        self._areas: dict[Variant, tuple[Tensor, float]] = {}
        self._shares: dict[Variant, tuple[int, float]] = {}
        self._lists: dict[Variant, tuple[int, BlockLists]] = {}
        self._live: tuple[int, compact.Live] | None = None

    def share(self, variant: Variant, gate: Gate) -> float:
        """The part of the weight's entries that a variant multiplies under the gate's present mask."""
        if variant == COMPACT:
            return self.live(gate).share(gate.shape)
        if variant.merged == (1, 1):
            return 1.0 if variant == DENSE else gate.active_share
        kept = self._shares.get(variant)
        if kept is None or kept[0] != gate.updates:
            if variant not in self._areas:
                area = _patches(gate.block_area, variant.merged).sum((1, 3))
                self._areas[variant] = area, float(area.sum())
            area, whole = self._areas[variant]
            kept = self._shares[variant] = gate.updates, float(area[_merged(gate, variant)].sum()) / whole
        return kept[1]

    def lists(self, variant: Variant, gate: Gate) -> BlockLists:
        """Index lists of the variant's blocks under the gate's present mask."""
        if variant.merged == (1, 1):
            return gate.lists
        kept = self._lists.get(variant)
        if kept is None or kept[0] != gate.updates:
            kept = self._lists[variant] = gate.updates, index_lists.build(_merged(gate, variant))
        return kept[1]

    def live(self, gate: Gate) -> compact.Live:
        """What the gate's present mask leaves alive."""
        if self._live is None or self._live[0] != gate.updates:
            self._live = gate.updates, compact.Live.of(gate.mask, gate.block, gate.shape)
        return self._live[1]


def table_of(gate: Gate) -> Table | None:
    """The table of a gate whose variants may change; None where it stays block-sparse."""
    return _tables.get(gate)


def open_table(gate: Gate) -> Table:
    """The table of a gate, made where there is none yet."""
    return _tables.setdefault(gate, Table())


def compute(verb: Verb, gate: Gate, table: Table, sparse: Any, dense: Any) -> Any:
    """A product by the variant in force, timed while calls are wanted; `sparse`, `dense` are kernel modules."""
    node = table.nodes[verb.role]
    node.count += _recording.on
    recorded = _recording.on and len(node.calls) < KEPT_CALLS
    if node.variant is BLOCK_SPARSE and not recorded:  # mostly
        return verb.by(sparse)
    variant, moving, weight = node.variant, verb.moving, verb.weight
    types = Types(moving.dtype, weight.dtype, verb.last)
    if variant.kind == "coarse" and (variant, types) not in node.ready:
        variant = BLOCK_SPARSE  # called with other types than before: building now would stall the step
    if variant == COMPACT and not gate.active:
        variant = BLOCK_SPARSE  # nothing is left to make a product of
    started = time.perf_counter()
    result: Any
    if variant == BLOCK_SPARSE:
        result = verb.by(sparse)
    elif variant == COMPACT:
        result = verb.by(compact.Compact(dense, table.live(gate)))
    elif variant == DENSE:
        cast = verb if verb.role == "wgrad" else verb._replace(weight=weight.to(moving.dtype))
        result = cast.by(dense)
    else:
        coarse = verb._replace(lists=table.lists(variant, gate), block=variant.block(gate.block))
        result = coarse.by(sparse)
    if recorded:
        seconds = time.perf_counter() - started
        outputs, inputs = index_lists.matrix_shape(weight.shape)
        rows = (result[0] if verb.role == "forward" else moving).numel() // outputs
        groups = 1 if verb.window is None else verb.window.groups
        node.types, node.groups, node.family = types, groups, sparse.__name__
        node.calls.append(Call(variant, types, rows, inputs, outputs, table.share(variant, gate), seconds))
    return result


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Calls inside are not timed: they are not a training run's."""
    before, _recording.on = _recording.on, False
    try:
        yield
    finally:
        _recording.on = before


class _Recording:
    on = True


_recording = _Recording()
_tables: weakref.WeakKeyDictionary[Gate, Table] = weakref.WeakKeyDictionary()


def _merged(gate: Gate, variant: Variant) -> Tensor:
    return _patches(gate.mask, variant.merged).any(3).any(1)


def _patches(grid: Tensor, merged: tuple[int, int]) -> Tensor:
    """A grid `[R, C]` as `[R', merged rows, C', merged columns]`, padded with zeros."""
    down, across = merged
    padded = F.pad(grid, (0, -grid.shape[1] % across, 0, -grid.shape[0] % down))
    return padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
