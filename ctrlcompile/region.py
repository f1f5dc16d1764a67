"""One compiled graph at run time: finds the gates of the Parameters it is called with and runs the graph with them.

Dynamo's graph is copied, gated and handed to Inductor. Two instances of a class share this region, so nothing here
belongs to a Parameter: gates come from the registry at each call. Where an instance is gated otherwise than the graph
was compiled for (other blocks, other layers), another lowering is built and kept beside it.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

from ctrlcompile import cost, follow, ops
from ctrlcompile.gate import Block, Gate, name_excluded, registry, too_small
from ctrlcompile.options import Options
from ctrlcompile.passes import passes_for, run
from ctrlcompile.passes.graph_edit import argument, copy_graph, is_linear

logger = logging.getLogger(__name__)

Lower = Callable[[fx.GraphModule, Sequence[Any], bool], Callable[..., Any]]
Division = tuple[Block | None, ...]  # the block of each weight of a region, None where it has no gate


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
    source: str
    x_dtype: torch.dtype
    reason: str | None


@dataclass(frozen=True)
class Variant:
    """One lowering: the compiled graph, and which weights' gates it takes after Dynamo's arguments."""

    run: Callable[..., Any]
    gated: tuple[int, ...]


@dataclass(frozen=True)
class Visit:
    """What `watch` sees of one call: the region, its weights' Parameters and gates, its FLOPs at these sizes."""

    region: "Region"
    parameters: tuple[Tensor, ...]
    gates: tuple[Gate | None, ...]
    cost: cost.BoundCost


class Region:
    """A graph of Dynamo's, lowered with its gates. Called with Dynamo's arguments, which hold the live Parameters."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, lower: Lower) -> None:
        self.options = options
        self._gm, self._lower = gm, lower
        self.weights, self.linears = _find_linears(gm, example_inputs, options)
        products = [_product(gm, linear) for linear in self.linears]
        symbols, self._size_positions = cost.symbols_of(gm)
        self._cost = cost.RegionCost(cost.region_flops(gm), tuple(products), symbols)
        gates = self._gates(example_inputs)
        self._variants: dict[Any, Variant] = {_division(gates): self._build(gates, example_inputs)}

    def __call__(self, *args: Any) -> Any:
        gates = self._gates(args)
        variant = self._variants.get(_division(gates)) or self._late_variant(gates, args)
        if _watcher.visits is not None:
            parameters = tuple(args[weight.position] for weight in self.weights)
            _watcher.visits.append(Visit(self, parameters, tuple(gates), self._bind(args)))
        elif torch.is_grad_enabled() and cost.meter.listening:
            cost.meter.record(self._bind(args), self._gates_by_linear(gates))
        inputs: list[Tensor] = []
        for index in variant.gated:
            gate = gates[index]
            assert gate is not None  # the variant was built for this division
            inputs.extend(gate.inputs)
        return variant.run(*args, *inputs)

    def _gates(self, args: Sequence[Any]) -> list[Gate | None]:
        gates = []
        for weight in self.weights:
            parameter = args[weight.position]
            gate = registry.get(parameter)
            if gate is None and weight.reason is None and registry.refusal(parameter) is None:
                gate = registry.get_or_create(parameter, self.options.block, weight.name)
            if gate is not None and self.options.budget is not None:
                follow.adopt(gate, self.options)
            gates.append(gate)
        return gates

    def _gates_by_linear(self, gates: Sequence[Gate | None]) -> list[Gate | None]:
        return [None if linear.weight is None else gates[linear.weight] for linear in self.linears]

    def _bind(self, args: Sequence[Any]) -> cost.BoundCost:
        return self._cost.bind(tuple(int(args[position]) for position in self._size_positions))

    def _build(self, gates: Sequence[Gate | None], args: Sequence[Any], *, late: bool = False) -> Variant:
        gm = copy_graph(self._gm)
        if late:
            gm.meta.pop("dynamo_compile_id", None)  # outside Dynamo: no guards to serve, sizes as they are
        blocks = {
            linear.node: gate.block
            for linear, gate in zip(self.linears, self._gates_by_linear(gates), strict=True)
            if gate is not None
        }
        gm = run(gm, args, passes_for(blocks))
        by_position = {weight.position: index for index, weight in enumerate(self.weights)}
        gated = tuple(by_position[position] for position in gm.meta["gated_weights"])
        extra = [tensor for index in gated if (gate := gates[index]) is not None for tensor in _example(gate, late)]
        return Variant(self._lower(gm, [*args, *extra], late), gated)

    def _late_variant(self, gates: Sequence[Gate | None], args: Sequence[Any]) -> Variant:
        key = (_division(gates), tuple(tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in args))
        variant = self._variants.get(key)
        if variant is None:
            logger.info("another instance is gated otherwise than the graph was compiled for: lowering it again")
            variant = self._variants[key] = self._build(gates, args, late=True)
        return variant


class _Watcher:
    visits: list[Visit] | None = None


_watcher = _Watcher()


@contextlib.contextmanager
def watch() -> Iterator[list[Visit]]:
    """Collects a `Visit` for each region called inside; such calls do not count towards a budget."""
    if _watcher.visits is not None:
        raise RuntimeError("explain is running already")
    _watcher.visits = visits = []
    try:
        yield visits
    finally:
        _watcher.visits = None


def _example(gate: Gate, late: bool) -> list[Tensor]:
    """A gate's tensors as the compiler sees them: their sizes stay what they are when the batch becomes a symbol."""
    tensors = list(gate.inputs)
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and not late else None
    return tensors if mode is None else [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def _division(gates: Sequence[Gate | None]) -> Division:
    return tuple([None if gate is None else gate.block for gate in gates])


def _find_linears(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[list[Weight], list[LinearNode]]:
    position = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    weights: list[Weight] = []
    index_of: dict[fx.Node, int] = {}
    linears: list[LinearNode] = []
    for node in gm.graph.nodes:
        if not is_linear(node):
            continue
        weight = argument(node, 1, "weight")
        dtype = node.meta["example_value"].dtype
        index, reason, name = None, None, _fallback_name(node)
        if weight in position and isinstance(example_inputs[position[weight]], torch.nn.Parameter):
            if weight not in index_of:
                parameter = example_inputs[position[weight]]
                name = _parameter_name(weight)
                reason = _why_dense(weight, parameter, name, dtype, options)
                index_of[weight] = len(weights)
                weights.append(Weight(position[weight], name, reason))
            index = index_of[weight]
            name, reason = weights[index].name, weights[index].reason
        else:
            reason = "its weight is computed in the graph (a parametrization, say), not a Parameter"
        linears.append(LinearNode(node.name, index, name, _source_line(node), dtype, reason))
    for prefix, body in gm.named_modules():
        if prefix and isinstance(body, fx.GraphModule):
            for node in filter(is_linear, body.graph.nodes):
                reason = "inside a higher-order operator, such as activation checkpointing"
                name = _fallback_name(node)
                linears.append(
                    LinearNode(f"{prefix}.{node.name}", None, name, _source_line(node), torch.float32, reason)
                )
    return weights, linears


def _why_dense(node: fx.Node, parameter: Tensor, name: str, x_dtype: torch.dtype, options: Options) -> str | None:
    """Why a weight gets no gate of the backend's own accord; None: it gets one."""
    if not all(is_linear(user) and argument(user, 1, "weight") is node for user in node.users):
        registry.refuse(parameter, "shared with another kind of layer, such as an embedding")
    if (refusal := registry.refusal(parameter)) is not None:
        return refusal
    if (pattern := name_excluded(name, options.exclude)) is not None:
        return f"excluded by {pattern!r}"
    gate = registry.get(parameter)
    block = options.block if gate is None else gate.block
    if gate is None and not parameter.requires_grad:
        return "frozen: it has no gradient to judge blocks by"
    if gate is None and (reason := too_small(tuple(parameter.shape), block)) is not None:
        return reason
    return ops.why_no_kernel(parameter.device, x_dtype, parameter.dtype, block, strict=options.strict)


def _product(gm: fx.GraphModule, linear: LinearNode) -> cost.ProductCost:
    node = next((node for node in gm.graph.nodes if node.name == linear.node), None)
    return cost.ProductCost(0, 0, 0) if node is None else cost.product_cost(node)


def _parameter_name(node: fx.Node) -> str:
    source = node._dynamo_source  # type: ignore[attr-defined]
    text = source.name() if callable(source.name) else source.name
    parts = re.findall(r"_(?:modules|parameters)\['([^']+)'\]", text)
    return ".".join(parts) if parts else text


def _fallback_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return re.sub(r"^L\['\w+'\]\.?", "", paths[-1]) + ".weight" if paths else node.name


def _source_line(node: fx.Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""
