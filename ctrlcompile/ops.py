"""Gated linears, matmuls and convolutions as PyTorch operators: schemas, shapes, autograd, autocast, FLOP formulas.

`ctrlprune::linear`, `ctrlprune::matmul` (`x @ weight`, for a weight stored [in, out]) and `ctrlprune::conv` take the
weight as it is and the gate's tensors beside it. The backward of each is two more operators, so that Inductor schedules
the input gradient and the weight gradient like any product. What wgrad finds out about each block leaves the graph as
the *gradient of `signals`*: for the first channel that is what it is, the derivative of the loss with respect to a gate
that multiplies the block, and autograd adds it up over micro-batches.

The sides of a block are arguments in the order of the weight's dimensions. What runs is in `op_calls`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from ctrlcompile import op_calls
from ctrlcompile.calls import visible
from ctrlcompile.kernels.attention import LIVE
from ctrlcompile.kernels.index_lists import BlockLists, expand, mask_of, matrix_block, matrix_shape
from ctrlcompile.kernels.reference import channel_sums
from ctrlcompile.kernels.window import Window, channels_last

_library = torch.library.Library("ctrlprune", "DEF")
_LISTS = "Tensor[] lists, Tensor probes"
_GATED = f"{_LISTS}, int block_out, int block_in"
_TRANSPOSED = f"{_LISTS}, int block_in, int block_out"
# Of the layer whose output the input is: the gradient is z's, and `sums` [K] what it adds up to, else empty.
_BEFORE = 'Tensor? z=None, str activation="none"'
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"
_library.define(
    f"linear(Tensor x, Tensor weight, Tensor? bias, Tensor signals, {_GATED}, str activation) -> (Tensor y, Tensor z)"
)
_library.define(
    f"linear_dgrad(Tensor grad, Tensor weight, Tensor[] lists, int block_out, int block_in, {_BEFORE})"
    " -> (Tensor grad_x, Tensor sums)"
)
_library.define(f"linear_wgrad(Tensor grad, Tensor x, Tensor weight, {_GATED}) -> (Tensor grad_weight, Tensor signals)")
_library.define(f"matmul(Tensor x, Tensor weight, Tensor signals, {_TRANSPOSED}) -> Tensor")
_library.define("matmul_dgrad(Tensor grad, Tensor weight, Tensor[] lists, int block_in, int block_out) -> Tensor")
_library.define(
    f"matmul_wgrad(Tensor grad, Tensor x, Tensor weight, {_TRANSPOSED}) -> (Tensor grad_weight, Tensor signals)"
)
# An image is [N, channels, *size]; padding holds what goes before and after each dimension in turn.
_library.define(
    f"conv(Tensor x, Tensor weight, Tensor? bias, Tensor signals, {_GATED}, str activation, {_WINDOW})"
    " -> (Tensor y, Tensor z)"
)
_library.define(
    "conv_dgrad(Tensor grad, Tensor weight, Tensor[] lists, int block_out, int block_in, SymInt[] input_size, "
    f"{_WINDOW}, {_BEFORE}) -> (Tensor grad_x, Tensor sums)"
)
_library.define(
    f"conv_wgrad(Tensor grad, Tensor x, Tensor weight, {_GATED}, {_WINDOW}) -> (Tensor grad_weight, Tensor signals)"
)
_HEADS = "Tensor kinds, bool is_causal, float? scale"  # kinds: one for each head, see `kernels.attention`
_library.define(f"attention(Tensor query, Tensor key, Tensor value, {_HEADS}) -> (Tensor out, Tensor sums)")
_library.define(
    f"attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor sums, {_HEADS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
# channels: the dimension that `sums` are along
_library.define(
    "activation_backward(Tensor grad, Tensor z, str activation, int channels) -> (Tensor grad_z, Tensor sums)"
)

linear = torch.ops.ctrlprune.linear
linear_dgrad = torch.ops.ctrlprune.linear_dgrad
linear_wgrad = torch.ops.ctrlprune.linear_wgrad
matmul = torch.ops.ctrlprune.matmul
matmul_dgrad = torch.ops.ctrlprune.matmul_dgrad
matmul_wgrad = torch.ops.ctrlprune.matmul_wgrad
conv = torch.ops.ctrlprune.conv
conv_dgrad = torch.ops.ctrlprune.conv_dgrad
conv_wgrad = torch.ops.ctrlprune.conv_wgrad
activation_backward = torch.ops.ctrlprune.activation_backward
attention = torch.ops.ctrlprune.attention
attention_backward = torch.ops.ctrlprune.attention_backward

ACTIVATIONS = op_calls.ACTIVATIONS
ACTIVATION_POSITION = 8  # among the arguments of linear and of conv


def activation_of(call: fx.Node) -> str | None:
    """The activation that a node of a gated layer computes; None for any other node."""
    if call.target not in (linear.default, conv.default):
        return None
    activation = call.args[ACTIVATION_POSITION]
    assert isinstance(activation, str)
    return activation


# Shapes ---------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("ctrlprune::linear", lib=_library)
def _(x, weight, bias, signals, lists, probes, block_out, block_in, activation):  # type: ignore[no-untyped-def]
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x has {x.shape[-1]} features, the weight {weight.shape[1]}")
    op_calls.check_activation(activation)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if op_calls.saves_z(activation) else x.new_empty(0)


@torch.library.register_fake("ctrlprune::linear_dgrad", lib=_library)
def _(grad, weight, lists, block_out, block_in, z=None, activation="none"):  # type: ignore[no-untyped-def]
    inputs = weight.shape[1]
    return grad.new_empty(*grad.shape[:-1], inputs), op_calls.new_sums(grad, 0 if z is None else inputs)


@torch.library.register_fake("ctrlprune::matmul", lib=_library)
def _(x, weight, signals, lists, probes, block_in, block_out):  # type: ignore[no-untyped-def]
    torch._check(x.shape[-1] == weight.shape[0], lambda: f"x has {x.shape[-1]} features, the weight {weight.shape[0]}")
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.register_fake("ctrlprune::matmul_dgrad", lib=_library)
def _(grad, weight, lists, block_in, block_out):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], weight.shape[0])


@torch.library.register_fake("ctrlprune::conv", lib=_library)
def _(x, weight, bias, signals, lists, probes, block_out, block_in, activation, *moves):  # type: ignore[no-untyped-def]
    op_calls.check_activation(activation)
    size = op_calls.check_window(x.shape, weight.shape, Window.of(*moves))
    y = _image(x, weight.shape[0], size)
    return y, torch.empty_like(y) if op_calls.saves_z(activation) else x.new_empty(0)


@torch.library.register_fake("ctrlprune::conv_dgrad", lib=_library)
def _(grad, weight, lists, block_out, block_in, input_size, stride, padding, dilation, groups, z=None, *_):  # type: ignore[no-untyped-def]
    channels = weight.shape[1] * groups
    return _image(grad, channels, input_size), op_calls.new_sums(grad, 0 if z is None else channels)


@torch.library.register_fake("ctrlprune::linear_wgrad", lib=_library)
@torch.library.register_fake("ctrlprune::matmul_wgrad", lib=_library)
@torch.library.register_fake("ctrlprune::conv_wgrad", lib=_library)
def _(grad, x, weight, lists, *_):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape), weight.new_empty((2, *BlockLists(*lists).grid), dtype=torch.float32)


@torch.library.register_fake("ctrlprune::activation_backward", lib=_library)
def _(grad, z, activation, channels):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad), op_calls.new_sums(grad, grad.shape[channels])


@torch.library.register_fake("ctrlprune::attention", lib=_library)
def _(query, key, value, kinds, is_causal, scale):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(batch, length, heads, dtype=wide).transpose(1, 2)


@torch.library.register_fake("ctrlprune::attention_backward", lib=_library)
def _(grad, query, key, value, *_):  # type: ignore[no-untyped-def]
    tensors = (query, key, value)
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in tensors)


def _image(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An empty channels-last image, which is no view: of a view Inductor wants to compare strides that are symbols."""
    strides = [channels * math.prod(size[i + 1 :]) for i in range(-1, len(size))]
    return like.new_empty_strided((like.shape[0], channels, *size), (strides[0], 1, *strides[1:]))


# Autograd -------------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, lists, probes, block_out, block_in, activation, *moves = inputs
    y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.block, ctx.activation, ctx.moves = (block_out, block_in), activation, moves
    ctx.bias_dtype, ctx.lists = None if bias is None else bias.dtype, len(lists)
    kept = {"none": (), "relu": (y,)}.get(activation, (z,))
    ctx.save_for_backward(x, weight, probes, *lists, *kept)


def _backward(ctx: Any, grad_y: Tensor | None, _grad_z: None) -> tuple[Any, ...]:
    unused = ([None] * ctx.lists, None, None, None, None, *(None for _ in ctx.moves))
    if grad_y is None:
        return (None, None, None, None, *unused)
    x, weight, probes, *rest = ctx.saved_tensors
    lists, kept = rest[: ctx.lists], rest[ctx.lists :]
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = grad_signals = grad_bias = sums = None
    grad, channels = grad_y, 1 if ctx.moves else -1
    if op_calls.saves_z(ctx.activation):
        # An operator that `fuse_derivative` can find.
        grad, sums = activation_backward(grad, kept[0], ctx.activation, channels)
    elif ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, kept[0], 0)
    if ctx.moves:
        grad = channels_last(grad)
        if needs_x:
            grad_x, _ = conv_dgrad(grad, weight, lists, *ctx.block, x.shape[2:], *ctx.moves)
        if needs_weight:
            grad_weight, grad_signals = conv_wgrad(grad, x, weight, lists, probes, *ctx.block, *ctx.moves)
    else:
        if needs_x:
            grad_x, _ = linear_dgrad(grad, weight, lists, *ctx.block)
        if needs_weight:
            grad_weight, grad_signals = linear_wgrad(grad, x, weight, lists, probes, *ctx.block)
    if needs_bias:
        grad_bias = (channel_sums(grad, channels) if sums is None else sums).to(ctx.bias_dtype)
    return (grad_x, grad_weight, grad_bias, grad_signals, *unused)


def _setup_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lists, probes, *block = inputs
    ctx.set_materialize_grads(False)
    ctx.block, ctx.lists = block, len(lists)
    ctx.save_for_backward(x, weight, probes, *lists)


def _matmul_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    grad_x = grad_weight = grad_signals = None
    if grad is not None:
        x, weight, probes, *lists = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            grad_x = matmul_dgrad(grad, weight, lists, *ctx.block)
        if ctx.needs_input_grad[1]:
            grad_weight, grad_signals = matmul_wgrad(grad, x, weight, lists, probes, *ctx.block)
    return grad_x, grad_weight, grad_signals, [None] * ctx.lists, None, None, None


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, kinds, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, kinds)


def _attention_backward(ctx: Any, grad: Tensor | None, _grad_sums: None) -> tuple[Any, ...]:
    gradients = (None, None, None) if grad is None else attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*gradients, None, None, None)


def _autocast(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    # On the CPU the input is cast and the weight is not: the kernels round its live blocks when they pack them, and the
    # weight's gradient comes out in the weight's own type. Tensor cores read the weight as it lies in memory.
    def cast(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
            weight = weight if device == "cpu" else weight.to(x.dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(x, weight, *rest)

    return cast


for _key in ("CPU", "CUDA"):
    _library.impl("activation_backward", op_calls.activation_backward, _key)
_library.impl("attention", op_calls.attention, "CPU")
_library.impl("attention_backward", op_calls.attention_backward, "CPU")
torch.library.register_autograd(
    "ctrlprune::attention", _attention_backward, setup_context=_setup_attention, lib=_library
)
for _name, _implementation in op_calls.IMPLEMENTATIONS.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, visible(_name, _implementation), _key)
for _name, _op, _setup, _back in (
    ("linear", linear, _setup_context, _backward),
    ("matmul", matmul, _setup_matmul, _matmul_backward),
    ("conv", conv, _setup_context, _backward),
):
    torch.library.register_autograd(f"ctrlprune::{_name}", _back, setup_context=_setup, lib=_library)
    for _device in ("cpu", "cuda"):
        _library.impl(_name, _autocast(_op, _device), f"Autocast{_device.upper()}")


# FLOP formulas: what is computed, so active blocks only; 2 per multiply-add -------------------------------------------


def _product_flops(
    positions: int, weight: Tensor, tensors: Sequence[Tensor], probes: Tensor | None, block: tuple[int, int]
) -> int:
    entries, lists = weight.numel(), BlockLists(*tensors)
    if not isinstance(lists.crow_indices, FakeTensor):  # a graph without data: every block counts
        computed = mask_of(lists)
        if probes is not None:
            computed.view(-1)[probes[probes >= 0].long()] = True
        entries = int(expand(computed, matrix_block(block, weight.shape), matrix_shape(weight.shape)).sum())
    return 2 * positions * entries


@register_flop_formula(attention, get_raw=True)
def _(query, key, value, kinds, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return _of_live(kinds, sdpa_flop_count(query.shape, key.shape, value.shape))


@register_flop_formula(attention_backward, get_raw=True)
def _(grad, query, key, value, out, sums, kinds, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return _of_live(kinds, 2 * sdpa_flop_count(query.shape, key.shape, value.shape))


def _of_live(kinds: Tensor, flops: int) -> int:
    return flops if isinstance(kinds, FakeTensor) else flops * int((kinds == LIVE).sum()) // kinds.numel()


@register_flop_formula(linear, get_raw=True)
def _(x, weight, bias, signals, lists, probes, block_out, block_in, activation, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(x.numel() // x.shape[-1], weight, lists, None, (block_out, block_in))


@register_flop_formula(matmul, get_raw=True)
def _(x, weight, signals, lists, probes, block_in, block_out, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(x.numel() // x.shape[-1], weight, lists, None, (block_in, block_out))


@register_flop_formula(matmul_dgrad, get_raw=True)
def _(grad, weight, lists, block_in, block_out, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(grad.numel() // grad.shape[-1], weight, lists, None, (block_in, block_out))


@register_flop_formula(matmul_wgrad, get_raw=True)
def _(grad, x, weight, lists, probes, block_in, block_out, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(grad.numel() // grad.shape[-1], weight, lists, probes, (block_in, block_out))


@register_flop_formula(conv, get_raw=True)
def _(x, weight, bias, signals, lists, probes, block_out, block_in, activation, *moves, out_val, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(out_val[0].numel() // weight.shape[0], weight, lists, None, (block_out, block_in))


@register_flop_formula([linear_dgrad, conv_dgrad], get_raw=True)
def _(grad, weight, lists, block_out, block_in, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(grad.numel() // weight.shape[0], weight, lists, None, (block_out, block_in))


@register_flop_formula([linear_wgrad, conv_wgrad], get_raw=True)
def _(grad, x, weight, lists, probes, block_out, block_in, *moves, **_) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(grad.numel() // weight.shape[0], weight, lists, probes, (block_out, block_in))
