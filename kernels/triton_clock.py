"""What the tuner times on a device: a kernel in a tile, and the dense product of the same role, on random tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dense_conv, dense_linear, index_lists, triton_launch
from .index_lists import BlockLists
from .triton_rows import Rows, RowsTile
from .triton_wgrad import Wgrad, WgradTile

Tile = RowsTile | WgradTile
# Seconds that a tile takes at a density; without a tile, those of the dense product.
Clock = Callable[[Tile | None, float], float]


@dataclass(frozen=True)
class Contest:
    """Both contestants, ready to run under the lists of a grid of blocks."""

    grid: tuple[int, int]
    ours: Callable[[Tile, BlockLists], object]
    dense: Callable[[BlockLists], object]


def clock_on(
    device: torch.device, kernel: Rows | Wgrad, m: int, outputs: int, inputs: int, size: tuple[int, ...]
) -> Clock:
    """Times with random numbers of its own: the framework's random state stays as it is.

    x is `[m, inputs]` and y `[m, outputs]`; of a convolution m counts pixels, of inputs with the spatial `size`.
    """
    from triton.testing import do_bench

    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=kernel.dtype)

    if kernel.walk:
        contest = _convolution(kernel, normal, m, outputs, inputs, size)
    else:
        contest = _linear(kernel, normal, m, outputs, inputs)

    def clock(tile: Tile | None, density: float) -> float:
        lists = index_lists.build(torch.rand(contest.grid, generator=random, device=device) < density)

        def run() -> None:
            contest.dense(lists) if tile is None else contest.ours(tile, lists)

        with torch.cuda.device(device), torch.no_grad():
            return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3

    return clock


def _linear(kernel: Rows | Wgrad, normal: Callable[..., Tensor], m: int, outputs: int, inputs: int) -> Contest:
    forward = isinstance(kernel, Rows) and kernel.transposed
    shape = (outputs, inputs)
    weight = normal(*(shape if forward or isinstance(kernel, Wgrad) else shape[::-1]))
    x, y = normal(m, inputs), normal(m, outputs)
    block, no_probes = (kernel.outputs, kernel.inputs), _no_probes(x)

    def ours(tile: Tile, lists: BlockLists) -> None:
        if isinstance(kernel, Rows) and isinstance(tile, RowsTile):
            triton_launch.run_rows(kernel, tile, x, weight, None, _by_rows(lists), y, y)
        elif isinstance(kernel, Wgrad) and isinstance(tile, WgradTile):
            triton_launch.run_wgrad(kernel, tile, y, x, weight, lists, no_probes)

    def dense(lists: BlockLists) -> None:
        if isinstance(kernel, Wgrad):
            dense_linear.wgrad(y, x, weight, lists, no_probes, block)
        else:
            torch.mm(x, weight.t() if forward else weight, out=y)

    return Contest(index_lists.grid_shape(shape, block), ours, dense)


def _convolution(
    kernel: Rows | Wgrad, normal: Callable[..., Tensor], m: int, outputs: int, inputs: int, size: tuple[int, ...]
) -> Contest:
    window, taps, back = kernel.window, kernel.taps, isinstance(kernel, Rows) and not kernel.transposed
    # Sizes in powers of 2 may have become smaller than the window.
    size = tuple(max(side, gap * (count - 1) + 1) for side, count, gap in zip(size, taps, window.dilation, strict=True))
    out = window.output_size(size, taps)
    number = max(1, m // math.prod(size if back else out))
    channels_in, channels_out = (outputs, inputs) if back else (inputs, outputs)
    x = normal(number, *size, channels_in).movedim(-1, 1)
    y = normal(number, *out, channels_out).movedim(-1, 1)
    weight = normal(channels_out, channels_in // window.groups, *taps)
    block, no_probes = (kernel.outputs, kernel.inputs), _no_probes(x)

    def ours(tile: Tile, lists: BlockLists) -> None:
        if isinstance(kernel, Rows) and isinstance(tile, RowsTile):
            ends = (y, x) if back else (x, y)
            triton_launch.convolve_rows(kernel, tile, ends[0], weight, None, _by_rows(lists), ends[1], ends[1])
        elif isinstance(kernel, Wgrad) and isinstance(tile, WgradTile):
            triton_launch.convolve_wgrad(kernel, tile, y, x, weight, lists, no_probes)

    def dense(lists: BlockLists) -> object:
        if isinstance(kernel, Wgrad):
            return dense_conv.wgrad(y, x, weight, lists, no_probes, block, window)
        if back:
            return dense_conv.input_gradient(y, weight, window, size)
        return dense_conv.product(x, weight, None, window)

    shape = weight.shape[1::-1] if back else weight.shape[:2]
    return Contest(index_lists.grid_shape((shape[0], shape[1]), block), ours, dense)


def _by_rows(lists: BlockLists) -> triton_launch.Lists:
    return lists.crow_indices, lists.col_indices, lists.row_order


def _no_probes(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=like.device)
