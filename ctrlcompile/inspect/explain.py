"""A row per linear of a model: gated or why not, its blocks, density, kernel and share of the FLOPs."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ctrlcompile import ops
from ctrlcompile.gate import Block, Gate, plain
from ctrlcompile.linears import LinearNode
from ctrlcompile.region import Visit, watch


@dataclass(frozen=True)
class Row:
    """One linear, or one call of it where it is called more than once.

    Attributes:
        name: of its weight, as in `named_parameters()`.
        shape: of its weight, `(out, in)`.
        gated: whether blocks of it can be switched.
        reason: why it is not; empty when it is.
        block: sides of a block in weight entries; None when not gated.
        density: active blocks / all blocks; 1.0 when not gated.
        kernel: what computes it.
        flops: of forward and backward in a training step with these inputs, at the present density; 2 per multiply-add.
        dense_flops: the same at density 1.
        source: file and line of the call.
    """

    name: str
    shape: tuple[int, ...]
    gated: bool
    reason: str
    block: Block | None
    density: float
    kernel: str
    flops: float
    dense_flops: float
    source: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` is a table.

    Attributes:
        rows: one per linear that ran, then those that did not.
        regions: compiled graphs that ran.
        dense_flops: of the whole training step, dense: every matrix product, gated or not.
        flops: of the same at the present densities.
    """

    rows: tuple[Row, ...]
    regions: int
    dense_flops: float
    flops: float

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=132, highlight=False)
        console.print(self._table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")

    __repr__ = __str__

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("linear", "out x in", "block", "density", "kernel", "share of FLOPs"):
            table.add_column(heading, justify="right" if heading in ("density", "share of FLOPs") else "left")
        for row in self.rows:
            block = f"{row.block[0]} x {row.block[1]}" if row.block else "dense"
            what = row.kernel if row.gated else f"{row.kernel}: {row.reason}"
            shape = " x ".join(map(str, row.shape)) or "?"
            table.add_row(row.name, shape, block, f"{row.density:.3f}", what, f"{self._share(row.flops):.1%}")
        rest = self.dense_flops - sum(row.dense_flops for row in self.rows)
        table.add_row(
            "all else (attention, convolutions, ...)", "", "dense", "1.000", "Inductor", f"{self._share(rest):.1%}"
        )
        gateable = sum(row.dense_flops for row in self.rows if row.gated)
        used = sum(row.flops for row in self.rows if row.gated)
        table.add_section()
        table.add_row(
            f"step: {self.flops / 1e9:.3g} of {self.dense_flops / 1e9:.3g} GFLOP",
            "", "", f"{used / gateable:.3f}" if gateable else "1.000",
            f"{sum(row.gated for row in self.rows)} of {len(self.rows)} linears gated, {self.regions} graphs",
            f"{self.flops / self.dense_flops:.1%} of dense" if self.dense_flops else "",
        )  # fmt: skip
        return table

    def _share(self, flops: float) -> float:
        return flops / self.flops if self.flops else 0.0


def explain(model: nn.Module) -> Callable[..., Explanation]:
    """What the backend made of a model: `cc.explain(model)(*inputs)`.

    Runs the compiled model once on these inputs, forward only, as it is (training or evaluation mode); nothing counts
    towards a budget and random state is put back. FLOPs are those of a training step on such inputs.

    Raises:
        TypeError: not a module.
        RuntimeError: no graph compiled with `backend="ctrlprune"` ran.
    """
    module = plain(model)

    def on(*inputs: Any, **named_inputs: Any) -> Explanation:
        with watch() as visits, torch.random.fork_rng(devices=[]):
            model(*inputs, **named_inputs)
        if not visits:
            raise RuntimeError(
                "no graph of this model was compiled with backend='ctrlprune': pass the compiled model, "
                "cc.explain(torch.compile(model, backend='ctrlprune'))(*inputs)"
            )
        return _explanation(module, visits)

    return on


def _explanation(module: nn.Module, visits: list[Visit]) -> Explanation:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rows, reached = [], set()
    dense_flops = 0.0
    for visit in visits:
        dense_flops += visit.cost.dense
        for linear, (dense, _) in zip(visit.region.linears, visit.cost.products, strict=True):
            parameter = None if linear.weight is None else visit.parameters[linear.weight]
            gate = None if linear.weight is None else visit.gates[linear.weight]
            name = names.get(id(parameter), linear.name)
            reached.add(name)
            rows.append(_row(name, linear, parameter, gate, dense))
    for prefix, child in module.named_modules():
        weight = child._parameters.get("weight") if isinstance(child, nn.Linear) else None
        name = f"{prefix}.weight" if prefix else "weight"
        if weight is not None and name not in reached and names.get(id(weight)) == name:
            reason = "not in a compiled graph that these inputs reach"
            rows.append(Row(name, tuple(weight.shape), False, reason, None, 1.0, "not compiled", 0.0, 0.0, ""))
    saved = sum(row.dense_flops - row.flops for row in rows)
    return Explanation(tuple(rows), len(visits), dense_flops, dense_flops - saved)


def _row(name: str, linear: LinearNode, parameter: Tensor | None, gate: Gate | None, dense: float) -> Row:
    shape = () if parameter is None else tuple(parameter.shape)
    if gate is None or parameter is None:
        return Row(name, shape, False, linear.reason or "no gate", None, 1.0, "Inductor", dense, dense, linear.source)
    reason = ops.why_no_kernel(parameter.device, linear.x_dtype, parameter.dtype, gate.block)
    kernel = (
        ops.kernel_name(parameter.device, linear.x_dtype, parameter.dtype) if reason is None else f"dense ({reason})"
    )
    return Row(name, shape, True, "", gate.block, gate.density, kernel, dense * gate.active_share, dense, linear.source)
