"""The gated linear by the framework's dense products: for densities at which those are faster than any list.

Same verbs as the kernels beside this. Nothing waits for the device. Only the weight gradient looks at the lists: the
weight's masked blocks are taken to be zero, which a gate keeps true. Where somebody wrote into them behind PyTorch's
back (through `.data`), or an input is infinite, a masked block counts here as it does in any dense layer.
"""

import torch.nn.functional as F
from torch import Tensor

from . import cpu_signals, reference
from .index_lists import Block, BlockLists


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, `z = x @ weight.T + bias`; z is empty but for the gelu activations, as kernels have it.

    x `[M, K]`, weight `[N, K]` in x's dtype, bias `[N]` of any floating dtype or None -> `[M, N]` in x's dtype.
    """
    z = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return reference.activate(z, activation), z if reference.saves_z(activation) else x.new_empty(0)


def dgrad(
    grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, before: reference.Before | None = None
) -> Tensor:
    """Gradient with respect to the input, or to what is before it: grad_z `[M, N]`, weight `[N, K]` -> `[M, K]`."""
    grad_x = grad_z @ weight
    return grad_x if before is None else before.differentiate(grad_x)


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight, zero in masked blocks, and the signals of the blocks.

    grad_z `[M, N]`, x `[M, K]`, weight `[N, K]`, probes int32 `[P]` padded with -1 -> grad_weight `[N, K]` in the
    weight's dtype, signals float32 `[2, R, C]` as `reference.linear_wgrad` has them, of the rounded gradient.
    """
    return cpu_signals.gate_gradient(grad_z.t() @ x, weight, lists, probes, block)
