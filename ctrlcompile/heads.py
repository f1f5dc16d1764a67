"""Which heads of a region's attentions are live under the present masks, as the flags that the compiled graph takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrlcompile.controller.coupling import Coupling, Sets
from ctrlcompile.controller.host import on_cpu
from ctrlcompile.gate import Gate


class LiveHeads:
    """The flags of some attentions of a region, found anew when a mask has changed.

    Args:
        coupling: of the region's gates.
        attentions: by node; all are in `coupling.heads`.
    """

    def __init__(self, coupling: Coupling, attentions: Sequence[str]) -> None:
        self._coupling = coupling
        self._heads = [coupling.heads[name] for name in attentions]
        self._seen: list[tuple[Gate, int]] = []
        self._flags: list[Tensor] = []
        self.live_shares: list[float] = [1.0] * len(attentions)

    def flags(self, gates: Sequence[Gate | None]) -> list[Tensor]:
        """bool `[heads]` for each attention; `gates` are those of the region's weights.

        A head is dead where all block rows that feed its values are, and all block columns that read what comes out.
        """
        used = [gate for gate, rows in zip(gates, self._coupling.rows, strict=False) if gate is not None and rows]
        seen = [(gate, gate.updates) for gate in used]
        if seen != self._seen:
            self._find(used)
            self._seen = seen
        return self._flags

    @on_cpu
    def _find(self, gates: Sequence[Gate]) -> None:
        masks = [gate.mask.t() if gate.transposed else gate.mask for gate in gates]
        rows, columns = torch.cat([mask.any(1) for mask in masks]), torch.cat([mask.any(0) for mask in masks])
        self._flags = [~(values.cut_off(rows) & outputs.cut_off(columns)) for values, outputs in self._heads]
        self.live_shares = [float(flags.float().mean()) for flags in self._flags]


def that_may_die(coupling: Coupling | None) -> list[str]:
    """The attentions of which some head could ever be dead."""
    if coupling is None:
        return []
    return [
        name
        for name, (values, outputs) in coupling.heads.items()
        if bool((values.cut_off(_none(values)) & outputs.cut_off(_none(outputs))).any())
    ]


def _none(sets: Sets) -> Tensor:
    return torch.zeros(int(sets.members.max()) + 1 if sets.members.numel() else 0, dtype=torch.bool)
