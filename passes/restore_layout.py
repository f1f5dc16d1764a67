"""Gives what depends on how an image or a head lies in memory the layout that the model had there.

Gated convolutions hand on channels-last images, whatever they were given, and attention that may skip heads hands on
[N, L, heads, E]. Arithmetic takes them as they come. A `view` may not, nor an operator that somebody else wrote, nor
the caller: for these they are copied, if they were contiguous in the model and are not now.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from ctrlcompile import ops
from ctrlcompile.passes.graph_edit import CHECKPOINT, clean, copy_meta, scopes
from ctrlcompile.passes.layer_nodes import is_linear

VIEWS = ("view", "view_as", "as_strided", torch.as_strided)
OWN = ("aten", "prims", "ctrlprune")
ROWS = (ops.linear.default, ops.matmul.default)  # what comes out is contiguous, whatever goes in


def restore_layout(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Inserts `contiguous` before readers of what operators of ours may have laid out otherwise."""
    whole, *bodies = scopes(gm)
    moving = {body.call for body in bodies if any(map(_moves, body.gm.graph.nodes))}
    moved = _restore(whole.gm.graph, {node for node in whole.gm.graph.nodes if node in moving}, outputs=True)
    for body in bodies:
        inputs = body.gm.graph.find_nodes(op="placeholder")
        _restore(body.gm.graph, {node for node in inputs if body.outer(node) in moved}, outputs=False)
    return clean(gm)


def _restore(graph: fx.Graph, moved: set[fx.Node], *, outputs: bool) -> set[fx.Node]:
    """All nodes of a graph whose value may lie otherwise than in the model, given some of them."""
    moved = set(moved)
    for node in list(graph.nodes):
        read = [source for source in node.all_input_nodes if source in moved]
        if _depends_on_layout(node) or (outputs and node.op == "output"):
            for source in filter(_was_contiguous, read):
                with graph.inserting_before(node):
                    node.replace_input_with(source, copy_meta(source, graph.call_method("contiguous", (source,))))
        elif _moves(node) or (read and not is_linear(node) and node.target not in ROWS):
            moved.add(node)
    return moved


def _moves(node: fx.Node) -> bool:
    return node.target in (ops.conv.default, ops.attention.default)


def _depends_on_layout(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
        return packet._qualified_op_name.partition("::")[0] not in OWN
    return node.target in VIEWS or (isinstance(node.target, HigherOrderOperator) and node.target is not CHECKPOINT)


def _was_contiguous(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() > 1 and value.is_contiguous()
