"""Block-sparse linear on an NVIDIA GPU: forward, input gradient and weight gradient that skip masked blocks.

Kernels are Triton, generated for a block shape, type and activation, and compiled by Triton when they first run; which
tile they work in is measured once per device and shape (`triton_tune`). The mask and the number of rows are data: index
lists are read on the device only, so that calls can be captured in a CUDA graph and replayed after a mask update.

All tensors lie on one device: a CUDA device, or the CPU under Triton's interpreter (`TRITON_INTERPRET=1`). Every
function may raise `KernelBuildError`.
"""

import functools
import importlib.util
import re

import torch
from torch import Tensor

from . import triton_launch, triton_rows, triton_tune
from .build import KernelBuildError as KernelBuildError
from .index_lists import Block, BlockLists
from .reference import Before, backward
from .triton_rows import Rows
from .triton_wgrad import Wgrad

_FIRST_VERSION = (3, 6)
_FIRST_CAPABILITY = (8, 0)


def supported(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block, device: torch.device | None = None
) -> str | None:
    """None where the kernels can run, else the reason, in a user's words."""
    missing = _missing()
    if missing:
        return missing
    if device is not None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FIRST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0"
    if x_dtype not in triton_rows.DTYPES or x_dtype != weight_dtype:
        return f"no Triton kernel for {x_dtype} inputs with a {weight_dtype} weight"
    if any(side % 16 or not 16 <= side <= 128 for side in block):
        return f"block sides must be multiples of 16 from 16 to 128, not {block[0]}x{block[1]}"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, `z = x @ weight.T + bias` over the active blocks, as `reference.linear` has it.

    x `[M, K]` with a unit stride along K, weight `[N, K]` in x's dtype, bias `[N]` of any floating dtype or None.
    Returns y `[M, N]` in x's dtype and, for the gelu activations, z likewise; for the others, whose derivative is known
    from y, z is empty.
    """
    kernel = _forward_kernel(x.dtype, block, weight.shape[1], activation, bias is not None)
    y = x.new_empty(x.shape[0], weight.shape[0])
    z = torch.empty_like(y) if kernel.keeps_z else x.new_empty(0)
    order = (lists.crow_indices, lists.col_indices, lists.row_order)
    _rows(kernel, x, weight, bias, order, y, z)
    return y, z


def dgrad(grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, before: Before | None = None) -> Tensor:
    """Gradient with respect to the input, `reference.linear_dgrad`: grad_z `[M, N]`, weight `[N, K]` -> `[M, K]`.

    Or to what is before it, whose z is contiguous.
    """
    last = "none" if before is None else backward(before.activation)
    kernel = _dgrad_kernel(grad_z.dtype, block, weight.shape[0], last)
    grad_x = grad_z.new_empty(grad_z.shape[0], weight.shape[1])
    order = (lists.ccol_indices, lists.row_indices, lists.column_order)
    _rows(kernel, grad_z, weight, None, order, grad_x, grad_x if before is None else before.z)
    if before is not None:
        before.set_sums(grad_x)
    return grad_x


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight and the signals of its blocks, as `reference.linear_wgrad` has them.

    grad_z `[M, N]`, x `[M, K]`, weight `[N, K]`, probes int32 `[P]` (flat ids of inactive blocks, padded with -1) ->
    grad_weight `[N, K]` in the weight's dtype, signals float32 `[2, R, C]`.
    """
    kernel = Wgrad(*block, x.dtype, _precision(x.dtype))
    grad_z, x, weight = (triton_launch.readable(matrix) for matrix in (grad_z, x, weight))
    m, (outputs, inputs) = x.shape[0], weight.shape
    tile = triton_tune.choose(kernel, m, outputs, inputs, triton_launch.aligned(grad_z, x), x.device)
    return triton_launch.run_wgrad(kernel, tile, grad_z, x, weight, lists, probes)


def crossover(role: str, dtype: torch.dtype, block: Block, m: int, n: int, k: int, device: torch.device) -> float:
    """The density, 0 to 1, above which the framework's dense product is faster than ours: measured once per device.

    `role` is forward, dgrad or wgrad, of x `[m, k]` and a weight `[n, k]`. 1, never, where nothing can be timed; see
    `triton_tune`. Raises ValueError for another role.
    """
    if role == "forward":
        return triton_tune.crossover(_forward_kernel(dtype, block, k, "none", False), m, n, k, device)
    if role == "dgrad":
        return triton_tune.crossover(_dgrad_kernel(dtype, block, n), m, k, n, device)
    if role == "wgrad":
        return triton_tune.crossover(Wgrad(*block, dtype, _precision(dtype)), m, n, k, device)
    raise ValueError(f"unknown role {role!r}; allowed are forward, dgrad and wgrad")


def _forward_kernel(dtype: torch.dtype, block: Block, k: int, activation: str, bias: bool) -> Rows:
    return Rows(*block, True, dtype, activation, bias, k % block[1] != 0, _precision(dtype))


def _dgrad_kernel(dtype: torch.dtype, block: Block, n: int, last: str = "none") -> Rows:
    return Rows(*block[::-1], False, dtype, last, partial=n % block[0] != 0, precision=_precision(dtype))


def _rows(
    kernel: Rows, x: Tensor, weight: Tensor, bias: Tensor | None, lists: triton_launch.Lists, y: Tensor, z: Tensor
) -> None:
    x, weight = triton_launch.readable(x), triton_launch.readable(weight)
    aligned = triton_launch.aligned(x, weight)
    tile = triton_tune.choose(kernel, x.shape[0], y.shape[1], x.shape[1], aligned, x.device)
    triton_launch.run_rows(kernel, tile, x, weight, bias, lists, y, z)


@functools.cache
def _missing() -> str | None:
    """Why there is no Triton to run on, if so."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    import triton

    version = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    if version < _FIRST_VERSION:
        return (
            f"Triton {triton.__version__} is too old: the kernels need {_FIRST_VERSION[0]}.{_FIRST_VERSION[1]} or newer"
        )
    return None


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are taken: as torch's own setting for matrix products says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
