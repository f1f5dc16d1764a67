"""One compiled graph at run time: finds the gates of the Parameters it is called with and runs the graph with them.

Dynamo's graph is copied, gated and handed to Inductor. Two instances of a class share this region, so nothing here
belongs to a Parameter: gates come from the registry at each call. Where an instance is gated otherwise than the graph
was compiled for (other blocks, other layers), another lowering is built and kept beside it.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

from ctrlcompile import cost, follow, ops, respecialize, run_log
from ctrlcompile.blocks import Block
from ctrlcompile.controller.coupling import Coupled, Coupling
from ctrlcompile.controller.host import on_cpu
from ctrlcompile.gate import Gate, registry
from ctrlcompile.heads import HeadKinds, Kinds, that_may_rest
from ctrlcompile.layers import find_layers
from ctrlcompile.meter import meter, used_flops
from ctrlcompile.options import Options
from ctrlcompile.passes import Change, passes_for, run
from ctrlcompile.passes.find_coupling import find_coupling
from ctrlcompile.passes.graph_edit import copy_graph, scopes
from ctrlcompile.passes.recognise_layers import recognise_layers

logger = logging.getLogger(__name__)

MANY = 4  # lowerings of one graph, from which on users are told

Lower = Callable[[fx.GraphModule, Sequence[Any], bool], Callable[..., Any]]
Division = tuple[Block | None, ...]  # the block of each weight of a region, None where it has no gate


@dataclass(frozen=True)
class Lowering:
    """One lowering: the compiled graph, and which gates and kinds of heads it takes after Dynamo's arguments.

    `read_otherwise` are those of the gates whose weights something else in the graph reads, too. For people: what each
    pass changed, and the activation that a gated layer computes, by its node.
    """

    run: Callable[..., Any]
    gated: tuple[int, ...]
    read_otherwise: tuple[int, ...]
    heads: HeadKinds | None
    changes: tuple[Change, ...]
    activations: dict[str, str]

    def kinds(self, gates: Sequence[Gate | None]) -> Kinds:
        """The kinds of the heads under these gates' masks, of the attentions that take them."""
        return Kinds([], {}) if self.heads is None else self.heads.under(gates)


@dataclass(frozen=True)
class Visit:
    """What `watch` sees of one call: the region and the lowering that ran, its weights' Parameters and gates, its FLOPs
    at these sizes."""

    region: "Region"
    lowering: Lowering
    parameters: tuple[Tensor, ...]
    gates: tuple[Gate | None, ...]
    cost: cost.BoundCost

    @property
    def used_flops(self) -> float:
        """Of a training step in this region, at the present masks and probes."""
        used = used_flops(self.cost, self.region.gates_by_layer(self.gates))
        return used - self.cost.skipped(self.lowering.kinds(self.gates).live_shares)


class Region:
    """A graph of Dynamo's, lowered with its gates. Called with Dynamo's arguments, which hold the live Parameters."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, lower: Lower) -> None:
        self.options = options
        gm, self._recognised = run(copy_graph(gm), example_inputs, [recognise_layers])
        self._gm, self._lower = gm, lower
        self.weights, self.layers = find_layers(gm, example_inputs, options)
        symbols, self._size_positions = cost.symbols_of(gm)
        products, attentions = tuple(layer.product for layer in self.layers), cost.attention_flops(gm)
        self._cost = cost.RegionCost(cost.region_flops(gm), products, symbols, attentions)
        if options.budget is not None and self._cost.uncounted:
            _tell_of_uncounted()
        self._couplings: dict[Division, Coupling | None] = {}
        gates = self._gates(example_inputs)
        self._lowerings: dict[Any, Lowering] = {_division(gates): self._build(gates, example_inputs)}

    def __call__(self, *args: Any) -> Any:
        gates = self._gates(args)
        lowering = self._lowerings.get(_division(gates)) or self._late_lowering(gates, args)
        kinds = lowering.kinds(gates)
        if _watcher.visits is not None:
            parameters = tuple(args[weight.position] for weight in self.weights)
            _watcher.visits.append(Visit(self, lowering, parameters, tuple(gates), self._bind(args)))
        elif torch.is_grad_enabled() and meter.listening:
            gated = self.gates_by_layer(gates)
            for layer, gate in zip(self.layers, gated, strict=True):
                if layer.normalised and gate is not None and layer.transposed == gate.transposed:
                    gate.normalised = True
            bound = self._bind(args)
            skipped = bound.skipped(kinds.live_shares)
            meter.record(bound, gated, self._coupled(gates), skipped, self.options.budget is not None)
            for log in tuple(run_log.graphless):
                log.see(lowering.changes[-1].outlines[1], self.gates_by_node(gates))
        for index in lowering.read_otherwise:
            if (gate := gates[index]) is not None:
                gate.read_otherwise = True
        inputs: list[Tensor] = []
        for index in lowering.gated:
            gate = gates[index]
            assert gate is not None  # the lowering was built for this division
            inputs.extend(gate.inputs)
        return lowering.run(*args, *inputs, *kinds.inputs)

    def _gates(self, args: Sequence[Any]) -> list[Gate | None]:
        if not _watcher.gated:
            return [None] * len(self.weights)
        gates = []
        for weight in self.weights:
            parameter = args[weight.position]
            gate = None if weight.excluded else registry.get(parameter)
            if gate is not None and weight.reason is not None and not weight.had_gate and not gate.updates:
                gate = None  # somebody looks at the gates: no reason to lower the graph again
            if gate is None and weight.reason is None and registry.refusal(parameter) is None:
                gate = registry.get_or_create(parameter, self.options.block, weight.name, weight.transposed)
            if gate is not None:
                gate.settle()
                respecialize.adopt(gate, self.options.respecialize)
                if self.options.budget is not None:
                    follow.adopt(gate, self.options)
            gates.append(gate)
        if self.options.budget is not None:
            follow.ran(gated=any(gate is not None for gate in gates))
        return gates

    def gates_by_layer(self, gates: Sequence[Gate | None]) -> list[Gate | None]:
        """Those of the weights, in the order of the layers; None where a layer is not gated."""
        return [layer.gate_among(gates) for layer in self.layers]

    def gates_by_node(self, gates: Sequence[Gate | None]) -> dict[str, Gate]:
        """Those of the gated layers, by the layer's node."""
        pairs = zip(self.layers, self.gates_by_layer(gates), strict=True)
        return {layer.node: gate for layer, gate in pairs if gate is not None}

    def _coupled(self, gates: Sequence[Gate | None]) -> Coupled | None:
        """How these gates are coupled in this graph; found when an attention or a controller first asks."""
        division = _division(gates)
        if division not in self._couplings:
            pairs = list(zip(self.layers, self.gates_by_layer(gates), strict=True))
            # A weight may be read both as [out, in] and as [in, out].
            dense = self._read_densely(gates)
            dense |= {layer.weight for layer, gate in pairs if gate and layer.transposed != gate.transposed}
            gated = {
                layer.node: (layer.weight, gate.block)
                for layer, gate in pairs
                if gate is not None and layer.weight is not None and layer.weight not in dense
            }
            self._couplings[division] = None
            try:
                self._couplings[division] = on_cpu(find_coupling)(self._gm, gated)
            except Exception as error:
                if self.options.strict:
                    raise
                why = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"ctrlcompile judges a graph's layers each by itself: {why}", RuntimeWarning, stacklevel=2
                )
        coupling = self._couplings[division]
        return None if coupling is None else (coupling, tuple(gates[: len(coupling.rows)]))

    def _read_densely(self, gates: Sequence[Gate | None]) -> set[int | None]:
        """The weights that a layer without a gate reads: one may have room for the gate's blocks and another not."""
        pairs = zip(self.layers, self.gates_by_layer(gates), strict=True)
        return {layer.weight for layer, gate in pairs if gate is None}

    def _bind(self, args: Sequence[Any]) -> cost.BoundCost:
        return self._cost.bind(tuple(int(args[position]) for position in self._size_positions))

    def _build(self, gates: Sequence[Gate | None], args: Sequence[Any], *, late: bool = False) -> Lowering:
        gm = copy_graph(self._gm)
        if late:
            gm.meta.pop("dynamo_compile_id", None)  # outside Dynamo: no guards to serve, sizes as they are
        blocks = {node: gate.block for node, gate in self.gates_by_node(gates).items()}
        coupled = self._coupled(gates) if self._cost.attentions and blocks else None
        gm, changes = run(gm, args, passes_for(blocks, that_may_rest(coupled and coupled[0])), self._recognised)
        by_position = {weight.position: index for index, weight in enumerate(self.weights)}
        gated = tuple(by_position[position] for position in gm.meta["gated_weights"])
        densely = self._read_densely(gates)
        otherwise = tuple(i for i in gated if i in densely or self.weights[i].read_otherwise)
        attentions = gm.meta["skipped_heads"]
        heads = HeadKinds(coupled[0], attentions) if coupled and attentions else None
        tensors = [tensor for index in gated if (gate := gates[index]) is not None for tensor in gate.inputs]
        extra = _examples([*tensors, *(heads.under(gates).inputs if heads else ())], late)
        nodes = [node for scope in scopes(gm) for node in scope.gm.graph.nodes if "layer" in node.meta]
        activations = {node.meta["layer"]: ops.activation_of(node) or "none" for node in nodes}
        return Lowering(self._lower(gm, [*args, *extra], late), gated, otherwise, heads, changes, activations)

    def _late_lowering(self, gates: Sequence[Gate | None], args: Sequence[Any]) -> Lowering:
        key = (_division(gates), tuple(tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in args))
        lowering = self._lowerings.get(key)
        if lowering is None:
            logger.info("gated otherwise than the graph was compiled for (another instance, say): lowering it again")
            if len(self._lowerings) == MANY:
                _tell_of_many()
            lowering = self._lowerings[key] = self._build(gates, args, late=True)
        return lowering


class _Watcher:
    visits: list[Visit] | None = None
    gated = True


_watcher = _Watcher()


@contextlib.contextmanager
def watch(*, gated: bool = True) -> Iterator[list[Visit]]:
    """Collects a `Visit` for each region called inside; such calls do not count towards a budget.

    gated: False leaves the gates out, so that every layer is Inductor's.
    """
    if _watcher.visits is not None:
        raise RuntimeError("explain or profile is running already")
    visits: list[Visit] = []
    _watcher.visits, _watcher.gated = visits, gated
    try:
        yield visits
    finally:
        _watcher.visits, _watcher.gated = None, True


@functools.cache
def _tell_of_many() -> None:
    warnings.warn(
        "ctrlcompile compiles a graph again for each size of its inputs, and keeps all of that: it was compiled for "
        "layers gated otherwise. Make the gates, with the same blocks in all instances of a model, before the first "
        "compiled call",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _tell_of_uncounted() -> None:
    warnings.warn(
        "ctrlcompile leaves out of its budget what is computed with sizes that depend on values in the same graph "
        "(capture_dynamic_output_shape_ops)",
        RuntimeWarning,
        stacklevel=2,
    )


def _examples(tensors: list[Tensor], late: bool) -> list[Tensor]:
    """Our tensors as the compiler sees them: their sizes stay what they are when the batch becomes a symbol."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and not late else None
    return tensors if mode is None else [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def _division(gates: Sequence[Gate | None]) -> Division:
    return tuple([None if gate is None else gate.block for gate in gates])
