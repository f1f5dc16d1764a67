"""Rewrites linear nodes into `ctrlprune::linear`, whose masked blocks are never computed.

The gate's tensors enter the graph as inputs: `signals`, the four index lists and the probes, once per weight, after all
other placeholders. Nothing about a mask is stored in the graph. `gm.meta["gated_weights"]` lists the argument positions
of the weights in the order in which their tensors were appended, so that the caller can pass those of the live
Parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ctrlcompile import ops
from ctrlcompile.passes.graph_edit import argument, clean, copy_meta, first_output, is_linear

GATE_INPUTS = ("signals", "crow_indices", "col_indices", "ccol_indices", "row_indices", "probes")


def gate_linear(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, blocks: Mapping[str, tuple[int, int]]
) -> fx.GraphModule:
    """Gates the linear nodes named in `blocks` with blocks of `(block_out, block_in)` entries."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    position = {node: i for i, node in enumerate(placeholders)}
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for node in list(gm.graph.nodes):
        if node.name not in blocks or not is_linear(node):
            continue
        x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        if weight not in inputs:
            last = placeholders[-1]
            for name in GATE_INPUTS:
                with gm.graph.inserting_after(last):
                    last = gm.graph.placeholder(f"{weight.name}_{name}")
                last._dynamo_source = None  # type: ignore[attr-defined]
                placeholders.append(last)
            inputs[weight] = placeholders[-len(GATE_INPUTS) :]
        with gm.graph.inserting_before(node):
            arguments = (x, weight, bias, *inputs[weight], *blocks[node.name], "none")
            gated = copy_meta(node, gm.graph.call_function(ops.linear.default, arguments))
            node.replace_all_uses_with(first_output(gm.graph, gated, node))
        gm.graph.erase_node(node)
    gm.meta["gated_weights"] = [position[weight] for weight in inputs]
    return clean(gm)
