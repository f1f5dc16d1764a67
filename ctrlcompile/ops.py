"""The gated linear as PyTorch operators: schemas, shapes, autograd, autocast and FLOP formulas.

`ctrlprune::linear` takes the weight as it is and the gate's tensors beside it. Its backward is two more operators, so
that Inductor schedules the input gradient and the weight gradient like any matrix product. What wgrad finds out about
each block leaves the graph as the *gradient of `signals`*: for the first channel that is what it is, the derivative of
the loss with respect to a gate that multiplies the block, and autograd adds it up over micro-batches.

Which kernel computes a call is `kernel_choice`'s part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ctrlcompile import kernel_choice
from ctrlcompile.calls import visible
from ctrlcompile.kernels import index_lists, reference
from ctrlcompile.kernels.index_lists import BlockLists, expand, grid_shape, mask_of

ACTIVATIONS = reference.ACTIVATIONS

_library = torch.library.Library("ctrlprune", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor signals, Tensor[] lists, Tensor probes, "
    "int block_out, int block_in, str activation) -> (Tensor y, Tensor z)"
)
_library.define("linear_dgrad(Tensor grad, Tensor weight, Tensor[] lists, int block_out, int block_in) -> Tensor")
_library.define(
    "linear_wgrad(Tensor grad, Tensor x, Tensor weight, Tensor[] lists, Tensor probes, "
    "int block_out, int block_in) -> (Tensor grad_weight, Tensor signals)"
)

linear = torch.ops.ctrlprune.linear
linear_dgrad = torch.ops.ctrlprune.linear_dgrad
linear_wgrad = torch.ops.ctrlprune.linear_wgrad


# What runs ------------------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, signals: Tensor, tensors: Sequence[Tensor], probes: Tensor,
    block_out: int, block_in: int, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    _check(x, weight.shape[1], weight)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {ACTIVATIONS}; got {activation!r}")
    rows = _rows(x)
    y, z = kernel_choice.forward(rows, weight, bias, lists, block, activation)
    shape = (*x.shape[:-1], weight.shape[0])
    return y.view(shape), z.view(shape) if saves_z(activation) else x.new_empty(0)


def _linear_dgrad(grad: Tensor, weight: Tensor, tensors: Sequence[Tensor], block_out: int, block_in: int) -> Tensor:
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    _check(grad, weight.shape[0], weight)
    grad_x = kernel_choice.dgrad(_rows(grad), weight, lists, block)
    return grad_x.view(*grad.shape[:-1], weight.shape[1])


def _linear_wgrad(
    grad: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor], probes: Tensor, block_out: int, block_in: int
) -> tuple[Tensor, Tensor]:
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    _check(grad, weight.shape[0], weight)
    _check(x, weight.shape[1], weight)
    if grad.numel() // grad.shape[-1] != x.numel() // x.shape[-1]:
        raise ValueError(f"grad of shape {tuple(grad.shape)} and x of shape {tuple(x.shape)} have unequal rows")
    return kernel_choice.wgrad(_rows(grad), _rows(x), weight, lists, probes, block)


# Kernels trust their pointers, so what does not fit is refused here.
def _check(x: Tensor, features: int, weight: Tensor) -> None:
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != features:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a weight of {tuple(weight.shape)}")


def _lists(tensors: Sequence[Tensor], weight: Tensor, block: tuple[int, int]) -> BlockLists:
    rows, columns = grid_shape((weight.shape[0], weight.shape[1]), block)
    capacities = index_lists.capacities(rows, columns)
    if len(tensors) != len(capacities):
        raise ValueError(f"index lists are {', '.join(capacities._fields)}; got {len(tensors)} tensors")
    lists = BlockLists(*tensors)
    for name, tensor, capacity in zip(lists._fields, lists, capacities, strict=True):
        if tensor.dtype != torch.int32 or tensor.numel() != capacity or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is a contiguous int32 tensor of {capacity} entries for a weight of {tuple(weight.shape)} in "
                f"blocks of {block}; got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    return lists


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def saves_z(activation: str) -> bool:
    """Whether backward needs the value before the activation (relu's can be read off its output)."""
    return activation.startswith("gelu")


# Shapes ---------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("ctrlprune::linear", lib=_library)
def _(x, weight, bias, signals, lists, probes, block_out, block_in, activation):  # type: ignore[no-untyped-def]
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x has {x.shape[-1]} features, the weight {weight.shape[1]}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {ACTIVATIONS}; got {activation!r}")
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if saves_z(activation) else x.new_empty(0)


@torch.library.register_fake("ctrlprune::linear_dgrad", lib=_library)
def _(grad, weight, lists, block_out, block_in):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


@torch.library.register_fake("ctrlprune::linear_wgrad", lib=_library)
def _(grad, x, weight, lists, probes, block_out, block_in):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape), weight.new_empty((2, *BlockLists(*lists).grid), dtype=torch.float32)


# Autograd -------------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, lists, probes, block_out, block_in, activation = inputs
    y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.block, ctx.activation, ctx.has_bias = (block_out, block_in), activation, bias is not None
    ctx.bias_dtype, ctx.lists = None if bias is None else bias.dtype, len(lists)
    kept = {"none": (), "relu": (y,)}.get(activation, (z,))
    ctx.save_for_backward(x, weight, probes, *lists, *kept)


def _backward(ctx: Any, grad_y: Tensor | None, _grad_z: None) -> tuple[Any, ...]:
    unused = ([None] * ctx.lists, None, None, None, None)
    if grad_y is None:
        return (None, None, None, None, *unused)
    x, weight, probes, *rest = ctx.saved_tensors
    lists, kept = rest[: ctx.lists], rest[ctx.lists :]
    if ctx.activation == "none":
        grad = grad_y
    elif ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad_y, kept[0], 0)
    else:
        approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
        grad = torch.ops.aten.gelu_backward(grad_y, kept[0], approximate=approximate)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = linear_dgrad(grad, weight, lists, *ctx.block) if needs_x else None
    grad_weight = grad_signals = grad_bias = None
    if needs_weight:
        grad_weight, grad_signals = linear_wgrad(grad, x, weight, lists, probes, *ctx.block)
    if needs_bias:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype)
    return (grad_x, grad_weight, grad_bias, grad_signals, *unused)


torch.library.register_autograd("ctrlprune::linear", _backward, setup_context=_setup_context, lib=_library)


def _autocast(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    # On the CPU the input is cast and the weight is not: the kernels round its live blocks when they pack them, and the
    # weight's gradient comes out in the weight's own type. Tensor cores read the weight as it lies in memory.
    def cast(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
            weight = weight if device == "cpu" else weight.to(x.dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return linear(x, weight, *rest)

    return cast


for _implementation, _op in ((_linear, "linear"), (_linear_dgrad, "linear_dgrad"), (_linear_wgrad, "linear_wgrad")):
    for _key in ("CPU", "CUDA"):
        _library.impl(_op, visible(_op, _implementation), _key)
_library.impl("linear", _autocast("cpu"), "AutocastCPU")
_library.impl("linear", _autocast("cuda"), "AutocastCUDA")


# FLOP formulas: what is computed, so active blocks only; 2 per multiply-add -------------------------------------------


def _product_flops(x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor | None, block: tuple[int, int]) -> int:
    entries = weight.numel()
    if not isinstance(lists.crow_indices, FakeTensor):  # a graph without data: every block counts
        computed = mask_of(lists)
        if probes is not None:
            computed.view(-1)[probes[probes >= 0].long()] = True
        entries = int(expand(computed, block, (weight.shape[0], weight.shape[1])).sum())
    return 2 * (x.numel() // x.shape[-1]) * entries


@register_flop_formula(linear, get_raw=True)
def _(x, weight, bias, signals, lists, probes, block_out, block_in, activation, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(x, weight, BlockLists(*lists), None, (block_out, block_in))


@register_flop_formula(linear_dgrad, get_raw=True)
def _(grad, weight, lists, block_out, block_in, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(grad, weight, BlockLists(*lists), None, (block_out, block_in))


@register_flop_formula(linear_wgrad, get_raw=True)
def _(grad, x, weight, lists, probes, block_out, block_in, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(x, weight, BlockLists(*lists), probes, (block_out, block_in))
