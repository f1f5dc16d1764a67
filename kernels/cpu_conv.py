"""Block-sparse convolution on the CPU: forward, input gradient and weight gradient that skip masked channel blocks.

The kernels are those of `cpu_product`, one call for all groups. Activations are channels-last, so that an output pixel
is a row of a product and a tap of the window is a shift of its input; a block of channels spans all taps. The input
gradient of a convolution with a stride falls into phases, each with the taps that reach its pixels: nothing is
multiplied with zeros in between.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from . import cpp_window, cpu_product
from .build import KernelBuildError as KernelBuildError
from .cpp_window import Phase, Size, Taps
from .cpu_product import sources as sources
from .cpu_product import supported as supported
from .index_lists import Block, BlockLists
from .reference import Before, saves_z
from .window import Window, channels_last


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str, window: Window
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, z the convolution of x over the active blocks, as `reference.conv` has it.

    x `[N, I, *size]`, best with a unit stride along I, weight `[O, I / groups, *taps]`, bias `[O]` or None. Returns y
    `[N, O, *out]` in x's dtype, channels-last, and z as `cpu_linear.forward` does.
    """
    x = channels_last(x)
    y = _empty(x, weight.shape[0], window.output_size(tuple(x.shape[2:]), tuple(weight.shape[2:])))
    z = torch.empty_like(y) if saves_z(activation) else x.new_empty(0)
    if y.numel():
        by_rows = lists.crow_indices, lists.col_indices, lists.row_order
        cpu_product.rows(
            _geometry(x, y, weight, window), x, weight.flatten(2), bias, by_rows, y, z, block, activation,
            window.groups,
        )  # fmt: skip
    return y, z


def dgrad(
    grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, window: Window, input_size: Size,
    before: Before | None = None,
) -> Tensor:  # fmt: skip
    """Gradient with respect to the input, `reference.conv_dgrad`: grad_z `[N, O, *out]` -> `[N, I, *input_size]`.

    Or to what is before it, whose z is channels-last.
    """
    grad_z = channels_last(grad_z)
    grad_x = _empty(grad_z, weight.shape[1] * window.groups, input_size)
    if grad_x.numel():
        by_columns = lists.ccol_indices, lists.row_indices, lists.column_order
        cpu_product.gradient_rows(
            _transposed_geometry(grad_z, grad_x, weight, window), grad_z, weight.flatten(2).transpose(0, 1), by_columns,
            grad_x, before, (block[1], block[0]), window.groups, shared=True,
        )  # fmt: skip
    elif before is not None:
        before.set_sums(grad_x)
    return grad_x


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block, window: Window
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight and the signals of its blocks, as `reference.conv_wgrad` has them.

    grad_z `[N, O, *out]`, x `[N, I, *size]`, probes int32 `[P]` (flat ids of inactive blocks, padded with -1) ->
    grad_weight contiguous `[O, I / groups, *taps]` in the weight's dtype, signals float32 `[2, R, C]`.
    """
    grad_z, x = channels_last(grad_z), channels_last(x)
    grad_weight = weight.new_empty(weight.shape)
    signals = weight.new_empty(2, *lists.grid, dtype=torch.float32)
    if not grad_z.numel() or not x.numel():
        return grad_weight.zero_(), signals.zero_()
    cpu_product.wgrad(
        _geometry(x, grad_z, weight, window), grad_z, x, weight.flatten(2), lists, probes,
        grad_weight.flatten(2), signals, block, window.groups,
    )  # fmt: skip
    return grad_weight, signals


def _empty(like: Tensor, channels: int, size: Size) -> Tensor:
    return like.new_empty(like.shape[0], *size, channels).movedim(-1, 1)


def _geometry(x: Tensor, y: Tensor, weight: Tensor, window: Window) -> cpu_product.Geometry:
    """Rows that are the pixels of y `[N, O, *out]`, which see those of x `[N, I, *size]` through the window."""
    phase = Phase(tuple(y.shape[2:]), 0, _taps(window, tuple(weight.shape[2:])))
    strides = [(image.stride(0), *image.stride()[2:]) for image in (x, y)]
    return cpp_window.geometry(x.shape[0], tuple(x.shape[2:]), window.stride, (phase,), *strides)


@functools.lru_cache
def _taps(window: Window, taps: Size) -> Taps:
    """Where each tap reads from, in pixels of the input from `output pixel * stride`."""
    ranges = [
        [dilation * t - before for t in range(count)]
        for count, dilation, (before, _) in zip(taps, window.dilation, window.padding, strict=True)
    ]
    return tuple((offset, index) for index, offset in enumerate(itertools.product(*ranges)))


def _transposed_geometry(grad_z: Tensor, grad_x: Tensor, weight: Tensor, window: Window) -> cpu_product.Geometry:
    """Rows that are the pixels of grad_x `[N, I, *size]`, which grad_z `[N, O, *out]` saw through the window."""
    strides = tuple(grad_x.stride()[2:])
    phases = _phases(window, tuple(weight.shape[2:]), tuple(grad_x.shape[2:]), strides)
    steps = [pixel * stride for pixel, stride in zip(strides, window.stride, strict=True)]
    return cpp_window.geometry(
        grad_z.shape[0], tuple(grad_z.shape[2:]), (1,) * len(steps), phases,
        (grad_z.stride(0), *grad_z.stride()[2:]), (grad_x.stride(0), *steps),
    )  # fmt: skip


@functools.lru_cache
def _phases(window: Window, taps: Size, size: Size, strides: Size) -> tuple[Phase, ...]:
    """The pixels of an input of `size`, in phases of every `stride`-th of them; `strides` are those of a pixel.

    Pixel p of a phase is seen by output pixels p + offset, through the phase's own taps.
    """
    phases = []
    for pixel in itertools.product(*(range(min(s, n)) for s, n in zip(window.stride, size, strict=True))):
        seen: list[list[tuple[int, int]]] = []  # per dimension: output pixel that sees the phase's first, tap
        for start, count, stride, dilation, (before, _) in zip(
            pixel, taps, window.stride, window.dilation, window.padding, strict=True
        ):
            places = [(start + before - dilation * t, t) for t in range(count)]
            seen.append([(place // stride, t) for place, t in places if place % stride == 0])
        phases.append(
            Phase(
                tuple(-(-(n - start) // stride) for n, start, stride in zip(size, pixel, window.stride, strict=True)),
                sum(start * stride for start, stride in zip(pixel, strides, strict=True)),
                tuple(
                    (tuple(place for place, _ in combination), _flat_index([t for _, t in combination], taps))
                    for combination in itertools.product(*seen)
                ),
            )
        )
    return tuple(phases)


def _flat_index(index: list[int], sizes: Size) -> int:
    return sum(at * math.prod(sizes[d + 1 :]) for d, at in enumerate(index))
