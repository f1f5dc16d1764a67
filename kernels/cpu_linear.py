"""Block-sparse linear on the CPU: forward, input gradient and weight gradient that skip masked blocks.

The kernels are those of `cpu_product`, for the window of one tap over one line of pixels: the rows of x.
"""

import functools

import torch
from torch import Tensor

from . import cpp_window, cpu_product
from .build import KernelBuildError as KernelBuildError
from .cpu_product import Geometry
from .cpu_product import sources as sources
from .cpu_product import supported as supported
from .index_lists import Block, BlockLists
from .reference import Before, saves_z


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, `z = x @ weight.T + bias` over the active blocks, as `reference.linear` has it.

    x `[M, K]` with a unit stride along K, weight `[N, K]`, bias `[N]` or None. Returns y `[M, N]` in x's dtype and, for
    the gelu activations, z likewise; for the others, whose derivative is known from y, z is empty.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    z = torch.empty_like(y) if saves_z(activation) else x.new_empty(0)
    by_rows = lists.crow_indices, lists.col_indices, lists.row_order
    if y.numel():
        cpu_product.rows(_geometry(x, y), x, weight, bias, by_rows, y, z, block, activation)
    return y, z


def dgrad(grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, before: Before | None = None) -> Tensor:
    """Gradient with respect to the input, `reference.linear_dgrad`: grad_z `[M, N]`, weight `[N, K]` -> `[M, K]`.

    Or to what is before it, whose z is contiguous.
    """
    grad_x = grad_z.new_empty(grad_z.shape[0], weight.shape[1])
    by_columns = lists.ccol_indices, lists.row_indices, lists.column_order
    if grad_x.numel():
        geometry, sides = _geometry(grad_z, grad_x), (block[1], block[0])
        cpu_product.gradient_rows(geometry, grad_z, weight.t(), by_columns, grad_x, before, sides)
    elif before is not None:
        before.set_sums(grad_x)
    return grad_x


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight and the signals of its blocks, as `reference.linear_wgrad` has them.

    grad_z `[M, N]`, x `[M, K]`, weight `[N, K]`, probes int32 `[P]` (flat ids of inactive blocks, padded with -1) ->
    grad_weight `[N, K]` in the weight's dtype, signals float32 `[2, R, C]`.
    """
    grad_weight = weight.new_empty(weight.shape)
    signals = weight.new_empty(2, *lists.grid, dtype=torch.float32)
    geometry = _geometry(x, grad_z)
    cpu_product.wgrad(geometry, grad_z, x, weight, lists, probes, grad_weight, signals, block)
    return grad_weight, signals


def _geometry(x: Tensor, y: Tensor) -> Geometry:
    return _lines(x.shape[0], x.stride(0), y.stride(0))


@functools.lru_cache(maxsize=1024)
def _lines(rows: int, x_stride: int, y_stride: int) -> Geometry:
    """The rows of x and y as two lines of pixels."""
    phase = cpp_window.Phase((rows,), 0, (((0,), 0),))
    return cpp_window.geometry(1, (rows,), (1,), (phase,), (0, x_stride), (0, y_stride))
