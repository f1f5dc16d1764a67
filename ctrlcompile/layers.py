"""The layers of a graph of Dynamo's: whose weight each reads, what it costs, why it gets no gate."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ctrlcompile import kernel_choice
from ctrlcompile.blocks import Block, no_room, resolve_block, too_small
from ctrlcompile.cost import ProductCost, expression
from ctrlcompile.gate import Gate, registry
from ctrlcompile.kernels.window import Window
from ctrlcompile.named_gates import name_excluded
from ctrlcompile.options import Options
from ctrlcompile.passes.graph_edit import Scope, scopes, source_name, uses
from ctrlcompile.passes.layer_nodes import (
    TRANSPOSED,
    is_layer,
    is_matmul,
    is_weight_of,
    note_transforms,
    obstacle,
    operands,
    window_of,
)
from ctrlcompile.passes.outline import module_path

NORMALISING = (torch.nn.functional.batch_norm, torch.nn.functional.instance_norm, torch.batch_norm, torch.instance_norm)
COMPUTED = "its weight is computed in the graph (a parametrization, say), not a Parameter"


@dataclass(frozen=True)
class Weight:
    """A Parameter that layers of this region read: its argument position, and why it gets no gate by itself.

    `transposed` says of a gate yet to be made that all of these layers are matmuls; `read_otherwise` that something
    else reads the Parameter, too; `excluded` that no gate of it counts here, whoever made it; `had_gate` that it had
    one when the graph was compiled.
    """

    position: int
    name: str
    transposed: bool
    read_otherwise: bool
    excluded: bool
    had_gate: bool
    reason: str | None


@dataclass(frozen=True)
class Layer:
    """A linear, a matmul or a convolution of the graph.

    `weight` indexes the region's weights, None where the weight is no argument; `transposed` says that it is read as
    [in, out], by a matmul; `window` is None for all but convolutions; `normalised` says that each output channel is
    normalised by itself, as batch norm does; `obstacle` says why it cannot be gated at all, `reason` why it is not by
    itself.
    """

    node: str
    weight: int | None
    name: str
    module: str
    source: str
    x_dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool
    window: Window | None
    product: ProductCost
    normalised: bool
    obstacle: str | None
    reason: str | None

    @property
    def family(self) -> kernel_choice.Family:
        """The kernels that compute it."""
        return kernel_choice.family_of(self.window, self.shape[2:])

    def gate_among(self, gates: Sequence[Gate | None]) -> Gate | None:
        """Its gate, of those of the region's weights; None where it has none, or has no room for the gate's blocks."""
        gate = None if self.weight is None or self.obstacle is not None else gates[self.weight]
        if gate is None or self.window is None:
            return gate
        return gate if no_room(self.shape, gate.block, self.window.groups) is None else None


def find_layers(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[list[Weight], list[Layer]]:
    """The weights that a graph's layers read, and its layers, in activation checkpoints too.

    A Parameter that something other than a layer reads is refused a gate from now on, in every graph.
    """
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    everywhere = scopes(gm)
    for scope in everywhere:
        note_transforms(scope.gm.graph)
    weights: list[Weight] = []
    index_of: dict[fx.Node, int] = {}
    layers: list[Layer] = []
    for scope in everywhere:
        for node in filter(is_layer, scope.gm.graph.nodes):
            _, weight, _ = operands(node)
            outer = scope.outer(weight)
            parameter = example_inputs[position[outer]] if outer in position else None
            dtype = node.meta["example_value"].dtype
            index: int | None = None
            name = _name_by_module(node)
            reason: str | None = COMPUTED
            if outer is not None and isinstance(parameter, torch.nn.Parameter):
                if outer not in index_of:
                    index_of[outer] = len(weights)
                    weights.append(_weight(outer, position[outer], parameter, dtype, options, everywhere))
                index = index_of[outer]
                name, reason = weights[index].name, weights[index].reason
            why_never = obstacle(node)
            layers.append(
                Layer(
                    f"{scope.prefix}{node.name}", index, name, module_path(node), _source_line(node), dtype,
                    tuple(weight.meta["example_value"].shape), is_matmul(node), None if why_never else window_of(node),
                    _product(node), any(user.target in NORMALISING for user in node.users), why_never,
                    why_never or reason,
                )
            )  # fmt: skip
    return weights, layers


def _weight(
    node: fx.Node, position: int, parameter: Tensor, x_dtype: torch.dtype, options: Options, everywhere: list[Scope]
) -> Weight:
    users, name = list(uses(node, everywhere)), _parameter_name(node)
    readers = [user for user, known in users if is_weight_of(known, user)]
    read_otherwise = len(readers) < len(users)
    if read_otherwise:
        registry.refuse(parameter, "read by something else, too, such as an embedding")
    excluded = name_excluded(name, options.exclude) is not None
    had_gate = registry.get(parameter) is not None
    reason = _why_dense(parameter, name, x_dtype, options, readers)
    return Weight(position, name, all(map(is_matmul, readers)), read_otherwise, excluded, had_gate, reason)


def _why_dense(
    parameter: Tensor, name: str, x_dtype: torch.dtype, options: Options, readers: list[fx.Node]
) -> str | None:
    """Why a weight that these layers read gets no gate of the backend's own accord; None: it gets one."""
    if (refusal := registry.refusal(parameter)) is not None:
        return refusal
    if parameter.is_inference():
        return "made in inference mode, where nothing can be trained"
    if (reason := next(filter(None, map(obstacle, readers)), None)) is not None:
        return reason
    if (pattern := name_excluded(name, options.exclude)) is not None:
        return f"excluded by {pattern!r}"
    gate = registry.get(parameter)
    if gate is not None:
        gate.check_is_in(options.block)
    block = resolve_block(options.block, parameter) if gate is None else gate.block
    if gate is None and not parameter.requires_grad:
        return "frozen: it has no gradient to judge blocks by"
    windows = list(map(window_of, readers))
    reasons = [_no_gain(parameter.shape, block, window) for window in windows if gate is None]
    if (reason := next(filter(None, reasons), None)) is not None:
        return reason
    types = (parameter.device, x_dtype, parameter.dtype, block)
    families = {kernel_choice.family_of(window, parameter.shape[2:]) for window in windows}
    reasons = [kernel_choice.why_no_kernel(*types, family=family, strict=options.strict) for family in families]
    return next(filter(None, reasons), None)


def _no_gain(shape: Sequence[int], block: Block, window: Window | None) -> str | None:
    return (None if window is None else no_room(shape, block, window.groups)) or too_small(shape, block)


def _product(node: fx.Node) -> ProductCost:
    x, weight = (operand.meta["example_value"] for operand in operands(node)[:2])
    positions = x if node.target in TRANSPOSED else node.meta["example_value"]
    inputs = x.shape[-1] if is_matmul(node) else weight[:1].numel()
    flops = expression(2 * positions.numel() * inputs)
    return ProductCost(flops, flops if x.requires_grad else 0, flops if weight.requires_grad else 0)


def _parameter_name(node: fx.Node) -> str:
    text = source_name(node)
    parts = re.findall(r"_(?:modules|parameters)\['([^']+)'\]", text)
    return ".".join(parts) if parts else text


def _name_by_module(node: fx.Node) -> str:
    return f"{module_path(node)}.weight" if node.meta.get("nn_module_stack") else node.name


def _source_line(node: fx.Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""
