"""What the passes that gate layers share: the gates' tensors as inputs of the graph, and the walk over its layers.

A gate's tensors enter the graph as inputs: `signals`, the index lists and the probes, once per weight, after all other
placeholders. Nothing about a mask is stored in the graph. `gm.meta["gated_weights"]` lists the argument positions of
the weights in the order in which their tensors were appended, so that the caller can pass those of the live Parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from ctrlcompile.kernels.index_lists import BlockLists
from ctrlcompile.passes.graph_edit import argument, clean, copy_meta, first_output, scopes

GATE_INPUTS = ("signals", *BlockLists._fields, "probes")

Block = tuple[int, int]
GateNodes = tuple[fx.Node, list[fx.Node], fx.Node]  # signals, index lists, probes


def gate_nodes(
    gm: fx.GraphModule,
    blocks: Mapping[str, Block],
    chosen: Callable[[fx.Node], bool],
    gated: Callable[[fx.Node, GateNodes, Block], fx.Node],
) -> fx.GraphModule:
    """Replaces the nodes named in `blocks` that are `chosen` by what `gated` makes of them.

    `gated` takes a node, its gate's inputs and its block, and returns the call of an operator of ours, whose first
    output stands for the node.
    """
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for scope in scopes(gm):
        graph = scope.gm.graph
        here: dict[fx.Node, list[fx.Node]] = {}  # the same inputs, as this graph knows them
        for node in list(graph.nodes):
            name = f"{scope.prefix}{node.name}"
            if name not in blocks or not chosen(node):
                continue
            outer = scope.outer(argument(node, 1, "weight"))
            assert outer is not None  # only weights that are inputs of the whole graph are gated
            if outer not in inputs:
                inputs[outer] = _add_inputs(gm.graph, outer)
            if outer not in here:
                here[outer] = [scope.bring_in(placeholder) for placeholder in inputs[outer]]
            signals, *lists, probes = here[outer]
            with graph.inserting_before(node):
                call = copy_meta(node, gated(node, (signals, lists, probes), blocks[name]))
                call.meta["layer"] = name
                node.replace_all_uses_with(first_output(graph, call, node))
            graph.erase_node(node)
    gm.meta["gated_weights"] = [*gm.meta.get("gated_weights", ()), *(position[weight] for weight in inputs)]
    return clean(gm)


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a layer."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    return x, weight, bias


def _add_inputs(graph: fx.Graph, weight: fx.Node) -> list[fx.Node]:
    added = []
    for name in GATE_INPUTS:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added.append(graph.placeholder(f"{weight.name}_{name}"))
        added[-1]._dynamo_source = None
    return added
