"""Which heads of a region's attentions are live under the present masks, as the flags that the compiled graph takes."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctrlcompile.controller.coupling import Coupling, Sets
from ctrlcompile.controller.host import on_cpu
from ctrlcompile.gate import Gate


class Live(NamedTuple):
    """What is live under some masks: bool `[heads]` for each attention, and the part of them that is, by node."""

    flags: list[Tensor]
    shares: dict[str, float]


class LiveHeads:
    """The live heads of some attentions of a region, found anew when a mask has changed.

    Args:
        coupling: of the region's gates.
        attentions: by node; all are in `coupling.heads`.
    """

    def __init__(self, coupling: Coupling, attentions: Sequence[str]) -> None:
        self._coupling = coupling
        self._heads = {name: coupling.heads[name] for name in attentions}
        # By the first gate: instances of a class share a region, as threads do. Kept for as long as these gates live.
        self._found: weakref.WeakKeyDictionary[Gate, tuple[list[Any], Live]] = weakref.WeakKeyDictionary()

    def under(self, gates: Sequence[Gate | None]) -> Live:
        """Those under the masks of these gates, which are those of the region's weights.

        A head is dead where all block rows that feed its values are, and all block columns that read what comes out.
        """
        used = [gate for gate, rows in zip(gates, self._coupling.rows, strict=False) if gate is not None and rows]
        seen, last = [(weakref.ref(gate), gate.updates) for gate in used], self._found.get(used[0])
        if last is None or last[0] != seen:
            last = self._found[used[0]] = seen, self._find(used)
        return last[1]

    @on_cpu
    def _find(self, gates: Sequence[Gate]) -> Live:
        masks = [gate.mask.t() if gate.transposed else gate.mask for gate in gates]
        rows, columns = torch.cat([mask.any(1) for mask in masks]), torch.cat([mask.any(0) for mask in masks])
        found = [~(values.cut_off(rows) & outputs.cut_off(columns)) for values, outputs in self._heads.values()]
        return Live(found, {name: float(flags.float().mean()) for name, flags in zip(self._heads, found, strict=True)})


def that_may_die(coupling: Coupling | None) -> list[str]:
    """The attentions of which some head could ever be dead."""
    heads = {} if coupling is None else coupling.heads
    return [name for name, (values, outputs) in heads.items() if bool((_switched(values) & _switched(outputs)).any())]


def _switched(sets: Sets) -> Tensor:
    """bool [n]: targets that would be cut off if no member were alive."""
    return sets.cut_off(torch.zeros(int(sets.members.max()) + 1 if sets.members.numel() else 0, dtype=torch.bool))
