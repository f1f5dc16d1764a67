"""Finds which block rows of gated weights feed which block columns of others, and what else feeds or reads either.

Not a pass: it changes nothing, and reads Dynamo's graph before the passes do. A row feeds a column when the output
channels of the one can change the input channels of the other without passing through a gated product. That one
relation answers both questions that the controller has: whether a column reads anything else than given rows, and
whether a row is read by anything else than given columns (`ctrlcompile.controller.coupling` says what follows).

The graph is walked once, and every value gets labels (`channels`) that say, element by element, on which groups of
channels it depends; `channel_rules` has what each operator does to them. An operator without a rule mixes everything
that it is given. Errors are to one side: where the walk is not exact, rows and columns have more feeders and readers
than in truth, and are never useless.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import networkx as nx
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from ctrlcompile.controller.coupling import Coupling, Heads, Members, Sets
from ctrlcompile.kernels import cpu_averages
from ctrlcompile.passes.channel_rules import IN_PLACE, NEW_MEMORY, RULES, Call, Labels, with_constants
from ctrlcompile.passes.channels import CONSTANT, INPUT, LARGEST, OUTPUT, Channels
from ctrlcompile.passes.graph_edit import CHECKPOINT, argument, source_name
from ctrlcompile.passes.layer_nodes import is_matmul, operands
from ctrlcompile.passes.moved_channels import MovedChannels
from ctrlcompile.passes.skip_heads import OPERANDS, is_attention

Layers: TypeAlias = Mapping[str, tuple[int, tuple[int, int]]]
ByHead: TypeAlias = list[list[int]]  # labels
Place: TypeAlias = tuple[int, int]  # of a block row or column: number of the weight, number in the weight's grid

SHAPES = (
    "device",
    "dim",
    "dtype",
    "is_cuda",
    "ndim",
    "ndimension",
    "nelement",
    "numel",
    "requires_grad",
    "shape",
    "size",
)


def find_coupling(gm: fx.GraphModule, layers: Layers) -> Coupling | None:
    """How the gated weights of one of Dynamo's graphs are coupled; None where that tells nothing.

    layers: the gated nodes, named as `graph_edit.scopes` does; for each the number of its weight and the sides of the
        weight's blocks in channels. Rows are outputs and columns inputs, also of a weight stored [in, out]; all nodes
        of a weight read it the same way round.
    """
    walk = _Walk(layers)
    walk.run(gm)
    rows, columns = sorted(walk.rows), sorted(walk.columns)
    of_rows = [walk.rows[place] for place in rows]
    graph = walk.channels.graph
    carried = nx.subgraph_view(graph, filter_edge=lambda before, after: graph.edges[before, after]["carries"])
    feeds = _leading_to(columns, of_rows, INPUT, carried)
    reads = _leading_to(of_rows, columns, OUTPUT, graph.reverse(copy=False))
    if not any(feeds) and not any(reads) and not walk.heads:
        return None
    heads = {}
    for name, (values, weights, outputs) in walk.heads.items():
        feeding_values, feeding_weights = (_each(labels, of_rows, INPUT, carried) for labels in (values, weights))
        reading = _each(outputs, columns, OUTPUT, graph.reverse(copy=False))
        heads[name] = Heads(feeding_values, feeding_weights, reading)
    numbers = range(1 + max((weight for weight, _ in rows), default=-1))
    grid = [tuple(sum(place[0] == weight for place in places) for weight in numbers) for places in (rows, columns)]
    return Coupling(grid[0], grid[1], Sets.from_members(feeds), Sets.from_members(reads), heads)


def _each(targets: Sequence[Sequence[int]], members: Sequence[Any], other: Any, graph: nx.DiGraph) -> Sets:
    """For each list of targets, which `members` lead to any of them."""
    leading = iter(_leading_to([label for labels in targets for label in labels], members, other, graph))
    found = [[next(leading) for _ in labels] for labels in targets]
    return Sets.from_members(
        None if None in sets else frozenset().union(*(members for members in sets if members is not None))
        for sets in found
    )


def _leading_to(targets: Sequence[Any], members: Sequence[Any], other: Any, graph: nx.DiGraph) -> list[Members]:
    """For each target, which `members` lead to it; None where `other` does too."""
    bits = {node: 1 << at for at, node in enumerate([*members, other])}
    leading: dict[Any, int] = {}
    for node in nx.topological_sort(graph):
        leading[node] = bits.get(node, 0)
        for before in graph.predecessors(node):
            leading[node] |= leading[before]
    sets: dict[int, Members] = {}
    for found in {leading[target] for target in targets}:
        sets[found] = None if found & bits[other] else frozenset(_ones(found))
    return [sets[leading[target]] for target in targets]


def _ones(bits: int) -> Iterator[int]:
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


class _Walk:
    """Labels for every value of a graph, in order; and the channel groups that they name."""

    def __init__(self, layers: Layers) -> None:
        self.channels = Channels()
        self.rows: dict[Place, int] = {}
        self.columns: set[Place] = set()
        self.heads: dict[str, tuple[ByHead, ByHead, ByHead]] = {}  # of values, of weights, of what comes out
        self._moved = MovedChannels(self._sizes, (*SHAPES, getattr, CHECKPOINT, F.scaled_dot_product_attention))
        self._layers = layers
        self._values: dict[fx.Node, Labels] = {}
        self._memory: dict[fx.Node, fx.Node] = {}  # the first value in whose memory another one may lie
        self._primes: dict[sympy.Symbol, int] = {}

    def run(self, gm: fx.GraphModule, prefix: str = "") -> Any:
        """Walks a graph; the body of a checkpoint once its inputs have labels. Returns what its output returns."""
        for node in gm.graph.nodes:
            if node.op == "output":
                if not prefix:
                    for value in node.all_input_nodes:
                        self._write(self._values[value])
                return node.args[0]
            if node.op == "placeholder" and prefix:
                continue
            self._memory[node] = node
            self._values[node] = self._fitting(node, self._labels(gm, node, prefix))
            self._moved.follow(node)
            if self._layers and is_attention(node) and self._can_average(node):
                self.heads[f"{prefix}{node.name}"] = self._by_head(node)
            self._mutate(node)
        raise AssertionError("a graph has an output")

    def _labels(self, gm: fx.GraphModule, node: fx.Node, prefix: str) -> Labels | None:
        if node.op == "placeholder":
            return torch.tensor(CONSTANT if self._is_constant(node) else INPUT)
        if node.op == "get_attr" or _is_shape(node):
            return torch.tensor(CONSTANT)
        name = f"{prefix}{node.name}"
        if name in self._layers:
            return self._gated(node, *self._layers[name])
        body = node.args[0] if node.target is CHECKPOINT else None
        if isinstance(body, fx.Node) and len(body.users) == 1:
            return self._body(getattr(gm, body.target), node.args[1:], f"{prefix}{body.target}.")  # type: ignore[arg-type]
        if node.all_input_nodes and (node.target not in NEW_MEMORY or _written(node)):
            self._memory[node] = self._memory[node.all_input_nodes[0]]
        rule = RULES.get(node.target) or IN_PLACE.get(node.target)
        return None if rule is None else rule(Call(node, self.channels, self._values, self._sizes))

    def _fitting(self, node: fx.Node, labels: Labels | None) -> Labels:
        """Labels of the shape that the node's value has, or one for everything that the call is given."""
        sizes = self._sizes(node)
        if isinstance(labels, list) or (labels is not None and labels.dim() == 0):
            return labels
        if labels is not None and sizes is not None and labels.dim() == len(sizes):
            wrong = [have for have, size in zip(labels.shape, sizes, strict=True) if have not in (1, size)]
            if not wrong:
                return labels
        return self.channels.all_of(t for value in node.all_input_nodes for t in _tensors(self._values[value]))

    def _can_average(self, attention: fx.Node) -> bool:
        return cpu_averages.library(attention.meta["example_value"].dtype) is not None

    def _by_head(self, attention: fx.Node) -> tuple[ByHead, ByHead, ByHead]:
        """The labels of each of an attention's heads."""
        query, key, value = (argument(attention, position, name) for position, name in enumerate(OPERANDS))
        if all(self._moved.same_along(node, 2) for node in (query, key)):
            weights = [one + other for one, other in zip(*map(self._of_heads, (query, key)), strict=True)]
        else:
            weights = [[INPUT]] * len(self._of_heads(query))
        return self._of_heads(value), weights, self._of_heads(attention)

    def _of_heads(self, node: fx.Node) -> ByHead:
        """The labels of each head of an attention's operand, or of what comes out."""
        sizes, labels = self._sizes(node), self._values[node]
        assert sizes is not None
        assert isinstance(labels, Tensor)
        if labels.dim() < 4:
            return [labels.unique().tolist()] * sizes[1]
        by_head = labels.movedim(1, 0).expand(sizes[1], *labels.shape[:1], *labels.shape[2:]).flatten(1)
        return [head.unique().tolist() for head in by_head]

    def _body(self, gm: fx.GraphModule, args: Sequence[Any], prefix: str) -> list[Tensor]:
        for inner, outer in zip(gm.graph.find_nodes(op="placeholder"), args, strict=True):
            self._values[inner], self._memory[inner] = self._values[outer], self._memory[outer]
            self._moved.pass_on(outer, inner)
        returned = self.run(gm, prefix)
        values = returned if isinstance(returned, (list, tuple)) else (returned,)
        found = [self._values[v] if isinstance(v, fx.Node) else torch.tensor(CONSTANT) for v in values]
        return [self.channels.all_of(value) if isinstance(value, list) else value for value in found]

    def _gated(self, node: fx.Node, weight: int, block: tuple[int, int]) -> Tensor | None:
        """Reads the input by block columns, and starts anew with the labels of the block rows."""
        x, parameter, bias = operands(node)
        sizes, shape, out = self._sizes(x), self._sizes(parameter), self._sizes(node)
        assert sizes is not None
        assert shape is not None
        assert out is not None
        axis = len(sizes) - len(shape) + 1
        (outputs, inputs), (height, width) = shape[:2], block
        if is_matmul(node):
            outputs, inputs, height, width = inputs, outputs, width, height
        call = Call(node, self.channels, self._values, self._sizes)
        labels = call.labels(x).movedim(axis, 0)
        labels = labels.expand(sizes[axis], *labels.shape[1:]).unflatten(0, (-1, inputs))
        for column, start in enumerate(range(0, inputs, width)):
            self.columns.add((weight, column))
            self.channels.graph.add_node((weight, column))
            self.channels.read(labels[:, start : start + width], (weight, column))
        rows = range(-(-outputs // height))
        for row in rows:
            if (weight, row) not in self.rows:
                self.rows[weight, row] = self.channels.new()
        of_channel = torch.tensor([self.rows[weight, row] for row in rows]).repeat_interleave(height)[:outputs]
        labels = of_channel.view([outputs if dim == axis else 1 for dim in range(len(out))])
        plain = bias is None or not is_matmul(node)
        if plain or (self._sizes(bias) or [])[:-1] in ([], [1]):  # what is added is the same for each row
            self._moved.start(node, axis)
        if plain:
            return labels
        # What an addmm adds need be no bias: it may be anything that the graph computes.
        return with_constants(call, self.channels.joined(labels, call.labels(bias)), [bias])

    def _mutate(self, node: fx.Node) -> None:
        """What an operator writes into shows in every value that may lie in the same memory."""
        for target in _written(node):
            labels = self._values[node]
            first = self._memory[target]
            if first.op in ("placeholder", "get_attr"):
                self._write(labels)
            self._moved.forget(other for other, memory in self._memory.items() if memory is first)
            everything = self.channels.all_of(_tensors(labels))
            for other, memory in self._memory.items():
                if memory is first and other is not node:
                    value = self._values[other]
                    same = other is target and isinstance(value, Tensor) and isinstance(labels, Tensor)
                    self._values[other] = labels if same else self._with(value, everything)

    def _with(self, value: Labels, label: Tensor) -> Labels:
        if isinstance(value, list):
            return [self.channels.joined(labels, label) for labels in value]
        return self.channels.joined(value, label)

    def _write(self, labels: Labels) -> None:
        for tensor in _tensors(labels):
            self.channels.read(tensor, OUTPUT)

    def _is_constant(self, placeholder: fx.Node) -> bool:
        """Whether an input of the graph is a Parameter, a buffer or a number, and no data."""
        if self._sizes(placeholder) is None:
            return True
        name = source_name(placeholder)
        return "._parameters[" in name or "._buffers[" in name

    def _sizes(self, value: Any) -> list[int] | None:
        """The shape of a value, with a large prime for each symbol; None for what is no tensor."""
        example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
        return [self._size(size) for size in example.shape] if isinstance(example, Tensor) else None

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in expression.free_symbols:
            self._primes.setdefault(symbol, sympy.nextprime(max([LARGEST, *self._primes.values()])))
        return int(expression.subs(self._primes))


def _tensors(labels: Labels) -> list[Tensor]:
    return labels if isinstance(labels, list) else [labels]


def _is_shape(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target
    return node.op.startswith("call") and name in SHAPES


def _written(node: fx.Node) -> list[fx.Node]:
    """The values that a call writes into."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if isinstance(node.target, HigherOrderOperator):
        return [] if node.target is CHECKPOINT else node.all_input_nodes
    if isinstance(node.target, OpOverload):
        return node.all_input_nodes if node.target._schema.is_mutable else []
    named = name.endswith("_") and not name.endswith("__") and node.target not in RULES
    in_place = named or name in ("setitem", "__setitem__") or node.target in IN_PLACE or node.kwargs.get("inplace")
    out = node.kwargs.get("out")
    return [*(node.all_input_nodes[:1] if in_place else ()), *([out] if isinstance(out, fx.Node) else ())]
