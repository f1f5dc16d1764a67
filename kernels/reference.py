"""What block-sparse linears and convolutions compute, in plain PyTorch: the specification of every kernel.

A convolution is the linear of the patches that its window sees, with the weight as a matrix `[out, in * taps]` and
blocks as many times as wide as there are taps. Works for any floating dtype (half types are accumulated in float32 and
rounded once; tests use float64) and through autograd. A masked block is *not computed*: whatever its weight holds, and
be its input infinite, it adds nothing.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import index_lists
from .window import Window

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
DIFFERENTIATED = ("gelu", "gelu_tanh")  # the activations whose backward pass an input gradient can end with


def saves_z(activation: str) -> bool:
    """Whether backward needs the value before the activation (relu's can be read off its output)."""
    return activation in DIFFERENTIATED


BACKWARD = "_backward"  # ends what kernels call the backward pass of an activation, see `backward`


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


def linear_dgrad(
    grad_z: Tensor,
    weight: Tensor,
    mask: Tensor,
    block: tuple[int, int],
    before: "Before | None" = None,
) -> Tensor:
    """Gradient with respect to the input: grad_z `[M, N]`, weight `[N, K]` -> `[M, K]` in grad_z's dtype.

    Or with respect to what is `before` it.
    """
    grad_x = _rows_product(grad_z, weight.t(), mask.t(), (block[1], block[0]))
    return (grad_x if before is None else before.differentiate(grad_x)).to(grad_z.dtype)


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
    """What of a dense gradient `[N, K]` is the gated weight's (itself where all is), and the signals."""
    blocks = mask.numel()
    probed = torch.zeros(blocks + 1, dtype=torch.bool, device=mask.device)
    probed[torch.where(probes >= 0, probes, blocks).long()] = True  # padding lands in a place past the end
    zero = gradient.new_zeros(())
    times_weight = torch.where(mask, _block_sums(weight.to(gradient.dtype) * gradient, mask, block), zero)
    squared = torch.where(mask | probed[:-1].view_as(mask), _block_sums(gradient.square(), mask, block), zero)
    if mask.is_cuda or not bool(mask.all()):
        active = index_lists.expand(mask, block, (weight.shape[0], weight.shape[1]))
        gradient = torch.where(active, gradient, zero)
    return gradient.to(weight.dtype), torch.stack([times_weight, squared]).float()


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    block: tuple[int, int],
    activation: str,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, z the convolution of x with the active blocks, plus bias.

    x `[N, I, *size]`, weight `[O, I / groups, *taps]`, bias `[O]` or None, mask boolean `[R, C]`, block `(out, in)`
    sides in channels, over all taps; returns y and z, both `[N, O, *out]` in x's dtype. With groups, no block row lies
    in two. Raises ValueError for an unknown activation.
    """
    wide, size = index_lists.matrix_block(block, weight.shape), window.output_size(x.shape[2:], weight.shape[2:])
    groups = zip(_patches(x, weight, window), *(t.chunk(window.groups) for t in (weight.flatten(1), mask)), strict=True)
    z = torch.cat([linear(rows.to(_compute_dtype(x)), w, None, m, wide)[0] for rows, w, m in groups], dim=1)
    if bias is not None:
        z = z + bias.to(z.dtype)
    y, z = (t.to(x.dtype).view(x.shape[0], *size, weight.shape[0]).movedim(-1, 1) for t in (activate(z, activation), z))
    return y, z


def conv_dgrad(
    grad_z: Tensor,
    weight: Tensor,
    mask: Tensor,
    block: tuple[int, int],
    window: Window,
    input_size: tuple[int, ...],
    before: "Before | None" = None,
) -> Tensor:
    """Gradient with respect to the input: grad_z `[N, O, *out]` -> `[N, I, *input_size]` in grad_z's dtype.

    Or with respect to what is `before` it.
    """
    wide, taps = index_lists.matrix_block(block, weight.shape), weight.shape[2:]
    rows = grad_z.movedim(1, -1).flatten(0, -2).to(_compute_dtype(grad_z)).chunk(window.groups, dim=1)
    groups = zip(rows, *(t.chunk(window.groups) for t in (weight.flatten(1), mask)), strict=True)
    patches = torch.cat([linear_dgrad(r, w, m, wide) for r, w, m in groups], dim=1)
    inputs = weight.shape[1] * window.groups
    patches = patches.view(grad_z.shape[0], *grad_z.shape[2:], inputs, math.prod(taps)).movedim(-2, 1)
    padded = [size + sum(zeros) for size, zeros in zip(input_size, window.padding, strict=True)]
    grad_x = patches.new_zeros(*patches.shape[:2], *padded)
    for index, tap in enumerate(itertools.product(*map(range, taps))):
        seen = zip(tap, window.dilation, window.stride, grad_z.shape[2:], strict=True)
        positions: tuple[Any, ...] = (..., *(slice(t * d, t * d + s * (count - 1) + 1, s) for t, d, s, count in seen))
        grad_x[positions] += patches[..., index]
    for dim, (size, (zeros, _)) in enumerate(zip(input_size, window.padding, strict=True), 2):
        grad_x = grad_x.narrow(dim, zeros, size)
    return (grad_x if before is None else before.differentiate(grad_x)).to(grad_z.dtype)


def conv_wgrad(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    probes: Tensor,
    block: tuple[int, int],
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight, and what each block would tell a controller, as `linear_wgrad` has them.

    grad_z `[N, O, *out]`, x `[N, I, *size]`; grad_weight `[O, I / groups, *taps]`, where masked blocks are zero in
    every tap; the sums of `signals` are over a block's taps, too.
    """
    rows = grad_z.movedim(1, -1).flatten(0, -2).to(_compute_dtype(grad_z)).chunk(window.groups, dim=1)
    patches = _patches(x, weight, window)
    gradient = torch.cat([r.t() @ p.to(r.dtype) for r, p in zip(rows, patches, strict=True)])
    wide = index_lists.matrix_block(block, weight.shape)
    gradient, signals = gate_gradient(gradient, weight.flatten(1), mask, probes, wide)
    return gradient.view(weight.shape), signals


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


class Before(NamedTuple):
    """The activation before a layer, `x = activation(z)`, where its input gradient goes on to be that of z.

    z, `[M, K]` or `[N, K, *size]`, has the shape and the dtype of x, and lies in memory as the gradient does. `sums`,
    `[K]` in float32 or wider, receives what the gradient adds up to over all positions: the gradient of a bias that is
    a part of z.
    """

    z: Tensor
    activation: str
    sums: Tensor

    @classmethod
    def of(cls, z: Tensor, activation: str) -> "Before":
        """With sums that are yet to be set."""
        return cls(z, activation, z.new_empty(z.shape[1], dtype=_compute_dtype(z)))

    def differentiate(self, grad_x: Tensor) -> Tensor:
        """The gradient of z for that of x; sets `sums`."""
        grad_z = differentiate(grad_x, self.z.to(grad_x.dtype), self.activation)
        self.set_sums(grad_z)
        return grad_z

    def set_sums(self, grad_z: Tensor) -> None:
        """Those of the gradient of z."""
        self.sums.copy_(channel_sums(grad_z, 1))


def channel_sums(grad: Tensor, channels: int) -> Tensor:
    """The gradient of a bias along the dimension `channels`, summed in float32 or wider."""
    return grad.movedim(channels, -1).reshape(-1, grad.shape[channels]).sum(0, dtype=_compute_dtype(grad))


def backward(activation: str) -> str:
    """What a kernel is told to do last that multiplies an input gradient by the slope of an activation."""
    return activation + BACKWARD


def differentiate(grad_y: Tensor, z: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Gradient with respect to z of `y = activation(z)`, for one of `DIFFERENTIATED`; in `out` where that is given.

    Raises ValueError for another activation.
    """
    if activation not in DIFFERENTIATED:
        raise ValueError(f"the backward pass of {activation!r} is none of {', '.join(DIFFERENTIATED)}")
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    if out is None:
        return torch.ops.aten.gelu_backward(grad_y, z, approximate=approximate)
    return torch.ops.aten.gelu_backward.grad_input(grad_y, z, approximate=approximate, grad_input=out)


def _rows_product(x: Tensor, weight: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """`x @ weight.T` where each block row multiplies only the inputs of its active blocks."""
    dtype = _compute_dtype(x)
    inputs = index_lists.expand(mask, (1, block[1]), (mask.shape[0], weight.shape[1]))
    rows = weight.split(block[0])
    products = [x[:, inputs[r]].to(dtype) @ rows[r][:, inputs[r]].to(dtype).t() for r in range(mask.shape[0])]
    return torch.cat(products, dim=1)


def _patches(x: Tensor, weight: Tensor, window: Window) -> tuple[Tensor, ...]:
    """What the window sees at each position of the output, for each group: `[positions, inputs * taps]`."""
    taps = weight.shape[2:]
    x = F.pad(x, [side for sides in reversed(window.padding) for side in sides])
    for dim, (count, stride, dilation) in enumerate(zip(taps, window.stride, window.dilation, strict=True), 2):
        x = x.unfold(dim, dilation * (count - 1) + 1, stride)[..., ::dilation]
    rows = x.movedim(1, len(taps) + 1).flatten(len(taps) + 1).flatten(0, len(taps))
    return rows.chunk(window.groups, dim=1)


def _block_sums(entries: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = mask.shape
    padding = (0, columns * block[1] - entries.shape[1], 0, rows * block[0] - entries.shape[0])
    whole = F.pad(entries, padding) if any(padding) else entries
    return whole.view(rows, block[0], columns, block[1]).sum((1, 3))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
