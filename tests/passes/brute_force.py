"""Who feeds and reads whom, found by trying: change some channels, run the graph, see whose input changes.

Every product is cut: what it returns is given, not computed, so that a change goes no further than to the next ones.
"""

import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from ctrlcompile.passes.find_coupling import CHECKPOINT, find_coupling
from ctrlcompile.passes.graph_edit import scopes
from ctrlcompile.passes.layer_nodes import is_conv, is_linear, is_matmul, operands

TRIALS = 3  # a change may hide behind a ReLU
Found = list[frozenset[int] | None]
Lines = tuple[int, int]  # channels, and how many make a block


class Cut(fx.Interpreter):
    """Runs a graph with given outputs of the products; keeps what goes into the products, and what comes out."""

    def __init__(self, gm: fx.GraphModule, products: Mapping[str, Tensor | None], prefix: str = "") -> None:
        super().__init__(gm)
        self.products, self.prefix = products, prefix
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node):
        name = f"{self.prefix}{node.name}"
        if name not in self.products:
            return super().run_node(node)
        x, _, bias = operands(node)
        self.inputs[name] = self.env[x].clone()
        given = self.products[name]
        self.outputs[name] = super().run_node(node) if given is None else given
        # What an addmm adds is no part of its product.
        added = self.env[bias] if given is not None and bias is not None and is_matmul(node) else 0
        return self.outputs[name] + added

    def call_function(self, target, args, kwargs):
        if target is not CHECKPOINT:
            return super().call_function(target, args, kwargs)
        (prefix,) = (scope.prefix for scope in scopes(self.module) if scope.gm is args[0])
        body = Cut(args[0], self.products, prefix)
        result = body.run(*args[1:])
        self.inputs.update(body.inputs)
        self.outputs.update(body.outputs)
        return result


class Graph:
    """Dynamo's graph of a model in float64, with blocks of random sizes for its products.

    Products in modules named in `dense` are none of the gated ones. `rows` and `columns` are in the coupling's order.
    """

    def __init__(
        self, model: nn.Module, draw: Callable[[], Tensor], dense: str = "", dynamic: bool | None = None
    ) -> None:
        def capture(gm, example_inputs):
            self.gm, self.arguments = gm, [t.detach() if isinstance(t, Tensor) else int(t) for t in example_inputs]
            return gm.forward

        self.draw, x = draw, draw()
        with torch.no_grad():
            torch.compile(model.double().eval(), backend=capture, dynamic=dynamic)(x)
        (self.data,) = (
            i for i, t in enumerate(self.arguments) if isinstance(t, Tensor) and t.data_ptr() == x.data_ptr()
        )
        self.axes: dict[str, int] = {}  # the dimension of the channels, from the right
        self.layers: dict[str, tuple[int, tuple[int, int]]] = {}
        self.grids: dict[str, tuple[Lines, Lines]] = {}  # of rows and of columns
        weights: dict[fx.Node, tuple[int, tuple[int, int]]] = {}
        for scope in scopes(self.gm):
            for node in scope.gm.graph.nodes:
                product = is_linear(node) or is_matmul(node) or is_conv(node)
                if product and not (dense and dense in str(node.meta["nn_module_stack"])):
                    weight = scope.outer(operands(node)[1])
                    shape = weight.meta["example_value"].shape
                    block = tuple(random.randint(max(2, side // 3), max(2, side // 2)) for side in shape[:2])
                    name = f"{scope.prefix}{node.name}"
                    self.layers[name] = weights.setdefault(weight, (len(weights), block))
                    sides = tuple(zip(shape, self.layers[name][1], strict=False))
                    self.grids[name] = sides[::-1] if is_matmul(node) else sides
                    self.axes[name] = 1 - len(shape)
        self.coupling = find_coupling(self.gm, self.layers)
        cut = self.run(dict.fromkeys(self.layers), x)[0]
        self.out_shapes = {name: value.shape for name, value in cut.outputs.items()}
        self.rows, self.columns = self._places(0), self._places(1)

    def _places(self, side: int) -> list[tuple[int, int]]:
        counts = {}
        for name, (number, _) in self.layers.items():
            channels, width = self.grids[name][side]
            counts[number] = -(-channels // width)
        return [(number, place) for number in sorted(counts) for place in range(counts[number])]

    def run(self, given: Mapping[str, Tensor | None], data: Tensor) -> tuple[Cut, list[Tensor]]:
        """What went through the products, and the graph's outputs."""
        arguments = [t.clone() if isinstance(t, Tensor) else t for t in self.arguments]
        arguments[self.data] = data
        cut = Cut(self.gm, given)
        with torch.no_grad():
            outputs = cut.run(*arguments)
        return cut, [t for t in outputs if isinstance(t, Tensor)]

    def random(self) -> dict[str, Tensor]:
        """Outputs of the products that vary with everything."""
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in self.out_shapes.items()}

    def constant(self) -> dict[str, Tensor]:
        """Outputs of the products that vary with the channel alone."""
        given = {}
        for name, shape in self.out_shapes.items():
            values = torch.randn(shape[self.axes[name]], dtype=torch.float64)
            given[name] = values.view([-1] + [1] * (-1 - self.axes[name])).expand(shape).contiguous()
        return given

    def with_row(self, given: dict[str, Tensor], row: tuple[int, int]) -> dict[str, Tensor]:
        """The same with other values, that vary with everything, in the channels of one block row."""
        changed = dict(given)
        for name, (number, _) in self.layers.items():
            if number == row[0]:
                (_, height), _ = self.grids[name]
                here = slice(row[1] * height, (row[1] + 1) * height)
                changed[name] = given[name].movedim(self.axes[name], 0).clone()
                changed[name][here] = 4 * torch.randn_like(changed[name][here])
                changed[name] = changed[name].movedim(0, self.axes[name]).contiguous()
        return changed

    def readers(self) -> Found:
        """For each row, the columns whose input changes with its channels; None where the graph's output does too."""
        found = [[self._reading(row) for _ in range(TRIALS)] for row in self.rows]
        return [None if None in trials else frozenset().union(*trials) for trials in found]

    def _reading(self, row: tuple[int, int]) -> set[int] | None:
        given, data = self.random(), self.draw()
        before, out = self.run(given, data)
        after, other = self.run(self.with_row(given, row), data)
        if not all(torch.equal(a, b) for a, b in zip(out, other, strict=True)):
            return None
        return self._columns_where({name: before.inputs[name] != after.inputs[name] for name in given})

    def feeders(self) -> Found:
        """For each column, the rows that change its input where all others are constant; None: the data does too."""
        always, *rows = (set().union(*(self._varying(row) for _ in range(TRIALS))) for row in (None, *self.rows))
        return [
            None if column in always else frozenset(i for i, varying in enumerate(rows) if column in varying)
            for column in range(len(self.columns))
        ]

    def _varying(self, row: tuple[int, int] | None) -> set[int]:
        given = self.constant()
        runs = [self.run(given if row is None else self.with_row(given, row), self.draw())[0].inputs for _ in range(2)]
        return self._columns_where({name: (runs[0][name] - runs[1][name]).abs() > 1e-9 for name in given})

    def _columns_where(self, differ: Mapping[str, Tensor]) -> set[int]:
        """The columns that see any of the entries of the products' inputs that `differ`."""
        found = set()
        for name, (number, _) in self.layers.items():
            _, (inputs, width) = self.grids[name]
            channels = differ[name].movedim(self.axes[name], 0).flatten(1).any(1)
            in_any_group = channels.view(-1, inputs).any(0)
            places = {place for place, part in enumerate(in_any_group.split(width)) if part.any()}
            found |= {self.columns.index((number, place)) for place in places}
        return found
