"""Rewrites linear nodes into `ctrlprune::linear`, whose masked blocks are never computed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ctrlcompile import ops
from ctrlcompile.kernels.index_lists import Block
from ctrlcompile.passes.gate_nodes import GateNodes, gate_nodes, with_first_output
from ctrlcompile.passes.layer_nodes import is_linear, operands


def gate_linear(gm: fx.GraphModule, example_inputs: Sequence[Any], *, blocks: Mapping[str, Block]) -> fx.GraphModule:
    """Gates the linear nodes named in `blocks` with blocks of `(block_out, block_in)` entries."""
    return gate_nodes(gm, blocks, is_linear, _gated)


def _gated(node: fx.Node, gate: GateNodes, block: Block) -> tuple[fx.Node, fx.Node]:
    call = node.graph.call_function(ops.linear.default, (*operands(node), *gate, *block, "none"))
    return with_first_output(call)
