"""What the passes that gate layers share: the gates' tensors as inputs of the graph, and the walk over its layers.

A gate's tensors enter the graph as inputs: `signals`, the index lists and the probes, once per weight, after all other
placeholders, where the first pass that gates one of the weight's readers adds them. Nothing about a mask is stored in
the graph. `gm.meta["gated_weights"]` lists the argument positions of the weights in the order in which their tensors
were appended, so that the caller can pass those of the live Parameters.
"""

import operator
from collections.abc import Callable, Mapping

from torch import fx

from ctrlcompile.kernels.index_lists import Block, BlockLists
from ctrlcompile.passes.graph_edit import clean, copy_meta, scopes
from ctrlcompile.passes.layer_nodes import operands

GATE_INPUTS = ("signals", *BlockLists._fields, "probes")
GATE = "gate_of"  # in the meta of such an input: the argument position of the weight

GateNodes = tuple[fx.Node, list[fx.Node], fx.Node]  # signals, index lists, probes


def gate_nodes(
    gm: fx.GraphModule,
    blocks: Mapping[str, Block],
    chosen: Callable[[fx.Node], bool],
    gated: Callable[[fx.Node, GateNodes, Block], tuple[fx.Node, fx.Node]],
) -> fx.GraphModule:
    """Replaces the nodes named in `blocks` that are `chosen` by what `gated` makes of them.

    `gated` takes a node, its gate's inputs and its block, and returns the call of an operator of ours, and the node
    that stands for the old one.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for placeholder in placeholders:
        if GATE in placeholder.meta:
            inputs.setdefault(placeholders[placeholder.meta[GATE]], []).append(placeholder)
    gated_weights = gm.meta.setdefault("gated_weights", [])
    for scope in scopes(gm):
        graph = scope.gm.graph
        here: dict[fx.Node, list[fx.Node]] = {}  # the same inputs, as this graph knows them
        for node in list(graph.nodes):
            name = f"{scope.prefix}{node.name}"
            if name not in blocks or not chosen(node):
                continue
            outer = scope.outer(operands(node)[1])
            assert outer is not None  # only weights that are inputs of the whole graph are gated
            if outer not in inputs:
                gated_weights.append(placeholders.index(outer))
                inputs[outer] = _add_inputs(gm.graph, outer, gated_weights[-1])
            if outer not in here:
                here[outer] = [scope.bring_in(placeholder) for placeholder in inputs[outer]]
            signals, *lists, probes = here[outer]
            with graph.inserting_before(node):
                call, value = gated(node, (signals, lists, probes), blocks[name])
            copy_meta(node, call).meta["layer"] = name
            copy_meta(node, value).meta["example_value"] = node.meta["example_value"]
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    return clean(gm)


def with_first_output(call: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A call of an operator of ours, and the first of its outputs."""
    return call, call.graph.call_function(operator.getitem, (call, 0))


def _add_inputs(graph: fx.Graph, weight: fx.Node, position: int) -> list[fx.Node]:
    added = []
    for name in GATE_INPUTS:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added.append(graph.placeholder(f"{weight.name}_{name}"))
        added[-1]._dynamo_source = None
        added[-1].meta[GATE] = position
    return added
