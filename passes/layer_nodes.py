"""What a linear or convolution node of Dynamo's graph says: its kind, how its window moves, why it cannot be gated."""

from typing import Any

import torch
from torch import fx

from ctrlcompile.kernels.window import Window
from ctrlcompile.passes.graph_edit import argument

LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)
CONV = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def is_linear(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is `torch.nn.functional.linear`."""
    return node.op == "call_function" and node.target in LINEAR


def is_conv(node: fx.Node) -> bool:
    """Whether it is a convolution in 1 to 3 dimensions, not a transposed one."""
    return node.op == "call_function" and node.target in CONV


def is_layer(node: fx.Node) -> bool:
    """Whether it is a layer that users may expect to be gated."""
    return node.op == "call_function" and node.target in (*LINEAR, *CONV, *TRANSPOSED)


def is_weight_of(node: fx.Node, user: fx.Node) -> bool:
    """Whether a layer reads `node` as its weight and not otherwise."""
    return is_layer(user) and argument(user, 1, "weight") is node and argument(user, 0, "input") is not node


def obstacle(node: fx.Node) -> str | None:
    """Why a layer cannot be gated whatever its weight, in a user's words, or None."""
    if node.target in TRANSPOSED:
        return "transposed convolutions are not gated"
    if is_conv(node):
        x, weight = (argument(node, i, name).meta["example_value"] for i, name in enumerate(("input", "weight")))
        if x.dim() != weight.dim():
            return "its input has no batch dimension"
        if not all(isinstance(value, int | str) for value in _flat(node)):
            return "its window is not the same at every call"
    return None


def window_of(node: fx.Node) -> Window | None:
    """How the window of a convolution moves; None for a linear."""
    if not is_conv(node):
        return None
    taps = argument(node, 1, "weight").meta["example_value"].shape[2:]
    stride, padding, dilation, groups = _moves(node)
    stride, dilation = (_each(value, len(taps)) for value in (stride, dilation))
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (count - 1) for d, count in zip(dilation, taps, strict=True)]
        sides = tuple((both // 2, both - both // 2) for both in total)
    else:
        sides = tuple((side, side) for side in _each(padding, len(taps)))
    return Window(stride, sides, dilation, groups)


def _moves(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    stride, padding, dilation = (
        argument(node, position, name, default)
        for position, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    return stride, padding, dilation, argument(node, 6, "groups", 1)


def _flat(node: fx.Node) -> list[Any]:
    return [one for value in _moves(node) for one in (value if isinstance(value, tuple | list) else (value,))]


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dimensions if len(values) == 1 else values
