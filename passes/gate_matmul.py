"""Rewrites products `x @ weight` with a Parameter into `ctrlprune::matmul`, whose masked blocks are never computed.

What an `addmm` adds is added afterwards, which Inductor fuses with what follows; in half types that is one rounding
more than the framework's `addmm` has.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ctrlcompile import ops
from ctrlcompile.kernels.index_lists import Block
from ctrlcompile.passes.gate_nodes import GateNodes, gate_nodes
from ctrlcompile.passes.layer_nodes import is_matmul, operands


def gate_matmul(gm: fx.GraphModule, example_inputs: Sequence[Any], *, blocks: Mapping[str, Block]) -> fx.GraphModule:
    """Gates the products named in `blocks` with blocks of `(block_in, block_out)` entries."""
    return gate_nodes(gm, blocks, is_matmul, _gated)


def _gated(node: fx.Node, gate: GateNodes, block: Block) -> tuple[fx.Node, fx.Node]:
    x, weight, bias = operands(node)
    example = node.meta["example_value"]
    call = node.graph.call_function(ops.matmul.default, (x, weight, *gate, *block))
    call.meta["example_value"] = example
    if bias is None:
        return call, call
    if bias.meta["example_value"].dtype != example.dtype:  # autocast casts what addmm is given, and not what add is
        bias = node.graph.call_method("to", (bias, example.dtype))
    return call, node.graph.call_function(operator.add, (call, bias))
