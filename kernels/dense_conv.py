"""The gated convolution by the framework's dense products, where no kernel runs or where those are faster.

Same verbs as the kernels beside this. As in `dense_linear`, only the weight gradient looks at the lists: the weight's
masked blocks are taken to be zero, which a gate keeps true.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_signals, index_lists, reference
from .cpu_linear import supported as supported
from .index_lists import Block, BlockLists
from .window import Window, channels_last


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str, window: Window
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, z the convolution plus bias; z is empty but for the gelu activations, as kernels have it.

    x `[N, I, *size]`, weight `[O, I / groups, *taps]`, bias `[O]` of any floating dtype or None ->
    `[N, O, *out]` in x's dtype, channels-last like x.
    """
    z = product(x, weight.to(x.dtype), bias, window)
    return reference.activate(z, activation), z if reference.saves_z(activation) else x.new_empty(0)


def dgrad(
    grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, window: Window, input_size: tuple[int, ...],
    before: reference.Before | None = None,
) -> Tensor:  # fmt: skip
    """Gradient with respect to the input: grad_z `[N, O, *out]` -> `[N, I, *input_size]`, channels-last."""
    grad_x = input_gradient(grad_z, weight.to(grad_z.dtype), window, input_size)
    return grad_x if before is None else before.differentiate(grad_x)


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block, window: Window
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight, zero in masked blocks, and the signals of the blocks.

    grad_z `[N, O, *out]`, x `[N, I, *size]`, probes int32 `[P]` padded with -1 -> grad_weight `[O, I / groups, *taps]`
    in the weight's dtype, signals float32 `[2, R, C]` as `reference.conv_wgrad` has them, of the rounded gradient.
    """
    gradient = weight_gradient(grad_z, x, weight.to(x.dtype), window).flatten(1)
    sides = index_lists.matrix_block(block, weight.shape)
    gradient, signals = cpu_signals.gate_gradient(gradient, weight.flatten(1), lists, probes, sides)
    return gradient.view(weight.shape), signals


def product(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The framework's convolution, and nothing else."""
    common, more = _symmetric(window)
    moves = (window.stride, common, window.dilation, False, _none(window), window.groups)
    bias = None if bias is None else bias.to(x.dtype)
    # oneDNN (in PyTorch 2.13) crashes on some channels-last images where all taps lie in the padding: with a bias, and
    # in half types. In float32 without a bias it does not. In bfloat16 it is wrong where strides leave one position.
    size, taps = tuple(x.shape[2:]), tuple(weight.shape[2:])
    narrow = any(out == 1 < step for out, step in zip(window.output_size(size, taps), window.stride, strict=True))
    unsafe = x.device.type == "cpu" and (window.misses(size, taps) or (narrow and x.dtype != torch.float32))
    dtype = torch.promote_types(x.dtype, torch.float32) if unsafe else x.dtype
    padded = channels_last(F.pad(x, more)) if any(more) else x
    z = torch.ops.aten.convolution(padded.to(dtype), weight.to(dtype), None if unsafe else bias, *moves)
    if unsafe and bias is not None:
        z += bias.view(-1, *[1] * len(common))
    return channels_last(z.to(x.dtype))


def input_gradient(grad_z: Tensor, weight: Tensor, window: Window, input_size: tuple[int, ...]) -> Tensor:
    """The framework's gradient with respect to the input, and nothing else."""
    common, more = _symmetric(window)
    padded = [size + before + after for size, before, after in zip(input_size, more[-2::-2], more[::-2], strict=True)]
    shape_only = grad_z.new_empty(grad_z.shape[0], *padded, weight.shape[1] * window.groups).movedim(-1, 1)
    grad_x = _backward(grad_z, shape_only, weight, window, common, (True, False, False))[0]
    for dim, (size, before) in enumerate(zip(input_size, more[-2::-2], strict=True), 2):
        grad_x = grad_x.narrow(dim, before, size)
    return channels_last(grad_x)


def weight_gradient(grad_z: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The framework's gradient with respect to the weight, in x's dtype, and nothing else."""
    common, more = _symmetric(window)
    x = channels_last(F.pad(x, more)) if any(more) else x
    return _backward(grad_z, x, weight, window, common, (False, True, False))[1]


def _backward(
    grad_z: Tensor, x: Tensor, weight: Tensor, window: Window, padding: list[int], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    moves = (window.stride, padding, window.dilation, False, _none(window), window.groups)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad_z, x, weight, None, *moves, wanted
    )
    return gradients


def _symmetric(window: Window) -> tuple[list[int], list[int]]:
    """The padding that both sides of each dimension share, and what `pad` adds to it on each side, last one first."""
    common = [min(sides) for sides in window.padding]
    more = zip(reversed(window.padding), reversed(common), strict=True)
    return common, [side - both for sides, both in more for side in sides]


def _none(window: Window) -> list[int]:
    return [0] * len(window.stride)
