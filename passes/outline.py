"""A graph as people see it: what computes what from what, without parameters, sizes and unpacked tuples."""

import operator
import re
from dataclasses import dataclass

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ctrlcompile.passes.graph_edit import CHECKPOINT, operator_name, source_name


@dataclass(frozen=True)
class Node:
    """One box of a picture.

    Attributes:
        name: unique in the graph; of a gated layer, the node that it was in Dynamo's graph.
        operator: what it computes; "input" and "output" at the ends.
        module: path of the module that calls it; empty for the model itself.
        shape: of its value, such as "8 x 128"; empty where it has none.
        sources: names of the nodes that it reads.
    """

    name: str
    operator: str
    module: str
    shape: str
    sources: tuple[str, ...]


Outline = tuple[Node, ...]
Names = tuple[str, ...]


def outline(gm: fx.GraphModule) -> Outline:
    """The nodes of a graph that people care for, activation checkpoints unfolded, in the order of computation."""
    found: list[Node] = []
    inputs: dict[fx.Node, Names] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if _is_data(node):
            found.append(Node(node.name, "input", "", _shape(node), ()))
            inputs[node] = (node.name,)
    result = _unfold(gm, "", inputs, found)
    found.append(Node("output", "output", "", "", result))
    read = {name for node in found for name in node.sources}
    return tuple(node for node in found if node.sources or node.name in read)  # not a counter of batches, say


def module_path(node: fx.Node) -> str:
    """Of the module that calls a node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return re.sub(r"^L\['\w+'\]\.?", "", paths[-1]) if paths else ""


def _unfold(gm: fx.GraphModule, prefix: str, names: dict[fx.Node, Names], found: list[Node]) -> Names:
    """Appends the nodes of a graph whose inputs are drawn as `names`; the names of what it returns."""
    for node in gm.graph.nodes:
        sources = tuple(dict.fromkeys(name for known in node.all_input_nodes for name in names.get(known, ())))
        if node.op == "output":
            return sources
        if not node.op.startswith("call"):
            continue
        if node.target is CHECKPOINT:
            body = getattr(gm, node.args[0].target)
            passed = zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True)
            inside = {inner: names.get(outer, ()) for inner, outer in passed}
            names[node] = _unfold(body, f"{prefix}{node.args[0].target}.", inside, found)
        elif _is_unpacking(node):
            names[node] = sources
        elif _is_drawn(node, sources):
            name = node.meta.get("layer", f"{prefix}{node.name}")
            found.append(Node(name, operator_name(node), module_path(node), _shape(node), sources))
            names[node] = (name,)
    return ()


def _is_data(node: fx.Node) -> bool:
    """Whether an input of a graph is a tensor that is neither of a module nor of a gate."""
    source = source_name(node)
    is_tensor = isinstance(node.meta.get("example_value"), Tensor)
    return bool(source) and is_tensor and not re.search(r"_(?:parameters|buffers)\[", source)


def _is_unpacking(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not node.all_input_nodes:
        return False
    return not isinstance(node.all_input_nodes[0].meta.get("example_value"), Tensor)


def _is_drawn(node: fx.Node, sources: Names) -> bool:
    if "example_value" not in node.meta:  # of our passes, or with an effect only
        return bool(sources)
    return any(isinstance(value, Tensor) for value in tree_leaves(node.meta["example_value"]))


def _shape(node: fx.Node) -> str:
    user = next((user for user in node.users if _is_unpacking(user)), node) if "layer" in node.meta else node
    value = user.meta.get("example_value")
    return " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else ""
