"""Rewrites linear nodes into `ctrlprune::linear`, whose masked blocks are never computed.

The gate's tensors enter the graph as inputs: `signals`, the index lists and the probes, once per weight, after all
other placeholders. Nothing about a mask is stored in the graph. `gm.meta["gated_weights"]` lists the argument positions
of the weights in the order in which their tensors were appended, so that the caller can pass those of the live
Parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ctrlcompile import ops
from ctrlcompile.kernels.index_lists import BlockLists
from ctrlcompile.passes.graph_edit import argument, clean, copy_meta, first_output, is_linear, scopes

GATE_INPUTS = ("signals", *BlockLists._fields, "probes")


def gate_linear(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, blocks: Mapping[str, tuple[int, int]]
) -> fx.GraphModule:
    """Gates the linear nodes named in `blocks` with blocks of `(block_out, block_in)` entries."""
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for scope in scopes(gm):
        graph = scope.gm.graph
        here: dict[fx.Node, list[fx.Node]] = {}  # the same inputs, as this graph knows them
        for node in list(graph.nodes):
            if f"{scope.prefix}{node.name}" not in blocks or not is_linear(node):
                continue
            x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
            outer = scope.outer(weight)
            assert outer is not None  # only weights that are inputs of the whole graph are gated
            if outer not in inputs:
                inputs[outer] = _add_inputs(gm.graph, outer)
            if outer not in here:
                here[outer] = [scope.bring_in(placeholder) for placeholder in inputs[outer]]
            with graph.inserting_before(node):
                signals, *lists, probes = here[outer]
                block = blocks[f"{scope.prefix}{node.name}"]
                arguments = (x, weight, bias, signals, lists, probes, *block, "none")
                gated = copy_meta(node, graph.call_function(ops.linear.default, arguments))
                gated.meta["linear"] = f"{scope.prefix}{node.name}"
                node.replace_all_uses_with(first_output(graph, gated, node))
            graph.erase_node(node)
    gm.meta["gated_weights"] = [position[weight] for weight in inputs]
    return clean(gm)


def _add_inputs(graph: fx.Graph, weight: fx.Node) -> list[fx.Node]:
    added = []
    for name in GATE_INPUTS:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added.append(graph.placeholder(f"{weight.name}_{name}"))
        added[-1]._dynamo_source = None
    return added
