"""Block-sparse convolutions in 1 to 3 dimensions on an NVIDIA GPU: implicit matrix products that skip masked blocks.

The kernels are the linear's, from the same generators: a row is a pixel, and a list is walked once per tap
(`triton_window`). Images are read and written channels-last, where they lie; nothing is unfolded. Tiles are loaded
through pointers: a descriptor would have to know the window (TMA's im2col mode), which Triton's do not.

Tensor cores want the weight with channels side by side, `[O, *taps, I/groups]`. In PyTorch's channels-last format it is
that already; another is copied once per call. Read where it lies, its entries would be `taps` apart, and a load of 2
bytes is not asynchronous: all pixels would wait for it. The weight's gradient is written where it belongs, and signals
come from the weight as it lies.

What holds for `triton_linear` holds here: which devices and types are supported, that lists are read on the device
only, and that every function may raise `KernelBuildError`. A 1x1 convolution that moves by 1 is a linear.
"""

import math

import torch
from torch import Tensor

from . import triton_launch, triton_tune
from .index_lists import Block, BlockLists
from .reference import Before, backward
from .triton_linear import supported as supported
from .triton_rows import Rows
from .triton_wgrad import Wgrad
from .window import Window

Shape = tuple[int, ...]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str, window: Window
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, `z = conv(x, weight) + bias` over the active blocks, as `reference.conv` has it.

    x `[N, I, *size]`, channels-last, weight `[O, I/groups, *taps]` in x's dtype, bias `[O]` of any floating dtype or
    None. Returns y `[N, O, *out]`, channels-last, in x's dtype and, for the gelu activations, z likewise; for the
    others, whose derivative is known from y, z is empty.
    """
    shape, size = tuple(weight.shape), tuple(x.shape[2:])
    kernel = _forward_kernel(x.dtype, block, shape, window, activation, bias is not None)
    out = window.output_size(size, kernel.taps)
    y = _new(x, weight.shape[0], out)
    z = _new(x, weight.shape[0], out) if kernel.keeps_z else x.new_empty(0)
    tile = triton_tune.choose(kernel, *_sizes("forward", x.shape[0], size, shape, window), False, x.device, size)
    order = (lists.crow_indices, lists.col_indices, lists.row_order)
    triton_launch.convolve_rows(kernel, tile, x, weight, bias, order, y, z)
    return y, z


def dgrad(
    grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, window: Window, input_size: Shape,
    before: Before | None = None,
) -> Tensor:  # fmt: skip
    """Gradient with respect to the input, `reference.conv_dgrad`: grad_z `[N, O, *out]` -> `[N, I, *input_size]`.

    Or to what is before it. weight `[O, I/groups, *taps]`; grad_z, the result and z are channels-last.
    """
    last = "none" if before is None else backward(before.activation)
    shape, device = tuple(weight.shape), grad_z.device
    kernel = _dgrad_kernel(grad_z.dtype, block, shape, window, last)
    grad_x = _new(grad_z, weight.shape[1] * window.groups, input_size)
    sizes = _sizes("dgrad", grad_z.shape[0], input_size, shape, window)
    tile = triton_tune.choose(kernel, *sizes, False, device, input_size)
    order = (lists.ccol_indices, lists.row_indices, lists.column_order)
    triton_launch.convolve_rows(
        kernel, tile, grad_z, weight, None, order, grad_x, grad_x if before is None else before.z
    )
    if before is not None:
        before.set_sums(grad_x)
    return grad_x


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block, window: Window
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight and the signals of its blocks, as `reference.conv_wgrad` has them.

    grad_z `[N, O, *out]` and x `[N, I, *size]`, channels-last, weight `[O, I/groups, *taps]`, probes int32 `[P]` (flat
    ids of inactive blocks, padded with -1) -> grad_weight, contiguous, of the weight's shape and dtype, signals float32
    `[2, R, C]`, summed over taps.
    """
    shape, size = tuple(weight.shape), tuple(x.shape[2:])
    kernel = _wgrad_kernel(x.dtype, block, shape, window)
    tile = triton_tune.choose(kernel, *_sizes("wgrad", x.shape[0], size, shape, window), False, x.device, size)
    return triton_launch.convolve_wgrad(kernel, tile, grad_z, x, weight, lists, probes)


def crossover(
    role: str, dtype: torch.dtype, block: Block, images: int, input_size: Shape, weight: Shape, window: Window,
    device: torch.device,
) -> float:  # fmt: skip
    """The density, 0 to 1, above which the framework's own convolution is faster than ours: measured once per device.

    `role` is forward, dgrad or wgrad, `input_size` spatial, `weight` the weight's shape. 1, never, where nothing can be
    timed; see `triton_tune`. Raises ValueError for another role.
    """
    if role == "forward":
        kernel: Rows | Wgrad = _forward_kernel(dtype, block, weight, window, "none", False)
    elif role == "dgrad":
        kernel = _dgrad_kernel(dtype, block, weight, window)
    elif role == "wgrad":
        kernel = _wgrad_kernel(dtype, block, weight, window)
    else:
        raise ValueError(f"unknown role {role!r}; allowed are forward, dgrad and wgrad")
    return triton_tune.crossover(kernel, *_sizes(role, images, input_size, weight, window), device, input_size)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are taken: as torch's own setting for convolutions says, by default in tf32."""
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and setting == "tf32" else "ieee"


def _forward_kernel(
    dtype: torch.dtype, block: Block, weight: Shape, window: Window, activation: str, bias: bool
) -> Rows:
    partial = weight[1] % block[1] != 0
    return Rows(*block, True, dtype, activation, bias, partial, precision(dtype), weight[2:], window)


def _dgrad_kernel(dtype: torch.dtype, block: Block, weight: Shape, window: Window, last: str = "none") -> Rows:
    partial = weight[0] % block[0] != 0
    return Rows(*block[::-1], False, dtype, last, False, partial, precision(dtype), weight[2:], window)


def _wgrad_kernel(dtype: torch.dtype, block: Block, weight: Shape, window: Window) -> Wgrad:
    return Wgrad(*block, dtype, precision(dtype), weight[2:], window)


def _sizes(role: str, images: int, input_size: Shape, weight: Shape, window: Window) -> tuple[int, int, int]:
    """Rows of a role's product, and what the tuner calls its outputs and inputs."""
    outputs, inputs = weight[0], weight[1] * window.groups
    if role == "dgrad":
        return images * math.prod(input_size), inputs, outputs
    return images * math.prod(window.output_size(input_size, weight[2:])), outputs, inputs


def _new(like: Tensor, channels: int, size: Shape) -> Tensor:
    """Images of so many channels, channels-last."""
    return like.new_empty(like.shape[0], *size, channels).movedim(-1, 1)
