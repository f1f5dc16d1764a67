"""Moves a ReLU or GELU that is the only reader of a gated layer into the layer's last step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ctrlcompile import ops
from ctrlcompile.passes.graph_edit import argument, clean, scopes

RELU = (F.relu, torch.relu, torch.ops.aten.relu.default)
GELU = (F.gelu, torch._C._nn.gelu)


def fuse_activation(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """`activation(linear(x))` becomes one `ctrlprune::linear` with that activation; likewise a convolution."""
    for graph, node in [(scope.gm.graph, node) for scope in scopes(gm) for node in scope.gm.graph.nodes]:
        activation = _activation(node)
        if activation is None:
            continue
        item = argument(node, 0, "input")
        call = item.args[0] if isinstance(item, fx.Node) and item.args else None
        if not isinstance(call, fx.Node) or ops.activation_of(call) != "none":
            continue
        if len(item.users) == 1:
            call.update_arg(ops.ACTIVATION_POSITION, activation)
            item.meta["example_value"] = node.meta["example_value"]
            node.replace_all_uses_with(item)
            graph.erase_node(node)
    return clean(gm)


def _activation(node: fx.Node) -> str | None:
    if node.op == "call_method" and node.target == "relu":
        return "relu"
    if node.op != "call_function":
        return None
    if node.target in RELU:
        return "relu"
    if node.target in GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(node, 1, "approximate", "none"))
    return None
