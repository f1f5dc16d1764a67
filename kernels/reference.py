"""What the block-sparse linear layer computes, in plain PyTorch: the specification that every kernel is tested against.

Works for any floating dtype (half types are accumulated in float32 and rounded once; tests use float64) and through
autograd. A masked block is *not computed*: whatever its weight holds, and be its input infinite, it adds nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import index_lists

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, block: tuple[int, int], activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, `z = x @ weight.T + bias` over the active blocks.

    x `[M, K]`, weight `[N, K]`, bias `[N]` or None, mask boolean `[R, C]`, block `(out, in)` sides in weight entries;
    returns y and z, both `[M, N]` in x's dtype. Raises ValueError for an unknown activation.
    """
    z = _rows_product(x, weight, mask, block)
    if bias is not None:
        z = z + bias.to(z.dtype)
    return activate(z, activation).to(x.dtype), z.to(x.dtype)


def linear_dgrad(grad_z: Tensor, weight: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Gradient with respect to the input: grad_z `[M, N]`, weight `[N, K]` -> `[M, K]` in grad_z's dtype."""
    return _rows_product(grad_z, weight.t(), mask.t(), (block[1], block[0])).to(grad_z.dtype)


def linear_wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, mask: Tensor, probes: Tensor, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight, and what each block would tell a controller.

    grad_z `[M, N]`, x `[M, K]`, weight `[N, K]`, mask boolean `[R, C]`, probes int32 `[P]`: flat ids `r * C + c` of
    inactive blocks, padded with -1. Returns

    - grad_weight `[N, K]` in the weight's dtype, exactly zero outside the active blocks (in probed blocks too);
    - signals float32 `[2, R, C]`: `signals[0]` is the sum over a block of w * g (the derivative of the loss with
      respect to a gate that multiplies the block) for active blocks, `signals[1]` the sum of g ** 2 for active and
      probed ones, with g the gradient before it is rounded; zero elsewhere.
    """
    dtype = _compute_dtype(grad_z)
    return gate_gradient(grad_z.t().to(dtype) @ x.to(dtype), weight, mask, probes, block)


def gate_gradient(
    gradient: Tensor, weight: Tensor, mask: Tensor, probes: Tensor, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What of a dense gradient `[N, K]` is the gated weight's, and the signals: see `linear_wgrad`."""
    shape, blocks = (weight.shape[0], weight.shape[1]), mask.numel()
    probed = torch.zeros(blocks + 1, dtype=torch.bool, device=mask.device)
    probed[torch.where(probes >= 0, probes, blocks).long()] = True  # padding lands in a place past the end
    measured = index_lists.expand(mask | probed[:-1].view_as(mask), block, shape)
    active = index_lists.expand(mask, block, shape)
    zero = gradient.new_zeros(())
    times_weight = _block_sums(torch.where(active, weight.to(gradient.dtype) * gradient, zero), mask, block)
    squared = _block_sums(torch.where(measured, gradient.square(), zero), mask, block)
    signals = torch.stack([times_weight, squared]).float()
    return torch.where(active, gradient, zero).to(weight.dtype), signals


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation by its name: none, relu, gelu (with the error function) or gelu_tanh."""
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    raise ValueError(f"unknown activation {activation!r}; allowed are {', '.join(ACTIVATIONS)}")


def _rows_product(x: Tensor, weight: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """`x @ weight.T` where each block row multiplies only the inputs of its active blocks."""
    dtype = _compute_dtype(x)
    inputs = index_lists.expand(mask, (1, block[1]), (mask.shape[0], weight.shape[1]))
    rows = weight.split(block[0])
    products = [x[:, inputs[r]].to(dtype) @ rows[r][:, inputs[r]].to(dtype).t() for r in range(mask.shape[0])]
    return torch.cat(products, dim=1)


def _block_sums(entries: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = mask.shape
    padding = (0, columns * block[1] - entries.shape[1], 0, rows * block[0] - entries.shape[0])
    return F.pad(entries, padding).view(rows, block[0], columns, block[1]).sum((1, 3))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
