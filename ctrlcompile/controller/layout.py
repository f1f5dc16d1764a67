"""Where the blocks of gates lie in flat vectors, one entry per block, gate by gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Gate


@dataclass
class Layout:
    """Where each gate's blocks lie in the flat vectors; on the CPU, where decisions are made, until `to` another."""

    offsets: list[int]  # length G + 1
    lengths: Tensor  # int64 [G]
    gate_of: Tensor  # int64 [N]
    area: Tensor  # float64 [N], share of the gate's weight that a block holds
    row_of: Tensor  # int64 [N], block rows of outputs numbered through, gate by gate
    column_of: Tensor  # int64 [N], block columns of inputs likewise

    @classmethod
    def of(cls, gates: Sequence[Gate]) -> Layout:
        sizes = [gate.grid[0] * gate.grid[1] for gate in gates]
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        lengths = torch.tensor(sizes)
        gate_of = torch.repeat_interleave(torch.arange(len(gates)), lengths)
        areas = [gate.block_area.to("cpu", torch.float64).flatten() for gate in gates]
        area = torch.cat([area / area.sum() for area in areas])
        rows, columns = zip(*map(rows_and_columns, gates), strict=True)
        places = map(_places, gates, _numbered(rows), _numbered(columns))
        row_of, column_of = map(torch.cat, zip(*places, strict=True))
        return cls(offsets, lengths, gate_of, area, row_of, column_of)

    def to(self, device: torch.device) -> Layout:
        """The same layout for flat vectors on another device."""
        tensors = self.lengths, self.gate_of, self.area, self.row_of, self.column_of
        return Layout(self.offsets, *(tensor.to(device) for tensor in tensors))

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each gate's blocks: [K, N] -> [K, G]. Deterministic, also on a GPU."""
        lengths = self.lengths.expand(values.shape[0], -1)
        return torch.segment_reduce(values, "sum", lengths=lengths, axis=1, unsafe=True)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """One view [n] per gate of a flat vector [N]."""
        return [values[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]


def rows_and_columns(gate: Gate) -> tuple[int, int]:
    """How many block rows of outputs a gate has, and how many block columns of inputs."""
    rows, columns = gate.grid
    return (columns, rows) if gate.transposed else (rows, columns)


def _places(gate: Gate, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each block of a gate, of these numbers, in the order of its mask."""
    if gate.transposed:
        return row.repeat(column.numel()), column.repeat_interleave(row.numel())
    return row.repeat_interleave(column.numel()), column.repeat(row.numel())


def _numbered(counts: tuple[int, ...]) -> Sequence[Tensor]:
    """0, 1, 2, ..., in stretches of so many."""
    return torch.arange(sum(counts)).split(counts)
