"""Rewrites convolution nodes into `ctrlprune::conv`, whose masked blocks are never computed.

Its kernels take channels-last images. The graph says so before each of them: where the image comes from another gated
convolution, or from what keeps its layout, that costs nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ctrlcompile import ops
from ctrlcompile.kernels.index_lists import Block
from ctrlcompile.kernels.window import channels_last
from ctrlcompile.passes.gate_nodes import GateNodes, gate_nodes, with_first_output
from ctrlcompile.passes.layer_nodes import is_conv, operands, window_of


def gate_conv(gm: fx.GraphModule, example_inputs: Sequence[Any], *, blocks: Mapping[str, Block]) -> fx.GraphModule:
    """Gates the convolution nodes named in `blocks` with blocks of `(block_out, block_in)` channels."""
    return gate_nodes(gm, blocks, is_conv, _gated)


def _gated(node: fx.Node, gate: GateNodes, block: Block) -> tuple[fx.Node, fx.Node]:
    window = window_of(node)
    assert window is not None  # only convolutions come here
    x, weight, bias = operands(node)
    image = channels_last(fx.Proxy(x), x.meta["example_value"].dim()).node  # type: ignore[arg-type, attr-defined]
    arguments = (image, weight, bias, *gate, *block, "none", *window.arguments)
    return with_first_output(node.graph.call_function(ops.conv.default, arguments))
