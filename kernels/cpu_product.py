"""Runs the generated C++ for linears and convolutions: builds what a call needs, and gives it memory to work in.

Kernels are generated and compiled for a block shape, types, activation and instruction set, and kept for the process;
the mask, the shapes, the window and the number of threads (`torch.get_num_threads()`) are data. The first call with a
specialisation takes one or two seconds, or a millisecond when it is in the cache on disk. All are safe to call from
several threads.

Every function that builds may raise `KernelBuildError`, of which `build` tells more.
"""

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build, cpp_rows, cpp_wgrad, isa
from .cpp_window import Geometry as Geometry
from .index_lists import Block, BlockLists
from .reference import Before, backward

_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
_PANEL_BYTES = 32 << 10  # of the two panels of a block in the weight gradient, to be read from the first-level cache


def supported(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block) -> str | None:
    """None where the kernels can run, else the reason, in a user's words."""
    if (x_dtype, weight_dtype) not in _DTYPES:
        return f"no CPU kernel for {x_dtype} inputs with a {weight_dtype} weight"
    if any(side % 8 or not 8 <= side <= 128 for side in block):
        return f"block sides must be multiples of 8 from 8 to 128, not {block[0]}x{block[1]}"
    return None


def rows(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, lists: tuple[Tensor, ...], y: Tensor, z: Tensor,
    block: Block, activation: str = "none", groups: int = 1, shared: bool = False, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, and z where the activation needs it: a sum over the listed blocks for each block of outputs.

    Of an activation's backward pass (`reference.backward`) z is read, not written, and `sums` is set. z lies in memory
    as y does. `geometry` says where the rows of y and their inputs lie (`cpp_window.geometry`); `lists` are the
    offsets, indices and order of the blocks of `block`, `(outputs, inputs)`, that each block of outputs sums over. The
    weight is `[groups * outputs, inputs, taps]`, each list names inputs of its own group; or, where `shared`,
    `[outputs, groups * inputs, taps]`, and a list serves the block at its place in every group. A linear's has no taps.
    """
    outputs, inputs = weight.shape[:2]
    outputs, inputs = (outputs, inputs // groups) if shared else (outputs // groups, inputs)
    library = _rows_library(block, x.dtype, weight.dtype, activation, isa.current(x.dtype))
    bias = None if bias is None else bias.float().contiguous()
    plan = _second_level_bytes() // 2, _first_level_ways(), torch.get_num_threads()
    scratch = _scratch(_scratch_bytes(library, geometry, groups, outputs, inputs, *plan))
    library.run(
        geometry.address, x.data_ptr(), weight.data_ptr(), *_strides(weight), None if bias is None else bias.data_ptr(),
        *(part.data_ptr() for part in lists), y.data_ptr(), z.data_ptr(), None if sums is None else sums.data_ptr(),
        groups, outputs, inputs, shared, *plan, scratch.data_ptr(),
    )  # fmt: skip


def gradient_rows(
    geometry: Geometry, grad_z: Tensor, weight: Tensor, lists: tuple[Tensor, ...], grad_x: Tensor,
    before: Before | None, block: Block, groups: int = 1, shared: bool = False,
) -> None:  # fmt: skip
    """As `rows`, of an input gradient: of what is `before` the input where that is given."""
    if before is None:
        rows(geometry, grad_z, weight, None, lists, grad_x, grad_x, block, "none", groups, shared)
    else:
        last = backward(before.activation)
        rows(geometry, grad_z, weight, None, lists, grad_x, before.z, block, last, groups, shared, before.sums)


def wgrad(
    geometry: Geometry, grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor,
    grad_weight: Tensor, signals: Tensor, block: Block, groups: int = 1,
) -> None:  # fmt: skip
    """Writes the gradient of a weight `[groups * outputs, inputs, taps]`, contiguous, and signals `[2, R, C]`.

    `geometry` is as for `rows`.
    """
    library = _wgrad_library(block, x.dtype, weight.dtype, isa.current(x.dtype))
    n, k = grad_weight.shape[:2]
    entries = int(lists.crow_indices[-1]) + probes.numel()
    plan = groups, n, k, entries, _PANEL_BYTES, _second_level_bytes() * 3 // 4, torch.get_num_threads()
    scratch = _scratch(library.scratch_bytes(geometry.address, *plan))
    library.run(
        geometry.address, grad_z.data_ptr(), x.data_ptr(), weight.data_ptr(), *_strides(weight),
        lists.crow_indices.data_ptr(), lists.col_indices.data_ptr(), lists.ccol_indices.data_ptr(),
        lists.row_indices.data_ptr(), probes.data_ptr(), probes.numel(),
        grad_weight.data_ptr(), signals.data_ptr(), *plan, scratch.data_ptr(),
    )  # fmt: skip


def build_rows(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block, activation: str) -> None:
    """Builds what `rows` needs for these types and this block, so that no call of it has to."""
    _rows_library(block, x_dtype, weight_dtype, activation, isa.current(x_dtype))


def sources(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block, activation: str) -> dict[str, Path]:
    """The generated C++ of the forward, dgrad and wgrad kernels for these types; built where they are not yet."""
    target = isa.current(x_dtype)
    libraries = {
        "forward": _rows_library(block, x_dtype, weight_dtype, activation, target),
        "dgrad": _rows_library((block[1], block[0]), x_dtype, weight_dtype, "none", target),
        "wgrad": _wgrad_library(block, x_dtype, weight_dtype, target),
    }
    return {role: Path(library._name).with_suffix(".cpp") for role, library in libraries.items()}


@functools.cache
def _rows_library(
    block: Block, x_dtype: torch.dtype, weight_dtype: torch.dtype, activation: str, target: isa.Isa
) -> ctypes.CDLL:
    source = cpp_rows.source(target, *block, x_dtype, weight_dtype, activation)
    library = build.load(_name(f"rows_{activation}", block, x_dtype, weight_dtype, target), source, target.flags)
    return _declare(library, "p p p l l l p p p p p p p l l l i l i i p", "p l l l l i i")


@functools.cache
def _wgrad_library(block: Block, x_dtype: torch.dtype, weight_dtype: torch.dtype, target: isa.Isa) -> ctypes.CDLL:
    source = cpp_wgrad.source(target, block, x_dtype, weight_dtype)
    library = build.load(_name("wgrad", block, x_dtype, weight_dtype, target), source, target.flags)
    return _declare(library, "p p p p l l l p p p p p l p p l l l l l l i p", "p l l l l l l i")


def _name(role: str, block: Block, x_dtype: torch.dtype, weight_dtype: torch.dtype, target: isa.Isa) -> str:
    types = "_".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (x_dtype, weight_dtype)))
    return f"{role}_{block[0]}x{block[1]}_{types}_{target.name}"


def _declare(library: ctypes.CDLL, run: str, scratch_bytes: str) -> ctypes.CDLL:
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int}
    library.run.argtypes = [kinds[kind] for kind in run.split()]
    library.run.restype = None
    library.scratch_bytes.argtypes = [kinds[kind] for kind in scratch_bytes.split()]
    library.scratch_bytes.restype = ctypes.c_int64
    return library


@functools.lru_cache(maxsize=1024)
def _scratch_bytes(library: ctypes.CDLL, geometry: Geometry, *plan: int) -> int:
    return int(library.scratch_bytes(geometry.address, *plan))


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Along outputs, inputs and taps."""
    return (*weight.stride(), 1)[:3]


_held = threading.local()


def _scratch(size: int) -> Tensor:
    """Memory that the calling thread keeps for all kernels: fresh pages at every call would cost as much as packing.

    Grows to the largest need, as an upper bound for a dense mask; what is not touched is not backed by memory.
    """
    scratch: Tensor | None = getattr(_held, "scratch", None)
    if scratch is None or scratch.numel() < size:
        _held.scratch = None  # the old one goes before the new one comes
        _held.scratch = scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    return scratch


@functools.cache
def _second_level_bytes() -> int:
    return _of_cache(2, "size", 512) * 1024


@functools.cache
def _first_level_ways() -> int:
    return _of_cache(0, "ways_of_associativity", 8)


def _of_cache(index: int, what: str, otherwise: int) -> int:
    """What Linux says of a cache: 0 is the first level's for data, 2 the second level's."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/{what}").read_text().strip()
        return int(text.removesuffix("K"))
    except (OSError, ValueError):
        return otherwise
