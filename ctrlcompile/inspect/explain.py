"""A row per layer of a model: gated or why not, its blocks, density, kernel and share of the FLOPs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.table import Table
from torch import Tensor, nn

from ctrlcompile import kernel_choice, respecialize
from ctrlcompile.blocks import Block
from ctrlcompile.gate import Gate
from ctrlcompile.inspect import tables
from ctrlcompile.inspect.graphs import Graph
from ctrlcompile.inspect.undisturbed import call, check_compiled, undisturbed
from ctrlcompile.layers import Layer
from ctrlcompile.named_gates import GATEABLE, plain
from ctrlcompile.region import Visit, watch
from ctrlcompile.variants import BLOCK_SPARSE

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One layer (a linear, a matmul or a convolution), or one call of it where it is called more than once.

    Attributes:
        name: of its weight, as in `named_parameters()`.
        module: path of the module that calls it; empty for the model itself.
        shape: of its weight, `(out, in)` or `(out, in / groups, *window)`; `(in, out)` where `transposed`.
        gated: whether blocks of it can be switched.
        reason: why it is not; empty when it is.
        block: sides of a block along these dimensions, in features or channels; None when not gated.
        density: active blocks / all blocks; 1.0 when not gated.
        kernel: what computes it.
        flops: of forward and backward in a training step with these inputs, at the present density; 2 per multiply-add.
        dense_flops: the same at density 1.
        source: file and line of the call.
        kernel_sources: the generated source of the block-sparse kernels by role (forward, dgrad, wgrad); empty when
            there are none.
        variants: the variant in force for each role, see `ctrlcompile.variants`; empty when not gated.
        transposed: whether the weight is stored [in, out], as in `x @ weight`.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    gated: bool
    reason: str
    block: Block | None
    density: float
    kernel: str
    flops: float
    dense_flops: float
    source: str
    kernel_sources: dict[str, Path] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)
    transposed: bool = False


@dataclass(frozen=True, repr=False)
class Explanation(tables.Shown):
    """What `explain` found. `str()` is a table.

    Attributes:
        rows: one per layer that ran, then those that did not.
        graphs: one per compiled graph that ran, before and after each pass.
        dense_flops: of the whole training step, dense: every matrix product, gated or not.
        flops: of the same at the present densities, attention's of live heads only.
        model_error: median of |predicted / measured - 1| of what variants were predicted to take; None before any
            prediction could be checked.
    """

    rows: tuple[Row, ...]
    graphs: tuple[Graph, ...]
    dense_flops: float
    flops: float
    model_error: float | None = None

    @property
    def regions(self) -> int:
        """Compiled graphs that ran."""
        return len(self.graphs)

    @property
    def sources(self) -> dict[Path, str]:
        """The generated source of each kernel in force, by its path."""
        paths = dict.fromkeys(path for row in self.rows for path in row.kernel_sources.values())
        return {path: path.read_text() for path in paths}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self) -> str:
        """The rows and the step's FLOPs as JSON."""
        step = {
            "regions": self.regions, "dense_flops": self.dense_flops, "flops": self.flops,
            "model_error": self.model_error,
        }  # fmt: skip
        return json.dumps({"step": step, "rows": [asdict(row) for row in self.rows]}, indent=1, default=str)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("layer", "out x in", "block", "density", "kernel", "source", "share of FLOPs"):
            side: Literal["left", "right"] = "right" if heading in ("density", "share of FLOPs") else "left"
            table.add_column(heading, justify=side, overflow="fold", no_wrap=heading != "kernel")
        for row in self.rows:
            block = f"{row.block[0]} x {row.block[1]}" if row.block else "dense"
            what = row.kernel if row.gated else f"{row.kernel}: {row.reason}"
            what += "".join(f"; {role} {name}" for role, name in row.variants.items() if name != BLOCK_SPARSE.kind)
            shape = (" x ".join(map(str, row.shape)) or "?") + (" (in x out)" if row.transposed else "")
            source = row.source.rsplit("/", 1)[-1]
            table.add_row(row.name, shape, block, f"{row.density:.3f}", what, source, f"{self._share(row.flops):.1%}")
        dense_rest = self.dense_flops - sum(row.dense_flops for row in self.rows)
        rest = self.flops - sum(row.flops for row in self.rows)
        density = f"{rest / dense_rest:.3f}" if dense_rest > 0 else "1.000"
        table.add_row("all else (attention, ...)", "", "dense", density, "Inductor", "", f"{self._share(rest):.1%}")
        gateable = sum(row.dense_flops for row in self.rows if row.gated)
        used = sum(row.flops for row in self.rows if row.gated)
        table.add_section()
        table.add_row(
            f"step: {self.flops / 1e9:.3g} of {self.dense_flops / 1e9:.3g} GFLOP",
            "", "", f"{used / gateable:.3f}" if gateable else "1.000",
            f"{sum(row.gated for row in self.rows)} of {len(self.rows)} layers gated, {self.regions} graphs", "",
            f"{self.flops / self.dense_flops:.1%} of dense" if self.dense_flops else "",
        )  # fmt: skip
        return table

    def _share(self, flops: float) -> float:
        return flops / self.flops if self.flops else 0.0


def explain(model: nn.Module) -> Callable[..., Explanation]:
    """What the backend made of a model: `cc.explain(model)(*inputs)`.

    Runs the compiled model once on these inputs, forward only, as it is (training or evaluation mode); nothing counts
    towards a budget, random state and buffers are put back. FLOPs are those of a training step on such inputs.

    >>> explanation = cc.explain(model)(x)  # doctest: +SKIP
    >>> print(explanation)  # a row per layer  # doctest: +SKIP
    >>> print(explanation.graphs[0])  # what each pass changed, as a diff  # doctest: +SKIP
    >>> explanation.sources  # path -> generated source of each kernel in force  # doctest: +SKIP

    Raises:
        TypeError: not a module.
        ValueError: the model does not run on these inputs.
        RuntimeError: no graph compiled with `backend="ctrlprune"` ran.
    """
    module = plain(model)

    def on(*inputs: Any, **named_inputs: Any) -> Explanation:
        with watch() as visits, undisturbed(module):
            call(model, inputs, named_inputs)
        check_compiled(visits, "explain")
        return _explanation(module, visits)

    return on


def _explanation(module: nn.Module, visits: list[Visit]) -> Explanation:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rows, reached = [], set()
    dense_flops = 0.0
    for visit in visits:
        dense_flops += visit.cost.dense
        region = visit.region
        gates = region.gates_by_layer(visit.gates)
        for layer, gate, (dense, _) in zip(region.layers, gates, visit.cost.products, strict=True):
            parameter = None if layer.weight is None else visit.parameters[layer.weight]
            name = names.get(id(parameter), layer.name)
            reached.add(name)
            activation = visit.lowering.activations.get(layer.node, "none")
            rows.append(_row(name, layer, parameter, gate, activation, dense))
    for prefix, child in module.named_modules():
        weight = child._parameters.get("weight") if isinstance(child, GATEABLE) else None
        name = f"{prefix}.weight" if prefix else "weight"
        if weight is not None and name not in reached and names.get(id(weight)) == name:
            reason = "not in a compiled graph that these inputs reach"
            rows.append(Row(name, prefix, tuple(weight.shape), False, reason, None, 1.0, "not compiled", 0.0, 0.0, ""))
    saved = sum(row.dense_flops - row.flops for row in rows)
    saved += sum(visit.cost.skipped(visit.lowering.kinds(visit.gates).live_shares) for visit in visits)
    graphs = tuple(Graph(visit.lowering.changes, _densities(visit)) for visit in visits)
    return Explanation(tuple(rows), graphs, dense_flops, dense_flops - saved, respecialize.model_error())


def _densities(visit: Visit) -> dict[str, float]:
    return {node: gate.density for node, gate in visit.region.gates_by_node(visit.gates).items()}


def _row(name: str, layer: Layer, parameter: Tensor | None, gate: Gate | None, activation: str, dense: float) -> Row:
    shape, where = () if parameter is None else tuple(parameter.shape), layer.source
    if gate is None or parameter is None:
        why = layer.reason or "no gate"
        return Row(
            name, layer.module, shape, False, why, None, 1.0, "Inductor", dense, dense, where,
            transposed=layer.transposed,
        )  # fmt: skip
    types = (parameter.device, layer.x_dtype, parameter.dtype)
    reason = kernel_choice.why_no_kernel(*types, gate.block, activation, family=layer.family)
    kernel = kernel_choice.kernel_name(*types) if reason is None else f"dense ({reason})"
    sources = kernel_choice.kernel_sources(*types, gate.block, activation, layer.family)
    used = dense * gate.active_share
    variants = respecialize.in_force(gate) if reason is None else {}
    if layer.transposed:
        sources, variants = _exchanged(sources), _exchanged(variants)
    return Row(
        name, layer.module, shape, True, "", gate.block, gate.density, kernel, used, dense, where, sources, variants,
        layer.transposed,
    )  # fmt: skip


def _exchanged(of_kernel: dict[str, T]) -> dict[str, T]:
    """By role of a product `x @ weight`, what is known by role of the linear's kernels: they change parts."""
    kernels = {"forward": "dgrad", "dgrad": "forward", "wgrad": "wgrad"}
    return {role: of_kernel[kernel] for role, kernel in kernels.items() if kernel in of_kernel}
