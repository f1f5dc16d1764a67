"""Dead and uniform heads on the CPU, where what comes out is an average of values: forward and gradients, in C++.

Time grows with the length, not with its square, and every operand is read once.
"""

import ctypes
import functools
import math
import warnings

import torch
from torch import Tensor

from . import build, cpp_averages, cpp_vectors, isa
from .build import KernelBuildError


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Builds what the functions here need for operands of this type; None where there is none, or the build fails.

    A failed build warns once.
    """
    if str(dtype) not in cpp_vectors.SCALARS:
        return None
    target = isa.current()
    name = f"averages_{str(dtype).removeprefix('torch.')}_{target.name}"
    try:
        built = build.load(name, cpp_averages.source(target, dtype), target.flags)
    except KernelBuildError as error:
        warnings.warn(
            f"ctrlcompile computes attention's weights where averages would do: {error}", RuntimeWarning, stacklevel=2
        )
        return None
    tensors, number = ctypes.c_void_p, ctypes.c_int
    built.forward.argtypes = [tensors] * 5 + [number]
    built.backward.argtypes = [tensors] * 10 + [ctypes.c_float, number]
    built.forward.restype = built.backward.restype = None
    return built


def forward(value: Tensor, out: Tensor, kinds: Tensor, is_causal: bool) -> None:
    """Writes the averages of the values `[N, heads, S, E]` that each query sees to out `[N, heads, L, E]`.

    Of dead and uniform heads, as kinds `[heads]` has them. All operands here have a unit stride along E and are of a
    type that has a library. In causal attention query i sees the values up to i, and else all, as in dead heads.
    """
    tensors = (value, out)
    _library(value).forward(
        _sizes(out, value, is_causal), kinds.data_ptr(), *_pointers(tensors), _strides(tensors),
        torch.get_num_threads(),
    )  # fmt: skip


def backward(
    grad: Tensor, query: Tensor, value: Tensor, out: Tensor, gradients: tuple[Tensor, Tensor, Tensor], kinds: Tensor,
    is_causal: bool, scale: float | None,
) -> None:  # fmt: skip
    """Writes the gradients of queries, keys and values: of dead heads zero, of uniform heads those of attention.

    grad, query and out `[N, heads, L, E]`, value `[N, heads, S, E]`; scale as in `scaled_dot_product_attention`.
    """
    tensors = (grad, query, value, out, *gradients)
    _library(value).backward(
        _sizes(out, value, is_causal), kinds.data_ptr(), *_pointers(tensors), _strides(tensors),
        1 / math.sqrt(query.shape[3]) if scale is None else scale, torch.get_num_threads(),
    )  # fmt: skip


def _library(value: Tensor) -> ctypes.CDLL:
    built = library(value.dtype)
    assert built is not None
    return built


def _sizes(out: Tensor, value: Tensor, is_causal: bool) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * 6)(*out.shape[:3], *value.shape[2:], is_causal)


def _pointers(tensors: tuple[Tensor, ...]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _strides(tensors: tuple[Tensor, ...]) -> "ctypes.Array[ctypes.c_int64]":
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(strides))(*strides)
