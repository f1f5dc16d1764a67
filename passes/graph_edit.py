"""What every pass needs to leave a clean graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # calls a body, a graph of its own
COPIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace")


@dataclass(frozen=True)
class Scope:
    """A graph that layers stand in: the whole one (`call` is None), or the body of an activation checkpoint.

    A body has inputs of its own; `call` is the node of the whole graph that passes them, and `prefix` goes before the
    names of the body's nodes to tell them from those of the whole graph.
    """

    gm: fx.GraphModule
    prefix: str = ""
    call: fx.Node | None = None

    def outer(self, node: fx.Node) -> fx.Node | None:
        """The node of the whole graph whose value `node` has; None for what is computed in a body."""
        if self.call is None:
            return node
        inputs = self.gm.graph.find_nodes(op="placeholder")
        return self.call.args[1 + inputs.index(node)] if node in inputs else None  # type: ignore[return-value]

    def bring_in(self, outer: fx.Node) -> fx.Node:
        """A node of this graph with the value of a node of the whole graph: in a body an input, if need be one more."""
        if self.call is None:
            return outer
        if outer in self.call.args:
            return self.gm.graph.find_nodes(op="placeholder")[self.call.args.index(outer) - 1]
        with self.gm.graph.inserting_after(self.gm.graph.find_nodes(op="placeholder")[-1]):
            node = self.gm.graph.placeholder(outer.name)
        node.meta.update({key: outer.meta[key] for key in ("example_value",) if key in outer.meta})
        self.call.args = (*self.call.args, outer)
        return node

    def let_go(self, node: fx.Node) -> None:
        """Erases a node that nobody reads any more, and of a body's input what made it; no input of the whole graph."""
        if node.users or (node.op == "placeholder" and self.call is None):
            return
        if self.call is None or node.op != "placeholder":
            self.gm.graph.erase_node(node)
            return
        at = 1 + self.gm.graph.find_nodes(op="placeholder").index(node)
        outer = self.call.args[at]
        self.gm.graph.erase_node(node)
        self.call.args = (*self.call.args[:at], *self.call.args[at + 1 :])
        if isinstance(outer, fx.Node) and outer.op != "placeholder" and not outer.users:
            self.call.graph.erase_node(outer)


def scopes(gm: fx.GraphModule) -> list[Scope]:
    """The whole graph, then the bodies of its activation checkpoints."""
    found = [Scope(gm)]
    for call in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        body = call.args[0]
        if len(body.users) == 1:
            found.append(Scope(getattr(gm, body.target), f"{body.target}.", call))
    return found


def uses(placeholder: fx.Node, everywhere: list[Scope]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes that read an input of the whole graph, in bodies too, each with the node that it reads it by."""
    for scope in everywhere:
        if scope.call is None:
            calls = [other.call for other in everywhere if other.call is not None]
            yield from ((user, placeholder) for user in placeholder.users if user not in calls)
        else:
            for node in scope.gm.graph.find_nodes(op="placeholder"):
                if scope.outer(node) is placeholder:
                    yield from ((user, node) for user in node.users)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that AOTAutograd takes for Dynamo's own; editing the original would break its guards."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, values))
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    copied._param_name_to_source = gm._param_name_to_source
    for old, new in values.items():
        if old.op == "placeholder":
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    for scope in scopes(copied)[1:]:
        body = fx.Graph()
        body.output(body.graph_copy(scope.gm.graph, {}))
        inner = fx.GraphModule(scope.gm, body)
        inner.meta = dict(scope.gm.meta)
        setattr(copied, scope.prefix.removesuffix("."), inner)
    return copied


def source_name(node: fx.Node) -> str:
    """Where Dynamo found an input of the whole graph, such as `L['self']._parameters['weight']`; empty if nowhere."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)  # a method before PyTorch 2.12


def operator_name(node: fx.Node) -> str:
    """Of what a node calls: a method's name, an operator's with its overload, a function's."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.name()
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def copy_meta(old: fx.Node, new: fx.Node) -> fx.Node:
    """Gives a new node the source location of the one that it replaces."""
    new.meta.update({key: old.meta[key] for key in COPIED_META if key in old.meta})
    return new


def clean(gm: fx.GraphModule) -> fx.GraphModule:
    """Checks the graphs and regenerates the modules' code.

    A pass erases what it has replaced. Nothing else goes for having no readers: `buffer.mul_(0.9)` has none, nor has
    the node that begins a `vmap`, and fx takes both for dead code.
    """
    for scope in reversed(scopes(gm)):
        scope.gm.graph.lint()
        scope.gm.recompile()
    return gm
