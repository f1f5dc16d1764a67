"""Runs a generated Triton kernel in a given tile: what its parameters are, how many programs it has.

Nothing here reads a list or waits for the device.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_build, triton_rows_text, triton_wgrad
from .build import KernelBuildError
from .index_lists import BlockLists
from .triton_rows import Rows, RowsTile
from .triton_wgrad import Wgrad, WgradTile
from .triton_window import Walk

Lists = tuple[Tensor, Tensor, Tensor]  # offsets, indices, order

_PLACES = 1 << 31  # that 32 bits tell apart


class Images(NamedTuple):
    """What the rows of a convolution's matrices are: pixels of so many images of these spatial sizes."""

    number: int
    x_size: tuple[int, ...]
    y_size: tuple[int, ...]

    def parameters(self, walk: Walk) -> dict[str, int]:
        """By their names."""
        values = (self.number, *self.x_size, *self.y_size, *[walk.window.groups] * (walk.window.groups > 1))
        return dict(zip(walk.parameters, values, strict=True))

    def most_rows(self, walk: Walk) -> int:
        """How many pixels of y the largest of the walk's phases has."""
        each = zip(walk.axes, self.y_size, strict=True)
        return self.number * math.prod(-(-size // axis.stride) if axis in walk.phased else size for axis, size in each)


def aligned(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can read these: bases and row strides are multiples of 16 bytes, rows lie apart."""
    return all(
        matrix.data_ptr() % 16 == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        for matrix in matrices
    )


def readable(matrix: Tensor) -> Tensor:
    """With a unit stride along rows, and rows so near that offsets inside a tile fit 32 bits."""
    near = matrix.stride(1) == 1 and 0 <= matrix.stride(0) < 1 << 22
    return matrix if near else matrix.contiguous()


def run_rows(
    kernel: Rows, tile: RowsTile, x: Tensor, weight: Tensor, bias: Tensor | None,
    lists: Lists, y: Tensor, z: Tensor, images: Images | None = None,
) -> None:  # fmt: skip
    """Writes y, and z where it is kept, or reads another layer's; lists are offsets, indices and order.

    x and weight are `readable`.
    `images` tells of a convolution, whose matrices are pixels by channels, the weight `[O, taps * I/groups]`.
    """
    (rows, outputs), inputs = y.shape, x.shape[1]
    if rows == 0:
        return
    groups, phases = kernel.window.groups, 1
    if kernel.transposed:
        blocks, inputs = -(-outputs // kernel.outputs), inputs // groups
    else:
        outputs //= groups
        blocks = -(-outputs // kernel.outputs) * groups
    module = _module(kernel, tile)
    place: dict[str, Any] = {
        "x": x, "weight": weight, "bias": bias, "offsets": lists[0], "indices": lists[1], "order": lists[2], "y": y,
        "z": z, "m": rows, "outputs": outputs, "inputs": inputs, "x_stride": x.stride(0),
        "weight_stride": weight.stride(0),
    }  # fmt: skip
    if kernel.walk and images:
        place |= images.parameters(kernel.walk)
        rows, phases = images.most_rows(kernel.walk), kernel.walk.phases
    if tile.descriptors:
        weight_box = [kernel.columns, tile.step] if kernel.transposed else [tile.step, kernel.columns]
        place["x"] = _descriptor(x, [tile.rows, tile.step])
        place["weight"] = _descriptor(weight, weight_box)
    arguments = [place[name] for name in triton_rows_text.parameters(kernel, tile)]
    with _running(kernel, x.device):
        module.rows_product[(blocks * -(-rows // tile.rows), phases)](
            *arguments, num_warps=tile.warps, num_stages=tile.stages
        )


def run_wgrad(
    kernel: Wgrad, tile: WgradTile, grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor,
    images: Images | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight's gradient and the signals. grad_z, x and weight are `readable`.

    `images` tells of a convolution, whose matrices are pixels by channels; the weight and its gradient are
    `[O, I/groups * taps]`.
    """
    rows, outputs, taps = grad_z.shape[0], weight.shape[0], math.prod(kernel.taps)
    inputs = weight.shape[1] // taps
    grad_weight = weight.new_empty(weight.shape)
    signals = torch.empty(taps, 2, *lists.grid, dtype=torch.float32, device=weight.device)
    if rows == 0:
        return grad_weight.zero_(), signals[0].zero_()
    module = _module(kernel, tile)
    place: dict[str, Any] = {
        "grad_z": grad_z, "x": x, "weight": weight, "offsets": lists.crow_indices, "indices": lists.col_indices,
        "probes": probes, "grad_weight": grad_weight, "signals": signals, "m": rows, "outputs": outputs,
        "inputs": inputs, "probed": probes.numel(), "splits": tile.splits, "grad_z_stride": grad_z.stride(0),
        "x_stride": x.stride(0), "weight_stride": weight.stride(0),
    }  # fmt: skip
    if kernel.walk and images:
        place |= images.parameters(kernel.walk)
    if tile.splits > 1:
        place["partials"] = x.new_empty(tile.splits, *weight.shape, dtype=torch.float32)
    arguments = dict(place)
    if tile.descriptors:
        arguments["grad_z"] = _descriptor(grad_z, [tile.rows, kernel.sides[0]])
        arguments["x"] = _descriptor(x, [tile.rows, kernel.sides[1]])
    programs = triton_wgrad.programs(kernel, tile, outputs, inputs, probes.numel())
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    with _running(kernel, x.device):
        given = [arguments[name] for name in triton_wgrad.parameters(kernel, tile)]
        module.weight_gradient[(programs, tile.splits)](*given, **options)
        if tile.splits > 1:
            given = [place[name] for name in triton_wgrad.FINISH_PARAMETERS]
            module.finish[(math.prod(lists.grid), taps)](*given, num_warps=8)
    return grad_weight, signals.sum(0) if taps > 1 else signals[0]


def convolve_rows(
    kernel: Rows, tile: RowsTile, x: Tensor, weight: Tensor, bias: Tensor | None, lists: Lists, y: Tensor, z: Tensor
) -> None:
    """`run_rows` on images `[N, C, *size]`, of which y and z are channels-last, and a weight `[O, I/groups, *taps]`."""
    images = Images(x.shape[0], tuple(x.shape[2:]), tuple(y.shape[2:]))
    x, y, z = _pixels(x), _pixels(y), _pixels(z) if kernel.has_z else z
    weight = weight.movedim(1, -1).contiguous().flatten(1)
    kernel = replace(kernel, wide=max(x.shape[0] * x.stride(0), y.numel()) >= _PLACES)
    run_rows(kernel, tile, x, weight, bias, lists, y, z, images)


def convolve_wgrad(
    kernel: Wgrad, tile: WgradTile, grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """`run_wgrad` on images `[N, C, *size]` and a weight `[O, I/groups, *taps]`, as which the gradient comes back."""
    images, shape = Images(x.shape[0], tuple(x.shape[2:]), tuple(grad_z.shape[2:])), weight.shape
    grad_z, x, weight = _pixels(grad_z), _pixels(x), readable(weight.flatten(1))
    kernel = replace(kernel, wide=x.shape[0] * x.stride(0) >= _PLACES)
    grad_weight, signals = run_wgrad(kernel, tile, grad_z, x, weight, lists, probes, images)
    return grad_weight.view(shape), signals


def _pixels(images: Tensor) -> Tensor:
    """Pixels by channels: a view of channels-last images, and of a slice of their channels."""
    return readable(images.movedim(1, -1).flatten(0, -2))


@functools.cache
def _module(kernel: Rows | Wgrad, tile: RowsTile | WgradTile) -> ModuleType:
    family: Any = triton_rows_text if isinstance(kernel, Rows) else triton_wgrad
    return triton_build.load(f"{kernel.name}_{tile.name}", family.source(kernel, tile))


def _descriptor(matrix: Tensor, box: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)


@contextlib.contextmanager
def _running(kernel: Rows | Wgrad, device: torch.device) -> Iterator[None]:
    """On the device; whatever keeps Triton from compiling or launching is a KernelBuildError."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), "")
        raise KernelBuildError(
            f"the Triton kernel {kernel.name} does not run",
            f"{type(error).__name__}: {why}",
            "Triton needs a C compiler and the GPU's driver; `ctrlcompile doctor` looks for both",
        ) from error
