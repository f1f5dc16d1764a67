"""What a layer's node of Dynamo's graph says: its kind and operands, how its window moves, why it cannot be gated.

A layer is a linear, a convolution, or a matmul: a product `x @ weight`, perhaps with something added, where the weight
is a Parameter stored [in, out]. A product of two values that the graph computes, as in attention, is none.
"""

import operator
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ctrlcompile.kernels.window import Window
from ctrlcompile.passes.graph_edit import argument

TRANSFORMED = "transformed"  # in the meta of a node that torch.func transforms
LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)
CONV = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
MATMUL = {
    **dict.fromkeys((torch.matmul, operator.matmul, "matmul", "__matmul__"), ("input", "other")),
    **dict.fromkeys((torch.mm, "mm"), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, "addmm"), ("input", "mat1", "mat2")),
}  # functions and methods, with the names of their operands


def is_linear(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is `torch.nn.functional.linear`."""
    return node.op == "call_function" and node.target in LINEAR


def is_conv(node: fx.Node) -> bool:
    """Whether it is a convolution in 1 to 3 dimensions, not a transposed one."""
    return node.op == "call_function" and node.target in CONV


def is_matmul(node: fx.Node) -> bool:
    """Whether it is `x @ weight`, or `addmm` of such a product, where the weight is a Parameter."""
    called = node.op in ("call_function", "call_method") and node.target in MATMUL
    if not called or len(node.args) > len(MATMUL[node.target]):  # more are a deprecated order, or a type of the output
        return False
    return is_parameter(operands(node)[1])


def is_parameter(node: Any) -> TypeGuard[fx.Node]:
    """Whether it is an input of the graph that is a Parameter."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) and node.op == "placeholder" else None
    return isinstance(value, torch.nn.Parameter)


def is_layer(node: fx.Node) -> bool:
    """Whether it is a layer that users may expect to be gated."""
    return is_matmul(node) or (node.op == "call_function" and node.target in (*LINEAR, *CONV, *TRANSPOSED))


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a layer; the bias of an `addmm` is what it adds, None where nothing is added."""
    names = MATMUL.get(node.target, ("input", "weight", "bias"))
    values = [argument(node, i, name) for i, name in enumerate(names)]
    if names[-1] == "bias":
        x, weight, bias = values
    else:
        bias, x, weight = [None, *values][-3:]
    return x, weight, bias


def is_weight_of(node: fx.Node, user: fx.Node) -> bool:
    """Whether a layer reads `node` as its weight and not otherwise."""
    return is_layer(user) and [value is node for value in operands(user)] == [False, True, False]


def note_transforms(graph: fx.Graph) -> None:
    """Marks the nodes that `torch.func` transforms (`vmap`, `grad`, `jvp`), which stand between calls that say so."""
    level = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        level += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        node.meta[TRANSFORMED] = level > 0


def obstacle(node: fx.Node) -> str | None:
    """Why a layer cannot be gated whatever its weight, in a user's words, or None."""
    if node.target in TRANSPOSED:
        return "transposed convolutions are not gated"
    if node.meta.get(TRANSFORMED):
        return "inside a transformation of torch.func, such as vmap"
    x, weight, bias = operands(node)
    if not weight.meta["example_value"].is_floating_point():
        return f"its weight is of {weight.meta['example_value'].dtype}"
    if free_unbacked_symbols(x.meta["example_value"]):
        return "the size of its input depends on values in the same graph"
    if (
        bias is not None
        and not is_matmul(node)
        and bias.meta["example_value"].shape != weight.meta["example_value"].shape[:1]
    ):
        return "its bias has not one entry per output"
    if is_conv(node):
        if x.meta["example_value"].dim() != weight.meta["example_value"].dim():
            return "its input has no batch dimension"
        if not all(isinstance(value, int | str) for value in _flat(node)):
            return "its window is not the same at every call"
    elif weight.meta["example_value"].dim() != 2:
        return "its weight is no matrix"
    if is_matmul(node):
        further = {name: value for name, value in node.kwargs.items() if name not in MATMUL[node.target]}
        if further.pop("beta", 1) != 1 or further.pop("alpha", 1) != 1:
            return "it scales its terms"
        if any(value is not None for value in further.values()):
            return "it is told where to put what it computes, or in which type"
    return None


def window_of(node: fx.Node) -> Window | None:
    """How the window of a convolution moves; None for any other layer."""
    if not is_conv(node):
        return None
    taps = operands(node)[1].meta["example_value"].shape[2:]
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
