"""Rewrites what is a linear or a product with a Parameter by another name into one.

`x @ weight.t()`, with any way to transpose and any to multiply, and `einsum("...k,nk->...n", x, weight)` are linears;
`einsum("...k,kn->...n", x, weight)` is a product `x @ weight`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ctrlcompile.passes.graph_edit import clean, scopes
from ctrlcompile.passes.layer_nodes import MATMUL, is_parameter, operands

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def recognise_layers(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Has `torch.nn.functional.linear` and `torch.matmul` called where the graph computes as they do."""
    for scope in scopes(gm):
        for node in list(scope.gm.graph.nodes):
            if (call := _as_linear(node) or _as_product(node)) is None:
                continue
            with scope.gm.graph.inserting_before(node):
                layer = scope.gm.graph.call_function(*call)
            layer.meta.update(node.meta)
            node.replace_all_uses_with(layer)
            before = [argument for argument in node.all_input_nodes if _transposed(argument) is not None]
            scope.gm.graph.erase_node(node)
            for transpose in before:
                if not transpose.users:
                    scope.gm.graph.erase_node(transpose)
    return clean(gm)


def _as_linear(node: fx.Node) -> Call | None:
    """Of a product with a transposed Parameter, to which at most a vector is added."""
    names = MATMUL.get(node.target) if node.op in ("call_function", "call_method") else None
    if names is None or len(node.args) + len(node.kwargs) != len(names) or not set(names).issuperset(node.kwargs):
        return None
    x, transpose, bias = operands(node)
    weight = _transposed(transpose)
    if weight is None or (bias is not None and bias.meta["example_value"].dim() != 1):
        return None
    return torch.nn.functional.linear, (x, weight, bias)


def _as_product(node: fx.Node) -> Call | None:
    """Of an einsum of something with a Parameter that sums over the last dimension of it."""
    if node.op != "call_function" or node.target is not torch.einsum or len(node.args) != 3:
        return None
    arguments: tuple[Any, ...] = node.args
    equation, x, weight = arguments
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    if not arrow or len(second) != 2 or not first or not is_parameter(weight):
        return None
    rows, summed = first[:-1], first[-1]
    letters = rows.replace("...", "", 1) + second
    if not (letters.isalpha() and len(set(letters)) == len(letters)) or summed not in second:
        return None
    sizes = [value.meta["example_value"].shape[at] for value, at in ((x, -1), (weight, second.index(summed)))]
    if result != rows + second.replace(summed, "") or sizes[0] != sizes[1]:  # one that is 1 would be repeated
        return None
    return (torch.matmul if second[0] == summed else torch.nn.functional.linear), (x, weight)


def _transposed(node: Any) -> fx.Node | None:
    """The Parameter, a matrix, that a node is the transpose of."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or node.kwargs or not node.args:
        return None
    arguments: tuple[Any, ...] = node.args
    weight, *rest = arguments
    if not is_parameter(weight) or weight.meta["example_value"].dim() != 2:
        return None
    dims = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    swapped = all(isinstance(dim, int) for dim in dims) and sorted(dim % 2 for dim in dims) == [0, 1]
    known = {
        "t": not rest,
        "getattr": rest in (["T"], ["mT"]),
        "transpose": swapped,
        "swapaxes": swapped,
        "permute": swapped and dims[0] % 2 == 1,
    }
    return weight if known.get(name, False) else None
