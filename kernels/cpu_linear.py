"""Block-sparse linear on the CPU: forward, input gradient and weight gradient that skip masked blocks.

Kernels are C++, generated and compiled for a block shape, types, activation and instruction set, and kept for the
process; the mask, the shapes and the number of threads (`torch.get_num_threads()`) are data. The first call with a
specialisation takes about a second, or a millisecond when it is in the cache on disk. All are safe to call from several
threads.

Every function may raise `KernelBuildError`, of which `build` tells more.
"""

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build, cpp_rows, cpp_wgrad, isa
from .build import KernelBuildError as KernelBuildError
from .index_lists import BlockLists

Block = tuple[int, int]

_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
_PACKED_BYTES = 4 << 20  # of one chunk's panels in the weight gradient, to be read from the last-level cache


def supported(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block) -> str | None:
    """None where the kernels can run, else the reason, in a user's words."""
    if (x_dtype, weight_dtype) not in _DTYPES:
        return f"no CPU kernel for {x_dtype} inputs with a {weight_dtype} weight"
    if any(side % 8 or not 8 <= side <= 128 for side in block):
        return f"block sides must be multiples of 8 from 8 to 128, not {block[0]}x{block[1]}"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str
) -> tuple[Tensor, Tensor]:
    """`y = activation(z)`, `z = x @ weight.T + bias` over the active blocks, as `reference.linear` has it.

    x `[M, K]` with a unit stride along K, weight `[N, K]`, bias `[N]` or None. Returns y `[M, N]` in x's dtype and, for
    the gelu activations, z likewise; for the others, whose derivative is known from y, z is empty.
    """
    library = _rows_library(block, True, x.dtype, weight.dtype, activation, isa.current())
    y = x.new_empty(x.shape[0], weight.shape[0])
    z = torch.empty_like(y) if activation.startswith("gelu") else x.new_empty(0)
    _run_rows(library, x, weight, bias, (lists.crow_indices, lists.col_indices, lists.row_order), y, z)
    return y, z


def dgrad(grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block) -> Tensor:
    """Gradient with respect to the input, `reference.linear_dgrad`: grad_z `[M, N]`, weight `[N, K]` -> `[M, K]`."""
    library = _rows_library((block[1], block[0]), False, grad_z.dtype, weight.dtype, "none", isa.current())
    grad_x = grad_z.new_empty(grad_z.shape[0], weight.shape[1])
    by_columns = lists.ccol_indices, lists.row_indices, lists.column_order
    _run_rows(library, grad_z, weight, None, by_columns, grad_x, grad_z.new_empty(0))
    return grad_x


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Gradient with respect to the weight and the signals of its blocks, as `reference.linear_wgrad` has them.

    grad_z `[M, N]`, x `[M, K]`, weight `[N, K]`, probes int32 `[P]` (flat ids of inactive blocks, padded with -1) ->
    grad_weight `[N, K]` in the weight's dtype, signals float32 `[2, R, C]`.
    """
    library = _wgrad_library(block, x.dtype, weight.dtype, isa.current())
    (rows, k), n = x.shape, weight.shape[0]
    weight = _unit_stride(weight)
    grad_weight = torch.empty(n, k, dtype=weight.dtype)
    signals = torch.empty(2, *lists.grid)
    chunk = max(128, min(_PACKED_BYTES // (4 * (n + k)), 512))  # so that a strip's panels stay in the nearer caches
    scratch = _scratch(library.scratch_bytes(rows, n, k, probes.numel(), chunk))
    library.run(
        grad_z.data_ptr(), grad_z.stride(0), x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        lists.crow_indices.data_ptr(), lists.col_indices.data_ptr(), probes.data_ptr(), probes.numel(),
        grad_weight.data_ptr(), signals.data_ptr(), rows, n, k, chunk, torch.get_num_threads(), scratch.data_ptr(),
    )  # fmt: skip
    return grad_weight, signals


def sources(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block, activation: str) -> dict[str, Path]:
    """The generated C++ of the forward, dgrad and wgrad kernels for these types; built where they are not yet."""
    target = isa.current()
    libraries = {
        "forward": _rows_library(block, True, x_dtype, weight_dtype, activation, target),
        "dgrad": _rows_library((block[1], block[0]), False, x_dtype, weight_dtype, "none", target),
        "wgrad": _wgrad_library(block, x_dtype, weight_dtype, target),
    }
    return {role: Path(library._name).with_suffix(".cpp") for role, library in libraries.items()}


def _run_rows(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, lists: tuple[Tensor, ...], y: Tensor,
    z: Tensor,
) -> None:  # fmt: skip
    rows, inputs = x.shape
    if rows == 0:
        return
    weight = _unit_stride(weight)
    bias = None if bias is None else bias.float().contiguous()
    threads = torch.get_num_threads()
    tile = max(24, min(_second_level_bytes() // 2 // (4 * inputs), 192))
    scratch = _scratch(library.scratch_bytes(rows, y.shape[1], inputs, tile, threads))
    library.run(
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), None if bias is None else bias.data_ptr(),
        *(part.data_ptr() for part in lists), y.data_ptr(), z.data_ptr(), rows, y.shape[1], inputs, tile, threads,
        scratch.data_ptr(),
    )  # fmt: skip


def _unit_stride(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


@functools.cache
def _rows_library(
    block: Block, transposed: bool, x_dtype: torch.dtype, weight_dtype: torch.dtype, activation: str, target: isa.Isa
) -> ctypes.CDLL:
    source = cpp_rows.source(target, *block, transposed, x_dtype, weight_dtype, activation)
    role = f"forward_{activation}" if transposed else "dgrad"
    library = build.load(_name(role, block, x_dtype, weight_dtype, target), source, target.flags)
    return _declare(library, "p l p l p p p p p p l l l l i p", "l l l l i")


@functools.cache
def _wgrad_library(block: Block, x_dtype: torch.dtype, weight_dtype: torch.dtype, target: isa.Isa) -> ctypes.CDLL:
    source = cpp_wgrad.source(target, block, x_dtype, weight_dtype)
    library = build.load(_name("wgrad", block, x_dtype, weight_dtype, target), source, target.flags)
    return _declare(library, "p l p l p l p p p l p p l l l l i p", "l l l l l")


def _name(role: str, block: Block, x_dtype: torch.dtype, weight_dtype: torch.dtype, target: isa.Isa) -> str:
    types = "_".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (x_dtype, weight_dtype)))
    return f"linear_{role}_{block[0]}x{block[1]}_{types}_{target.name}"


def _declare(library: ctypes.CDLL, run: str, scratch_bytes: str) -> ctypes.CDLL:
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int}
    library.run.argtypes = [kinds[kind] for kind in run.split()]
    library.run.restype = None
    library.scratch_bytes.argtypes = [kinds[kind] for kind in scratch_bytes.split()]
    library.scratch_bytes.restype = ctypes.c_int64
    return library


_held = threading.local()


def _scratch(size: int) -> Tensor:
    """Memory that the calling thread keeps for all kernels: fresh pages at every call would cost as much as packing.

    Grows to the largest need, as an upper bound for a dense mask; what is not touched is not backed by memory.
    """
    scratch: Tensor | None = getattr(_held, "scratch", None)
    if scratch is None or scratch.numel() < size:
        _held.scratch = None  # the old one goes before the new one comes
        _held.scratch = scratch = torch.empty(size, dtype=torch.uint8)
    return scratch


@functools.cache
def _second_level_bytes() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 512 * 1024
