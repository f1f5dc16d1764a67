"""The linears of a graph of Dynamo's: whose weight each reads, what it costs, and why it gets no gate."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ctrlcompile import kernel_choice
from ctrlcompile.cost import ProductCost, expression
from ctrlcompile.gate import name_excluded, registry, resolve_block, too_small
from ctrlcompile.options import Options
from ctrlcompile.passes.graph_edit import Scope, argument, is_linear, scopes, uses

COMPUTED = "its weight is computed in the graph (a parametrization, say), not a Parameter"


@dataclass(frozen=True)
class Weight:
    """A Parameter that linears of this region read: its argument position, and why it gets no gate by itself."""

    position: int
    name: str
    reason: str | None


@dataclass(frozen=True)
class LinearNode:
    """A linear of the graph; `weight` indexes the region's weights, None where the weight is no argument."""

    node: str
    weight: int | None
    name: str
    module: str
    source: str
    x_dtype: torch.dtype
    product: ProductCost
    reason: str | None


def find_linears(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[list[Weight], list[LinearNode]]:
    """The weights that a graph's linears read, and its linears, in activation checkpoints too.

    A Parameter that something other than a linear reads is refused a gate from now on, in every graph.
    """
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    everywhere = scopes(gm)
    weights: list[Weight] = []
    index_of: dict[fx.Node, int] = {}
    linears: list[LinearNode] = []
    for scope in everywhere:
        for node in filter(is_linear, scope.gm.graph.nodes):
            outer = scope.outer(argument(node, 1, "weight"))
            parameter = example_inputs[position[outer]] if outer in position else None
            dtype = node.meta["example_value"].dtype
            index: int | None = None
            name = _name_by_module(node)
            reason: str | None = COMPUTED
            if outer is not None and isinstance(parameter, torch.nn.Parameter):
                if outer not in index_of:
                    weight = _parameter_name(outer)
                    why = _why_dense(outer, parameter, weight, dtype, options, everywhere)
                    index_of[outer] = len(weights)
                    weights.append(Weight(position[outer], weight, why))
                index = index_of[outer]
                name, reason = weights[index].name, weights[index].reason
            path = f"{scope.prefix}{node.name}"
            module, source = _module(node), _source_line(node)
            linears.append(LinearNode(path, index, name, module, source, dtype, _product(node), reason))
    return weights, linears


def _why_dense(
    node: fx.Node, parameter: Tensor, name: str, x_dtype: torch.dtype, options: Options, everywhere: list[Scope]
) -> str | None:
    """Why a weight gets no gate of the backend's own accord; None: it gets one."""
    if not all(is_linear(user) and argument(user, 1, "weight") is known for user, known in uses(node, everywhere)):
        registry.refuse(parameter, "shared with another kind of layer, such as an embedding")
    if (refusal := registry.refusal(parameter)) is not None:
        return refusal
    if parameter.dim() != 2:
        return "its weight is no matrix"
    if (pattern := name_excluded(name, options.exclude)) is not None:
        return f"excluded by {pattern!r}"
    gate = registry.get(parameter)
    if gate is not None:
        gate.check_is_in(options.block)
    block = resolve_block(options.block, parameter) if gate is None else gate.block
    if gate is None and not parameter.requires_grad:
        return "frozen: it has no gradient to judge blocks by"
    if gate is None and (reason := too_small(tuple(parameter.shape), block)) is not None:
        return reason
    return kernel_choice.why_no_kernel(parameter.device, x_dtype, parameter.dtype, block, strict=options.strict)


def _product(node: fx.Node) -> ProductCost:
    x, weight = (argument(node, i, name).meta["example_value"] for i, name in enumerate(("input", "weight")))
    flops = expression(2 * x.numel() * weight.shape[0])
    return ProductCost(flops, flops if x.requires_grad else 0, flops if weight.requires_grad else 0)


def _parameter_name(node: fx.Node) -> str:
    source = node._dynamo_source  # type: ignore[attr-defined]
    text = source.name() if callable(source.name) else source.name
    parts = re.findall(r"_(?:modules|parameters)\['([^']+)'\]", text)
    return ".".join(parts) if parts else text


def _name_by_module(node: fx.Node) -> str:
    return f"{_module(node)}.weight" if node.meta.get("nn_module_stack") else node.name


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return re.sub(r"^L\['\w+'\]\.?", "", paths[-1]) if paths else ""


def _source_line(node: fx.Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""
