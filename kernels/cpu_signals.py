"""What of a dense weight gradient is the gate's, with its signals: on a CPU in one walk, in C++."""

import ctypes
import functools

import torch
from torch import Tensor

from . import build, cpp_signals, cpp_vectors, index_lists, isa, reference
from .build import KernelBuildError
from .index_lists import Block, BlockLists


def gate_gradient(
    gradient: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """`reference.gate_gradient` of a gradient `[N, K]` that may be overwritten: grad_weight `[N, K]`, signals.

    Of what has no C++ (another device, another type, a compiler that fails) by the reference itself.
    """
    library = _library(gradient.dtype, weight.dtype) if gradient.device.type == "cpu" else None
    if library is None or not gradient.numel():
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # squares do not fit a half type
        return reference.gate_gradient(wide, weight, index_lists.mask_of(lists), probes, block)
    gradient, weight = gradient.contiguous(), weight.contiguous()
    out = gradient if gradient.dtype == weight.dtype else torch.empty_like(weight)
    signals = weight.new_empty(2, *lists.grid, dtype=torch.float32)
    library.run(
        gradient.data_ptr(), weight.data_ptr(), out.data_ptr(), *weight.shape, *block, lists.crow_indices.data_ptr(),
        lists.col_indices.data_ptr(), probes.data_ptr(), probes.numel(), signals.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, signals


@functools.cache
def _library(gradient_dtype: torch.dtype, weight_dtype: torch.dtype) -> ctypes.CDLL | None:
    if not {str(gradient_dtype), str(weight_dtype)} <= cpp_vectors.SCALARS.keys():
        return None
    target = isa.current()
    types = "_".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (gradient_dtype, weight_dtype)))
    try:
        built = build.load(
            f"signals_{types}_{target.name}", cpp_signals.source(target, gradient_dtype, weight_dtype), target.flags
        )
    except KernelBuildError:  # whoever computes densely for this reason has been told, and the reference is right
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    built.run.argtypes = [pointer] * 3 + [number] * 4 + [pointer] * 3 + [number, pointer, ctypes.c_int]
    built.run.restype = None
    return built
