"""What runs when an operator of ours is called: checks what came in, then hands it to a kernel.

Kernels trust their pointers, so what does not fit is refused here. Which kernel computes a call is `kernel_choice`'s
part.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctrlcompile import kernel_choice
from ctrlcompile.blocks import no_room
from ctrlcompile.gate import registry
from ctrlcompile.kernels import attention as attention_kernel
from ctrlcompile.kernels import cpu_averages, index_lists, reference
from ctrlcompile.kernels.index_lists import BlockLists, grid_shape
from ctrlcompile.kernels.reference import Before
from ctrlcompile.kernels.window import Window, channels_last

ACTIVATIONS, saves_z = reference.ACTIVATIONS, reference.saves_z


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, signals: Tensor, tensors: Sequence[Tensor], probes: Tensor,
    block_out: int, block_in: int, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    _check_rows(x, weight.shape[1], weight)
    _check_bias(bias, weight)
    check_activation(activation)
    y, z = kernel_choice.forward(_rows(x), weight, bias, lists, block, activation)
    shape = (*x.shape[:-1], weight.shape[0])
    return y.view(shape), z.view(shape) if saves_z(activation) else z


def _linear_dgrad(
    grad: Tensor, weight: Tensor, tensors: Sequence[Tensor], block_out: int, block_in: int, z: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    _check_rows(grad, weight.shape[0], weight)
    shape, before = (*grad.shape[:-1], weight.shape[1]), None
    if z is not None:
        _check_z(z, activation, shape, grad)
        before = Before.of(z.contiguous().view(-1, weight.shape[1]), activation)
    grad_x = kernel_choice.dgrad(_rows(grad), weight, lists, block, before=before)
    return grad_x.view(shape), new_sums(grad, 0) if before is None else before.sums


def _linear_wgrad(
    grad: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor], probes: Tensor, block_out: int, block_in: int
) -> tuple[Tensor, Tensor]:
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    _check_rows(grad, weight.shape[0], weight)
    _check_rows(x, weight.shape[1], weight)
    if grad.numel() // grad.shape[-1] != x.numel() // x.shape[-1]:
        raise ValueError(f"grad of shape {tuple(grad.shape)} and x of shape {tuple(x.shape)} have unequal rows")
    return _noted(lists, kernel_choice.wgrad(_rows(grad), _rows(x), weight, lists, probes, block))


# With a weight stored [in, out] a linear's kernels change parts: `x @ weight` is what dgrad computes of a gradient, and
# the gradient of x what forward computes.


def _matmul(
    x: Tensor, weight: Tensor, signals: Tensor, tensors: Sequence[Tensor], probes: Tensor, block_in: int, block_out: int
) -> Tensor:
    return _linear_dgrad(x, weight, tensors, block_in, block_out)[0]


def _matmul_dgrad(grad: Tensor, weight: Tensor, tensors: Sequence[Tensor], block_in: int, block_out: int) -> Tensor:
    lists, block = _lists(tensors, weight, (block_in, block_out)), (block_in, block_out)
    _check_rows(grad, weight.shape[1], weight)
    grad_x, _ = kernel_choice.forward(_rows(grad), weight, None, lists, block, "none")
    return grad_x.view(*grad.shape[:-1], weight.shape[0])


def _matmul_wgrad(
    grad: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor], probes: Tensor, block_in: int, block_out: int
) -> tuple[Tensor, Tensor]:
    return _linear_wgrad(x, grad, weight, tensors, probes, block_in, block_out)


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, signals: Tensor, tensors: Sequence[Tensor], probes: Tensor,
    block_out: int, block_in: int, activation: str, *moves: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists, block, window = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in), Window.of(*moves)
    _checked_window(x.shape, weight.shape, window)
    _check_groups(weight, block, window)
    _check_bias(bias, weight)
    check_activation(activation)
    y, z = kernel_choice.forward(channels_last(x), weight, bias, lists, block, activation, window)
    return y, z


def _conv_dgrad(
    grad: Tensor, weight: Tensor, tensors: Sequence[Tensor], block_out: int, block_in: int, input_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, z: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists, block = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in)
    window, shape = Window.of(stride, padding, dilation, groups), (grad.shape[0], weight.shape[1] * groups, *input_size)
    _check_gradient(grad, shape, weight, window)
    _check_groups(weight, block, window)
    before = None
    if z is not None:
        _check_z(z, activation, shape, grad)
        before = Before.of(channels_last(z), activation)
    grad_x = kernel_choice.dgrad(channels_last(grad), weight, lists, block, window, tuple(input_size), before)
    return grad_x, new_sums(grad, 0) if before is None else before.sums


def _conv_wgrad(
    grad: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor], probes: Tensor, block_out: int, block_in: int,
    *moves: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists, block, window = _lists(tensors, weight, (block_out, block_in)), (block_out, block_in), Window.of(*moves)
    _check_gradient(grad, x.shape, weight, window)
    _check_groups(weight, block, window)
    return _noted(
        lists, kernel_choice.wgrad(channels_last(grad), channels_last(x), weight, lists, probes, block, window)
    )


def activation_backward(grad: Tensor, z: Tensor, activation: str, channels: int) -> tuple[Tensor, Tensor]:
    """Gradient with respect to z, where no input gradient ends with it, and with respect to a bias in z."""
    _check_z(z, activation, grad.shape, grad)
    grad_z = reference.differentiate(grad, z, activation, torch.empty_like(grad))
    return grad_z, reference.channel_sums(grad_z, channels)


def attention(
    query: Tensor, key: Tensor, value: Tensor, kinds: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` by the kinds of its heads; see `kernels.attention`."""
    _check_heads(query, key, value, kinds)
    query, key, value = map(_dense_rows, (query, key, value))
    return attention_kernel.forward(query, key, value, kinds, is_causal, scale)


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, kinds: Tensor, is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    _check_heads(query, key, value, kinds)
    for tensor in (grad, out):
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            shape = f"{query.dtype} {tuple(query.shape)}"
            raise ValueError(f"what comes out and its gradient are {shape}; got {tensor.dtype} {tuple(tensor.shape)}")
    grad, query, key, value, out = map(_dense_rows, (grad, query, key, value, out))
    return attention_kernel.backward(grad, query, key, value, out, sums, kinds, is_causal, scale)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "linear_dgrad": _linear_dgrad,
    "linear_wgrad": _linear_wgrad,
    "matmul": _matmul,
    "matmul_dgrad": _matmul_dgrad,
    "matmul_wgrad": _matmul_wgrad,
    "conv": _conv,
    "conv_dgrad": _conv_dgrad,
    "conv_wgrad": _conv_wgrad,
}


def new_sums(grad: Tensor, channels: int) -> Tensor:
    """As many sums over the positions of a gradient, yet to be set."""
    return grad.new_empty(channels, dtype=torch.promote_types(grad.dtype, torch.float32))


def check_activation(activation: str) -> None:
    """Raises ValueError for a name that is none of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {ACTIVATIONS}; got {activation!r}")


def check_window(x: Sequence[int], weight: Sequence[int], window: Window) -> tuple[int, ...]:
    """The spatial size of what comes out of a convolution of these shapes. Raises ValueError where they do not fit."""
    dimensions = len(weight) - 2
    if not 1 <= dimensions <= 3 or len(x) != len(weight) or x[1] != weight[1] * window.groups:
        raise ValueError(
            f"an image of shape {tuple(x)} does not fit a weight of {tuple(weight)} in {window.groups} groups: images "
            "are [N, channels, *size], weights [out, channels / groups, *window], with 1 to 3 sizes"
        )
    given = (window.stride, window.padding, window.dilation)
    moves = min((*window.stride, *window.dilation), default=0)
    if any(len(values) != dimensions for values in given) or moves < 1 or min(map(min, window.padding)) < 0:
        raise ValueError(
            f"stride and dilation are {dimensions} ints above 0 and padding {dimensions} pairs of ints from 0 for a "
            f"weight of {tuple(weight)}; got stride {window.stride}, padding {window.padding}, dilation "
            f"{window.dilation}"
        )
    size = window.output_size(tuple(x[2:]), tuple(weight[2:]))
    for extent in size:
        torch._check(extent > 0, lambda: f"a window of {tuple(weight[2:])} is larger than the image {tuple(x)}")
    return size


_checked_window = functools.lru_cache(check_window)  # of real tensors; sizes in a graph may be symbols


def _check_rows(x: Tensor, features: int, weight: Tensor) -> None:
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != features:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a weight of {tuple(weight.shape)}")


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit a weight of {tuple(weight.shape)}")


def _check_gradient(grad: Tensor, x: Sequence[int], weight: Tensor, window: Window) -> None:
    expected = (x[0], weight.shape[0], *_checked_window(tuple(x), weight.shape, window))
    if tuple(grad.shape) != expected:
        raise ValueError(f"the gradient of what comes out has shape {expected}; got {tuple(grad.shape)}")


def _check_z(z: Tensor, activation: str, shape: Sequence[int], grad: Tensor) -> None:
    if tuple(z.shape) != tuple(shape) or z.dtype != grad.dtype:
        raise ValueError(f"z is {grad.dtype} of shape {tuple(shape)}; got {z.dtype} of shape {tuple(z.shape)}")
    if activation not in reference.DIFFERENTIATED:
        raise ValueError(f"activation is one of {reference.DIFFERENTIATED} where z is given; got {activation!r}")


def _check_heads(query: Tensor, key: Tensor, value: Tensor, kinds: Tensor) -> None:
    sizes = {(tensor.dim(), tensor.shape[:2], tensor.shape[-1], tensor.dtype) for tensor in (query, key, value)}
    if len(sizes) > 1 or query.dim() != 4 or key.shape != value.shape:
        shapes = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (query, key, value))
        raise ValueError(f"query, key and value are [N, heads, length, features] of one type; got {shapes}")
    if kinds.shape != query.shape[1:2] or kinds.dtype != torch.uint8 or not kinds.is_contiguous():
        raise ValueError(
            f"kinds is uint8 [{query.shape[1]}], contiguous; got {kinds.dtype} of shape {tuple(kinds.shape)}"
        )
    if cpu_averages.library(query.dtype) is None:
        raise ValueError(f"no kernel averages values of {query.dtype}, so that no heads can be left out")


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _check_groups(weight: Tensor, block: tuple[int, int], window: Window) -> None:
    if window.groups > 1 and (reason := no_room(weight.shape, block, window.groups)) is not None:
        raise ValueError(f"a weight of {tuple(weight.shape)} cannot be gated so: {reason}")


def _lists(tensors: Sequence[Tensor], weight: Tensor, block: tuple[int, int]) -> BlockLists:
    gate = registry.with_lists(tensors[0]) if len(tensors) == len(BlockLists._fields) else None
    its_own = gate is not None and all(map(operator.is_, tensors, gate.lists))
    if gate is not None and its_own and (gate.shape, gate.block) == (weight.shape[:2], block):
        return gate.lists
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


def _noted(lists: BlockLists, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A weight gradient with its signals, which the gate of these lists is told of."""
    gate = registry.with_lists(lists.crow_indices)
    if gate is not None:
        gate.computed(result[0])
    return result


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
