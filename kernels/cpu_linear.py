"""Block-sparse linear on the CPU: forward, input gradient and weight gradient that skip masked blocks."""

import torch
from torch import Tensor

from . import reference
from .index_lists import BlockLists

Block = tuple[int, int]


def supported(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block) -> str | None:
    """None where the kernels can run, else the reason, in a user's words."""
    if (x_dtype, weight_dtype) not in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        return f"no CPU kernel for {x_dtype} inputs with a {weight_dtype} weight"
    if any(side % 8 or not 8 <= side <= 128 for side in block):
        return f"block sides must be multiples of 8 from 8 to 128, not {block[0]}x{block[1]}"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str
) -> tuple[Tensor, Tensor]:
    y, z = reference.linear(x, weight, bias, _mask(lists), block, activation)
    return y, (z if activation.startswith("gelu") else x.new_empty(0))


def dgrad(grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block) -> Tensor:
    return reference.linear_dgrad(grad_z, weight, _mask(lists), block)


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    return reference.linear_wgrad(grad_z, x, weight, _mask(lists), probes, block)


def _mask(lists: BlockLists) -> Tensor:
    mask = torch.zeros(lists.grid, dtype=torch.bool)
    offsets = lists.crow_indices.tolist()
    for r in range(mask.shape[0]):
        mask[r, lists.col_indices[offsets[r] : offsets[r + 1]].long()] = True
    return mask
