"""How a weight is divided into blocks: which sides they may have, which suit a device, and which weights have room."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ctrlcompile.kernels import index_lists
from ctrlcompile.kernels.index_lists import Block as Block

BlockChoice = Block | int | Literal["auto"]

SMALLEST_SIDE, LARGEST_SIDE, SIDE_STEP = 8, 128, 8
FEWEST_BLOCKS = 4  # block rows and block columns that a weight needs before gating it can gain anything


def resolve_block(block: Block | Literal["auto"], weight: Tensor) -> Block:
    """The sides of a weight's blocks: what was asked for or, for "auto", what its device multiplies well.

    On a GPU a block row is the width of the tensor cores' tile, which reaches its rate from 64 on and rereads its
    input half as often at 128; a CPU's kernels are as good at 32, and small blocks are better chosen. A convolution has
    few channels, each with all its taps, so there its blocks are smaller yet.
    """
    if block != "auto":
        return block
    rows, columns = weight.shape[:2]
    if weight.device.type == "cpu":
        return (32, 32) if weight.dim() == 2 else (_side_in_channels(rows), _side_in_channels(columns))
    return (128 if rows >= 768 else 64 if rows >= 256 else 32, 64 if columns >= 256 else 32)


def _side_in_channels(channels: int) -> int:
    return 32 if channels >= 256 else 16 if channels >= 64 else 8


def parse_block(block: BlockChoice) -> Block | Literal["auto"]:
    """ "auto", or the sides of a block as a pair, given as one or as an int. Raises ValueError for anything else."""
    if block == "auto":
        return block
    sides = (block, block) if isinstance(block, int) else block
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    ):
        raise ValueError(f'block is "auto", an int or a pair of ints (block_out, block_in); got {block!r}')
    if any(not SMALLEST_SIDE <= side <= LARGEST_SIDE or side % SIDE_STEP for side in sides):
        raise ValueError(
            f"block sides are multiples of {SIDE_STEP} from {SMALLEST_SIDE} to {LARGEST_SIDE}; got {tuple(sides)}"
        )
    return (sides[0], sides[1])


def check_block(block: Block, shape: Sequence[int], name: str) -> None:
    """Raises ValueError when a block is larger than the weight, or the weight no linear's and no convolution's."""
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"{name}: a gated weight is [out, in] or [out, in, *window]; got shape {tuple(shape)}")
    if block[0] > shape[0] or block[1] > shape[1]:
        raise ValueError(f"{name}: a block of {block} is larger than the weight {tuple(shape)}; choose a smaller block")


def too_small(shape: Sequence[int], block: Block) -> str | None:
    """Why gating a weight of this shape cannot gain, in a user's words, or None."""
    rows, columns = index_lists.grid_shape((shape[0], shape[1]), block)
    if min(rows, columns) >= FEWEST_BLOCKS:
        return None
    return f"too small to gain: {rows} x {columns} blocks of {block[0]} x {block[1]}, at least {FEWEST_BLOCKS} each way"


def no_room(shape: Sequence[int], block: Block, groups: int | None) -> str | None:
    """Why a convolution in so many groups cannot be divided into such blocks, in a user's words, or None.

    None for `groups`, a linear: there a block that does not fit is the user's mistake.
    """
    if groups is None:
        return None
    if groups > 1 and shape[1] == 1:
        return "depthwise: each output channel has one input channel, which leaves nothing to choose from"
    if block[0] > shape[0] or block[1] > shape[1]:
        return f"{shape[0]} x {shape[1]} channels are fewer than a block of {block[0]} x {block[1]}"
    if groups > 1 and (per_group := shape[0] // groups) % block[0]:
        return f"{groups} groups of {per_group} output channels each, which blocks of {block[0]} do not divide"
    return None


def zero_blocks_(tensor: Tensor, gone: Tensor, block: Block) -> None:
    """Zeroes in place the blocks of a tensor `[out, in, *taps]` that are True in `gone` `[R, C]`, on the CPU."""
    rows, columns = gone.shape
    if tensor.shape[:2] == (rows * block[0], columns * block[1]):
        row, column = gone.nonzero().t().to(tensor.device, non_blocking=True)
        tensor.unflatten(1, (columns, block[1])).unflatten(0, (rows, block[0]))[row, :, column] = 0
    else:
        tensor.masked_fill_(index_lists.expand(gone.to(tensor.device), block, tensor.shape), 0)


def block_norms(tensor: Tensor, block: Block) -> Tensor:
    """The norm of each block of a tensor `[out, in, *taps]`: float32 `[R, C]`, on its device."""
    rows, columns = index_lists.grid_shape((tensor.shape[0], tensor.shape[1]), block)
    below, beside = rows * block[0] - tensor.shape[0], columns * block[1] - tensor.shape[1]
    padding = [0, 0] * (tensor.dim() - 2) + [0, beside, 0, below]
    padded = torch.nn.functional.pad(tensor, padding) if any(padding) else tensor
    tiles = padded.unflatten(1, (columns, block[1])).unflatten(0, (rows, block[0]))
    return torch.linalg.vector_norm(tiles, dim=(1, 3, *range(4, tiles.dim())), dtype=torch.float32)


def block_sides(total: int, side: int, count: int) -> Tensor:
    """The sides of `count` blocks along a dimension of `total` entries: all alike but the last."""
    sides = torch.full((count,), float(side))
    sides[-1] = total - side * (count - 1)
    return sides
