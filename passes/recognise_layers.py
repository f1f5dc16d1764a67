"""Rewrites what is a linear or a product with a Parameter by another name into one.

| the graph has | it becomes |
| --- | --- |
| a product of x and the transpose of a matrix, perhaps with a vector added (`addmm`) | `linear(x, weight, bias)` |
| `linear(x, weight.t())` without a bias | `matmul(x, weight)` |
| `einsum("...k,nk->...n", x, weight)` | `linear(x, weight)` |
| `einsum("...k,kn->...n", x, weight)` | `matmul(x, weight)` |

A transpose is `t`, `transpose`, `swapaxes` or `permute`, called with positions, or `.T` or `.mT`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ctrlcompile.passes.graph_edit import Scope, clean, scopes
from ctrlcompile.passes.layer_nodes import LINEAR, MATMUL, is_linear, is_parameter, operands

Call = tuple[Callable[..., Any], tuple[Any, ...]]
GradModes = dict[fx.Node, bool]  # whether gradients flow where a node stands: not under `torch.no_grad()`, say

_EINSUM = re.compile(r"((?:[a-zA-Z]|\.\.\.)*)([a-zA-Z]),([a-zA-Z])([a-zA-Z])->\1([a-zA-Z])")


def recognise_layers(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Has `linear` and `matmul` called where the graph computes as they do."""
    modes: GradModes = {}
    for scope in scopes(gm):
        graph = scope.gm.graph
        modes |= _grad_modes(scope, modes)
        for node in list(graph.nodes):
            call = _of_transpose(node, scope, modes) or _of_einsum(node)
            if call is None:
                continue
            with graph.inserting_before(node):
                layer = graph.call_function(*call)
            layer.meta.update(node.meta)
            node.replace_all_uses_with(layer)
            read = node.all_input_nodes
            graph.erase_node(node)
            for transpose in read:
                scope.let_go(transpose)
    return clean(gm)


def _grad_modes(scope: Scope, outside: GradModes) -> GradModes:
    on, inference = torch.is_grad_enabled() if scope.call is None else outside[scope.call], False
    left: list[Any] = []  # what each inference mode that is not over goes back to
    found: GradModes = {}
    for node in scope.gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.target is torch._C._set_grad_enabled:
            on = bool(node.args[0])
        elif name == "_enter_inference_mode":
            left.append(inference)
            inference = node.args[0]
        elif name == "_exit_inference_mode":
            inference = left.pop() if left else False
        found[node] = on and not inference
    return found


def _of_transpose(node: fx.Node, scope: Scope, modes: GradModes) -> Call | None:
    """Of a product with a transposed Parameter; inside a checkpoint's body also where the graph around it transposes.

    Not of one that was transposed where gradients stop, and is multiplied where they do not.
    """
    names = ("input", "weight", "bias") if is_linear(node) else MATMUL.get(node.target)
    if names is None or len(node.args) > len(names):
        return None
    if any(
        (name, value) not in (("beta", 1), ("alpha", 1)) for name, value in node.kwargs.items() if name not in names
    ):
        return None
    x, transpose, bias = operands(node)
    outer = scope.outer(transpose) if isinstance(transpose, fx.Node) and transpose.op == "placeholder" else transpose
    if not isinstance(outer, fx.Node) or (weight := _matrix(outer)) is None or (modes[node] and not modes[outer]):
        return None
    outputs = weight.meta["example_value"].shape[:1]
    if bias is not None and (node.target in LINEAR or bias.meta["example_value"].shape != outputs):
        return None
    here = weight if outer is transpose else scope.bring_in(weight)
    return (torch.matmul, (x, here)) if node.target in LINEAR else (torch.nn.functional.linear, (x, here, bias))


def _of_einsum(node: fx.Node) -> Call | None:
    """Of one that sums over the last dimension of something and one of a Parameter."""
    if node.target is not torch.einsum or len(node.args) != 3 or not is_parameter(node.args[2]):
        return None
    arguments: tuple[Any, ...] = node.args
    equation, x, weight = arguments
    if (found := _EINSUM.fullmatch(equation.replace(" ", ""))) is None:
        return None
    rows, summed, first, second, new = found.groups()
    letters = [*rows.replace(".", ""), first, second]
    if len(set(letters)) < len(letters) or {first, second} != {summed, new}:
        return None
    if x.meta["example_value"].shape[-1] != weight.meta["example_value"].shape[first != summed]:
        return None  # a size of 1 is repeated
    return (torch.matmul if first == summed else torch.nn.functional.linear), (x, weight)


def _matrix(node: fx.Node) -> fx.Node | None:
    """The Parameter that a node swaps the two dimensions of."""
    swaps = _TRANSPOSES.get(node.target) if node.op in ("call_function", "call_method") else None
    if swaps is None or node.kwargs or not is_parameter(node.args[0]):
        return None
    arguments: tuple[Any, ...] = node.args
    weight, *rest = arguments
    return weight if weight.meta["example_value"].dim() == 2 and swaps(*rest) else None


def _swapped(*dims: Any) -> bool:
    return all(isinstance(dim, int) for dim in dims) and sorted(dim % 2 for dim in dims) == [0, 1]


def _permuted(*dims: Any) -> bool:
    order = dims[0] if len(dims) == 1 else dims
    return _swapped(*order) and order[0] % 2 == 1


_TRANSPOSES: dict[Any, Callable[..., bool]] = {
    **dict.fromkeys((torch.t, "t"), lambda: True),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes, "swapaxes"), _swapped),
    **dict.fromkeys((torch.permute, "permute"), _permuted),
    getattr: lambda name, *_: name in ("T", "mT"),
}  # functions and methods, and what says of their further arguments whether they do
