"""What every pass needs to leave a clean graph."""

import operator
from typing import Any

import torch
from torch import fx

COPIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace")


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that AOTAutograd takes for Dynamo's own; editing the original would break its guards."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, values := {})
    graph.output(output)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    copied._param_name_to_source = gm._param_name_to_source  # type: ignore[assignment]
    for old, new in values.items():
        if old.op == "placeholder":
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return copied


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def copy_meta(old: fx.Node, new: fx.Node) -> fx.Node:
    """Gives a new node the source location of the one that it replaces."""
    new.meta.update({key: old.meta[key] for key in COPIED_META if key in old.meta})
    return new


def first_output(graph: fx.Graph, call: fx.Node, old: fx.Node) -> fx.Node:
    """The first of a call's outputs, standing for `old`."""
    item = copy_meta(old, graph.call_function(operator.getitem, (call, 0)))
    item.meta["example_value"] = old.meta["example_value"]
    return item


def clean(gm: fx.GraphModule) -> fx.GraphModule:
    """Removes dead code, checks the graph, regenerates the module's code."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def is_linear(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is `torch.nn.functional.linear`."""
    return node.op == "call_function" and node.target in (torch.nn.functional.linear, torch._C._nn.linear)
