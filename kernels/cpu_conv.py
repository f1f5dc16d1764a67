"""Block-sparse convolution on the CPU: forward, input gradient and weight gradient that skip masked channel blocks.

The kernels are those of `cpu_product`. Activations are channels-last, so that an output pixel is a row of a product and
a tap of the window is a shift of its input; a block of channels spans all taps. The input gradient of a convolution
with a stride falls into phases, each with the taps that reach its pixels: nothing is multiplied with zeros in between.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpp_window, cpu_product, index_lists
from .build import KernelBuildError as KernelBuildError
from .cpp_window import Size, Taps
from .cpu_product import Block
from .cpu_product import sources as sources
from .cpu_product import supported as supported
from .index_lists import BlockLists
from .window import Window, channels_last


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str, window: Window
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, z the convolution of x over the active blocks, as `reference.conv` has it.

    x `[N, I, *size]`, best with a unit stride along I, weight `[O, I / groups, *taps]`, bias `[O]` or None. Returns y
    `[N, O, *out]` in x's dtype, channels-last, and z as `cpu_linear.forward` does.
    """
    x, flat = channels_last(x), weight.flatten(2)
    size, taps = tuple(x.shape[2:]), tuple(weight.shape[2:])
    out = window.output_size(size, taps)
    y = _empty(x, weight.shape[0], out)
    z = torch.empty_like(y) if activation.startswith("gelu") else x.new_empty(0)
    if not y.numel():
        return y, z
    offsets, first = _window_taps(window, taps)
    geometry = _geometry(x, y, out, size, first, window.stride, offsets)
    (o, i), strides = flat.shape[:2], (flat.stride(0), flat.stride(1), flat.stride(2))
    for group, own in _groups(lists, window.groups):
        inputs, outputs = slice(group * i, (group + 1) * i), slice(group * o // window.groups, None)
        by_rows = own.crow_indices, own.col_indices, own.row_order
        cpu_product.rows(
            geometry, x[:, inputs], flat[outputs], strides, None if bias is None else bias[outputs], by_rows,
            y[:, outputs], z[:, outputs] if z.numel() else z, o // window.groups, i, block, activation,
        )  # fmt: skip
    return y, z


def dgrad(grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, window: Window, input_size: Size) -> Tensor:
    """Gradient with respect to the input, `reference.conv_dgrad`: grad_z `[N, O, *out]` -> `[N, I, *input_size]`."""
    grad_z, flat = channels_last(grad_z), weight.flatten(2)
    out, none = tuple(grad_z.shape[2:]), grad_z.new_empty(0)
    o, i = flat.shape[:2]
    grad_x = _empty(grad_z, i * window.groups, input_size)
    if not grad_x.numel():
        return grad_x
    strides = (flat.stride(1), flat.stride(0), flat.stride(2))
    for phase in _phases(window, tuple(weight.shape[2:]), input_size):
        pixels = grad_x
        for dim, (start, stride) in enumerate(zip(phase.pixel, window.stride, strict=True), 2):
            pixels = pixels[(slice(None),) * dim + (slice(start, None, stride),)]
        step = (1,) * len(out)
        geometry = _geometry(grad_z, pixels, tuple(pixels.shape[2:]), out, phase.first, step, phase.taps)
        for group, own in _groups(lists, window.groups):
            inputs, outputs = slice(group * i, (group + 1) * i), slice(group * o // window.groups, None)
            by_columns = own.ccol_indices, own.row_indices, own.column_order
            cpu_product.rows(
                geometry, grad_z[:, outputs], flat[outputs], strides, None, by_columns, pixels[:, inputs], none,
                i, o // window.groups, (block[1], block[0]),
            )  # fmt: skip
    return grad_x


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block, window: Window
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight and the signals of its blocks, as `reference.conv_wgrad` has them.

    grad_z `[N, O, *out]`, x `[N, I, *size]`, probes int32 `[P]` (flat ids of inactive blocks, padded with -1) ->
    grad_weight contiguous `[O, I / groups, *taps]` in the weight's dtype, signals float32 `[2, R, C]`.
    """
    grad_z, x, flat = channels_last(grad_z), channels_last(x), weight.flatten(2)
    size, taps, out = tuple(x.shape[2:]), tuple(weight.shape[2:]), tuple(grad_z.shape[2:])
    grad_weight = weight.new_empty(weight.shape)
    signals = weight.new_empty(2, *lists.grid, dtype=torch.float32)
    if not grad_z.numel() or not x.numel():
        return grad_weight.zero_(), signals.zero_()
    offsets, first = _window_taps(window, taps)
    geometry = _geometry(x, grad_z, out, size, first, window.stride, offsets)
    (o, i), strides = flat.shape[:2], (flat.stride(0), flat.stride(1), flat.stride(2))
    blocks = lists.grid[0] // window.groups * lists.grid[1]
    for group, own in _groups(lists, window.groups):
        inputs = slice(group * i, (group + 1) * i)
        outputs = slice(group * o // window.groups, (group + 1) * o // window.groups)
        here = torch.where(probes // blocks == group, probes - group * blocks, -1).int() if len(probes) else probes
        part = signals if window.groups == 1 else signals.new_empty(2, *own.grid)
        cpu_product.wgrad(
            geometry, grad_z[:, outputs], x[:, inputs], flat[outputs], strides, own, here,
            grad_weight.flatten(2)[outputs], part, block,
        )  # fmt: skip
        signals.view(2, window.groups, *own.grid)[:, group].copy_(part.view(2, *own.grid))
    return grad_weight, signals


def _empty(like: Tensor, channels: int, size: Size) -> Tensor:
    return like.new_empty(like.shape[0], *size, channels).movedim(-1, 1)


def _geometry(x: Tensor, y: Tensor, out: Size, size: Size, first: Size, step: Size, taps: Taps) -> cpu_product.Geometry:
    """Rows that are the pixels of y `[N, _, *out]`, which read those of x `[N, _, *size]`."""
    pixels = [(s.stride(0), *s.stride()[2:]) for s in (x, y)]
    return cpp_window.geometry(x.shape[0], out, size, first, step, taps, *pixels)


def _groups(lists: BlockLists, groups: int) -> Iterator[tuple[int, BlockLists]]:
    """Each group of a convolution with the lists of its own block rows."""
    if groups == 1:
        yield 0, lists
        return
    for group, mask in enumerate(index_lists.mask_of(lists).chunk(groups)):
        yield group, index_lists.build(mask)


@functools.lru_cache
def _window_taps(window: Window, taps: Size) -> tuple[Taps, Size]:
    """Where each tap reads from, in pixels of the input from `output pixel * stride`, and the first of those."""
    first = tuple(-before for before, _ in window.padding)
    ranges = [
        [start + dilation * t for t in range(count)]
        for start, count, dilation in zip(first, taps, window.dilation, strict=True)
    ]
    return tuple((offset, index) for index, offset in enumerate(itertools.product(*ranges))), first


class _Phase(NamedTuple):
    """Pixels of the input, every `stride`-th from `pixel` on, and which pixels of the output reach them by what tap."""

    pixel: Size
    taps: Taps
    first: Size


@functools.lru_cache
def _phases(window: Window, taps: Size, size: Size) -> tuple[_Phase, ...]:
    phases = []
    for pixel in itertools.product(*(range(min(s, n)) for s, n in zip(window.stride, size, strict=True))):
        reached: list[list[tuple[int, int]]] = []  # per dimension: output pixel of the first input pixel, tap
        for start, count, stride, dilation, (before, _) in zip(
            pixel, taps, window.stride, window.dilation, window.padding, strict=True
        ):
            places = [(start + before - dilation * t, t) for t in range(count)]
            reached.append([(place // stride, t) for place, t in places if place % stride == 0])
        offsets = [
            (tuple(place for place, _ in combination), _flat_index([t for _, t in combination], taps))
            for combination in itertools.product(*reached)
        ]
        first = tuple(min((offset[d] for offset, _ in offsets), default=0) for d in range(len(taps)))
        phases.append(_Phase(pixel, tuple(offsets), first))
    return tuple(phases)


def _flat_index(index: list[int], sizes: Size) -> int:
    return sum(at * math.prod(sizes[d + 1 :]) for d, at in enumerate(index))
