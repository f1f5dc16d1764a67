"""Which blocks of a weight are active, as compressed block rows and compressed block columns.

A mask over the blocks is easy to decide on; a kernel wants lists. `build` turns one into the other, `write_` does it in
place, so that a mask can change under a compiled graph: the lists have a fixed capacity and a fixed address. They are
named as PyTorch's BSR and BSC tensors name theirs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Block = tuple[int, int]  # sides of a block in a weight's entries or channels, along its dimensions


class BlockLists(NamedTuple):
    """The active blocks of an R x C grid, by rows and by columns; int32 tensors on the weight's device.

    Row r holds the block columns `col_indices[crow_indices[r]:crow_indices[r + 1]]`, ascending; column c holds the
    block rows `row_indices[ccol_indices[c]:ccol_indices[c + 1]]`, ascending. Entries past the last valid one are 0.
    Kernels take rows and columns in the orders given, longest list first, so that what is left at the end is short.
    """

    crow_indices: Tensor  # [R + 1]
    col_indices: Tensor  # [R * C]
    ccol_indices: Tensor  # [C + 1]
    row_indices: Tensor  # [R * C]
    row_order: Tensor  # [R]
    column_order: Tensor  # [C]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of block rows and of block columns."""
        return self.crow_indices.numel() - 1, self.ccol_indices.numel() - 1


class Capacities(NamedTuple):
    """Numbers of entries of `BlockLists`, field by field."""

    crow_indices: int
    col_indices: int
    ccol_indices: int
    row_indices: int
    row_order: int
    column_order: int


def capacities(rows: int, columns: int) -> Capacities:
    """How many entries the lists of an R x C grid hold."""
    return Capacities(rows + 1, rows * columns, columns + 1, rows * columns, rows, columns)


def grid_shape(weight_shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of block rows and block columns of a weight `[out, in]`; the last ones may be partial."""
    return -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])


def matrix_shape(weight_shape: Sequence[int]) -> tuple[int, int]:
    """A weight `[out, in, *taps]` as a matrix, the taps of an input side by side: `[out, in * taps]`."""
    return weight_shape[0], math.prod(weight_shape[1:])


def matrix_block(block: tuple[int, int], weight_shape: Sequence[int]) -> tuple[int, int]:
    """Sides of a block in that matrix: a block spans all taps."""
    return block[0], block[1] * math.prod(weight_shape[2:])


def build(mask: Tensor) -> BlockLists:
    """Lists of the active blocks of `mask`, boolean `[R, C]`.

    >>> build(torch.tensor([[True, False, True], [False, False, True]])).col_indices.tolist()
    [0, 2, 2, 0, 0, 0]

    Raises ValueError when the mask is not a boolean matrix.
    """
    _check(mask)
    entries = capacities(*mask.shape)
    lists = BlockLists(*(torch.empty(n, dtype=torch.int32, device=mask.device) for n in entries))
    write_(lists, mask)
    return lists


def write_(lists: BlockLists, mask: Tensor) -> None:
    """Overwrites `lists` with the active blocks of `mask`, boolean `[R, C]`; on the device, without waiting for it.

    Raises ValueError when the mask is not a boolean matrix of the grid that the lists were built for.
    """
    _check(mask)
    if tuple(mask.shape) != lists.grid:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but these lists are for a grid of {lists.grid} blocks")
    mask = mask.to(lists.crow_indices.device, non_blocking=True)
    _write_compressed(lists.crow_indices, lists.col_indices, lists.row_order, mask)
    _write_compressed(lists.ccol_indices, lists.row_indices, lists.column_order, mask.t())


def mask_of(lists: BlockLists) -> Tensor:
    """The boolean mask `[R, C]` that `lists` were written from."""
    rows, columns = lists.grid
    mask = torch.zeros(rows * columns + 1, dtype=torch.bool, device=lists.crow_indices.device)
    entry = torch.arange(rows * columns, device=mask.device)
    row = torch.searchsorted(lists.crow_indices[1:], entry, right=True)
    # Entries past the last valid one land in one slot past the end.
    mask[torch.where(entry < lists.crow_indices[-1], row * columns + lists.col_indices, rows * columns)] = True
    return mask[:-1].view(rows, columns)


def expand(mask: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """The block mask `[R, C]` as a mask over the entries of a weight of `shape` `[out, in, *taps]`."""
    rows, columns = mask.shape
    entries = mask[:, None, :, None].expand(rows, block[0], columns, block[1])
    entries = entries.reshape(rows * block[0], columns * block[1])[: shape[0], : shape[1]]
    return entries.view(*shape[:2], *(1 for _ in shape[2:])).expand(*shape)


def _check(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(
            f"a block mask is a boolean tensor of shape [block rows, block columns]; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )


def _write_compressed(offsets: Tensor, indices: Tensor, order: Tensor, mask: Tensor) -> None:
    flat, lengths = mask.flatten(), mask.sum(1)
    rank = flat.cumsum(0)  # 1-based position of each active block in the list
    offsets[:1].zero_()
    offsets[1:].copy_(lengths.cumsum(0))
    order.copy_(lengths.argsort(descending=True, stable=True))
    # Inactive blocks all land in one slot past the end: no boolean indexing, whose result size would be a host sync.
    slot = torch.where(flat, rank - 1, flat.numel())
    minor = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device).repeat(mask.shape[0])
    padded = torch.zeros(flat.numel() + 1, dtype=torch.int32, device=mask.device)
    indices.copy_(padded.scatter_(0, slot, minor)[:-1])
