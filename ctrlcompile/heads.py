"""Of which kind the heads of a region's attentions are under the present masks: what the compiled graph is told."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctrlcompile.controller.coupling import Coupling, Heads
from ctrlcompile.controller.host import on_cpu
from ctrlcompile.gate import Gate
from ctrlcompile.kernels.attention import DEAD, LIVE, UNIFORM


class Kinds(NamedTuple):
    """Under some masks: the kinds of heads, uint8 `[heads]` for each attention, and the live part of them, by node."""

    inputs: list[Tensor]
    live_shares: dict[str, float]


class HeadKinds:
    """The kinds of the heads of some attentions of a region, found anew when a mask has changed.

    Args:
        coupling: of the region's gates.
        attentions: by node; all are in `coupling.heads`.
    """

    def __init__(self, coupling: Coupling, attentions: Sequence[str]) -> None:
        self._coupling = coupling
        self._heads = {name: coupling.heads[name] for name in attentions}
        # By the first gate: instances of a class share a region, as threads do. Kept for as long as these gates live.
        self._found: weakref.WeakKeyDictionary[Gate, tuple[list[Any], Kinds]] = weakref.WeakKeyDictionary()

    def under(self, gates: Sequence[Gate | None]) -> Kinds:
        """Those under the masks of these gates, which are those of the region's weights.

        A head is dead where all block rows that feed its values are, and all block columns that read what comes out;
        else it is uniform where all block rows that feed its queries and keys are dead.
        """
        used = [gate for gate, rows in zip(gates, self._coupling.rows, strict=False) if gate is not None and rows]
        seen, last = [(weakref.ref(gate), gate.updates) for gate in used], self._found.get(used[0])
        if last is None or last[0] != seen:
            last = self._found[used[0]] = seen, self._find(used)
        return last[1]

    @on_cpu
    def _find(self, gates: Sequence[Gate]) -> Kinds:
        masks = [gate.mask.t() if gate.transposed else gate.mask for gate in gates]
        rows, columns = torch.cat([mask.any(1) for mask in masks]), torch.cat([mask.any(0) for mask in masks])
        found = {name: _kinds(heads, rows, columns) for name, heads in self._heads.items()}
        return Kinds(
            list(found.values()), {name: float((kinds == LIVE).float().mean()) for name, kinds in found.items()}
        )


def _kinds(heads: Heads, rows: Tensor, columns: Tensor) -> Tensor:
    kinds = torch.full((heads.values.of.numel(),), LIVE, dtype=torch.uint8)
    kinds[heads.weights.cut_off(rows)] = UNIFORM
    kinds[heads.values.cut_off(rows) & heads.outputs.cut_off(columns)] = DEAD
    return kinds


def that_may_rest(coupling: Coupling | None) -> list[str]:
    """The attentions of which some head is not live if no block is."""
    if coupling is None:
        return []
    rows, columns = (torch.zeros(sum(counts), dtype=torch.bool) for counts in (coupling.rows, coupling.columns))
    return [name for name, heads in coupling.heads.items() if bool((_kinds(heads, rows, columns) != LIVE).any())]
