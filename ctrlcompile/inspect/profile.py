"""What gating gains: every gated product against the dense one, and the whole training step, timed in one run."""

import csv
import functools
import io
import json
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ctrlcompile.calls import observe
from ctrlcompile.inspect import limits, tables
from ctrlcompile.inspect.clock import alternate
from ctrlcompile.inspect.products import ROLES, Layout, Product, Products
from ctrlcompile.inspect.undisturbed import call, check_compiled, undisturbed
from ctrlcompile.kernel_choice import device_name
from ctrlcompile.named_gates import plain
from ctrlcompile.region import watch


@dataclass(frozen=True)
class Row:
    """One product of a gated layer.

    Attributes:
        name: of the layer's weight, as in `named_parameters()`.
        role: "forward", "dgrad" or "wgrad".
        m, k, n: rows, inputs and outputs of the product; a convolution has a row for each position of its output, and
            an input for each tap of an input channel.
        dtype: of the input.
        block: sides of a block along the weight's dimensions, in features or channels.
        kernel: what computes it.
        calls: how often a step computes it.
        density: active blocks / all blocks.
        dense_ms: the framework's own product on tensors of these shapes, types and strides, with the bias, without the
            activation; where autocast casts the weight, the cast is not timed.
        gated_ms: our operator, with bias and activation, and with whatever it packs or casts.
        speedup: dense_ms / gated_ms.
        dense_flops, flops: of one call, dense and as gated; 2 per multiply-add.
        of_limit: the time that the machine needs at least (see `limits`) for these FLOPs and bytes, over gated_ms.
            Above 1 where what is read lies in a cache.
        share: of the gated step's time, all calls.
    """

    name: str
    role: str
    m: int
    k: int
    n: int
    dtype: str
    block: tuple[int, int]
    kernel: str
    calls: int
    density: float
    dense_ms: float
    gated_ms: float
    speedup: float
    dense_flops: float
    flops: float
    of_limit: float
    share: float


@dataclass(frozen=True)
class Step:
    """The whole training step, forward and backward: as gated, and the same graphs with the gates left out."""

    dense_ms: float
    gated_ms: float
    speedup: float
    dense_flops: float
    flops: float


@dataclass(frozen=True)
class Machine:
    """What it was measured on; in the same run, the peak rate by type of the input, FLOP/s, and of copying, bytes/s."""

    device: str
    threads: int
    torch: str
    peak_flops: dict[str, float]
    copy_bytes: float


@dataclass(frozen=True, repr=False)
class Profile(tables.Shown):
    """What `profile` measured. `str()` is a table; times are medians of `rounds` alternating rounds."""

    rows: tuple[Row, ...]
    step: Step
    machine: Machine
    rounds: int

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self) -> str:
        """Everything measured, as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            read = json.loads(text)
            rows = tuple(Row(**{**row, "block": tuple(row["block"])}) for row in read["rows"])
            return cls(rows, Step(**read["step"]), Machine(**read["machine"]), read["rounds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not what Profile.to_json() writes ({error})") from error

    def to_csv(self) -> str:
        """A line per row with the fields of `Row` as columns, then one for the step."""
        file = io.StringIO()
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({**asdict(row), "block": "x".join(map(str, row.block))})
        writer.writerow({"name": "step", "role": "all", **asdict(self.step)})
        return file.getvalue()

    def _table(self) -> Table:
        peaks = ", ".join(f"{rate / 1e9:.4g} GFLOP/s {dtype}" for dtype, rate in self.machine.peak_flops.items())
        table = Table(
            box=None, pad_edge=False, header_style="bold", caption_justify="left",
            caption=f"{', '.join(dict.fromkeys(row.kernel for row in self.rows))}; {self.machine.device}, "
            f"{self.machine.threads} threads, PyTorch {self.machine.torch}; at most {peaks}, "
            f"{self.machine.copy_bytes / 1e9:.4g} GB/s; medians of {self.rounds} rounds",
        )  # fmt: skip
        for heading in ("layer", "role", "M, K, N"):
            table.add_column(heading, no_wrap=True, overflow="fold")
        for heading in ("density", "dense ms", "gated ms", "speed-up", "skipped", "of limit", "of step"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            role = row.role if row.calls == 1 else f"{row.role}, {row.calls} times"
            table.add_row(
                row.name, role, f"{row.m}, {row.k}, {row.n}", f"{row.density:.3f}", *_times(row),
                f"{row.of_limit:.2f}", f"{row.share:.1%}",
            )  # fmt: skip
        table.add_section()
        shares = sum(row.share for row in self.rows)
        table.add_row("step", "forward and backward", "", "", *_times(self.step), "", f"{shares:.1%} gated")
        return table


def _times(row: Row | Step) -> tuple[str, str, str, str]:
    skipped = 1 - row.flops / row.dense_flops if row.dense_flops else 0.0
    return f"{row.dense_ms:.3f}", f"{row.gated_ms:.3f}", f"{row.speedup:.2f}x", f"{skipped:.1%}"


def profile(model: nn.Module, *, rounds: int = 7) -> Callable[..., Profile]:
    """What gating gains a compiled model: `cc.profile(model)(*inputs)`.

    Runs training steps (forward, and backward from the sum of the outputs) on these inputs in the model's present mode,
    gated and with its gates left out, and each gated product by itself against the framework's dense one. All of it
    alternates in one run of `rounds` rounds, after a first one that compiles. Parameters, gradients, buffers, random
    state, gates and budgets stay as they were.

    >>> profile = cc.profile(model)(x)  # doctest: +SKIP
    >>> print(profile)  # a row per gated product, then the step  # doctest: +SKIP
    >>> profile.to_json(), profile.to_csv()  # doctest: +SKIP

    Raises:
        TypeError: not a module, or `rounds` is no int.
        ValueError: the model does not run on these inputs, its output has no gradient, or `rounds` is below 1.
        RuntimeError: no graph compiled with `backend="ctrlprune"` ran, or nothing in it is gated.
    """
    module = plain(model)
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds is a positive int; got {rounds!r}")
    if rounds < 1:
        raise ValueError(f"rounds is a positive int; got {rounds}")

    def on(*inputs: Any, **named_inputs: Any) -> Profile:
        with undisturbed(module), torch.enable_grad():
            return _profile(model, module, inputs, named_inputs, rounds)

    return on


def _profile(
    model: nn.Module, module: nn.Module, inputs: Sequence[Any], named_inputs: Mapping[str, Any], rounds: int
) -> Profile:
    products = Products()
    with watch() as visits, observe(products.see):
        outputs = call(model, inputs, named_inputs)
        check_compiled(visits, "profile")
        seen = tuple(visits)  # without those of a recomputation in backward
        gates = list(dict.fromkeys(gate for visit in seen for gate in visit.gates if gate is not None))
        if not gates:
            raise RuntimeError("no layer of this model is gated; cc.explain(model)(*inputs) says why not")
        everything = [*module.parameters(), *(gate.signals for gate in gates), *tree_leaves((inputs, named_inputs))]
        leaves = [leaf for leaf in everything if isinstance(leaf, Tensor) and leaf.requires_grad]
        _backward(outputs, leaves)
        del outputs

    def step(gated: bool) -> None:
        with watch(gated=gated):
            _backward(model(*inputs, **named_inputs), leaves)

    device, found = gates[0].weight.device, _by_layer_and_role(products)
    tensors = functools.cache(Layout.filled)
    loads: dict[Hashable, limits.Load] = {product.dtype: limits.peak(device, product.dtype) for product in found}
    loads["copy"] = limits.copy(device)
    timed: dict[Hashable, Callable[[], object]] = {"gated": partial(step, True), "dense": partial(step, False)}
    for product in found:
        timed |= {(product, "gated"): product.ours(tensors), (product, "dense"): product.dense(tensors)}
    timed |= {name: load.run for name, load in loads.items()}
    times = alternate(timed, rounds, device)

    seconds = {name: statistics.median(values) for name, values in times.items()}
    rates = {name: load.amount / min(times[name]) for name, load in loads.items()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rows = tuple(_row(product, names.get(id(product.gate.weight), ""), seconds, rates) for product in found)
    dense, gated = seconds["dense"], seconds["gated"]
    dense_flops, flops = sum(visit.cost.dense for visit in seen), sum(visit.used_flops for visit in seen)
    machine = Machine(
        device_name(device), torch.get_num_threads(), torch.__version__,
        {_name(dtype): rate for dtype, rate in rates.items() if isinstance(dtype, torch.dtype)}, rates["copy"],
    )  # fmt: skip
    return Profile(rows, Step(dense * 1e3, gated * 1e3, dense / gated, dense_flops, flops), machine, rounds)


def _row(product: Product, name: str, seconds: Mapping[Hashable, float], rates: Mapping[Hashable, float]) -> Row:
    dense, gated = seconds[product, "dense"], seconds[product, "gated"]
    least = max(product.flops / rates[product.dtype], product.bytes / rates["copy"])
    return Row(
        name or product.gate.name, product.role, *product.sizes, _name(product.dtype), product.gate.block,
        product.kernel, product.calls, product.gate.density, dense * 1e3, gated * 1e3, dense / gated,
        product.dense_flops, product.flops, least / gated, product.calls * gated / seconds["gated"],
    )  # fmt: skip


def _backward(outputs: Any, leaves: Sequence[Tensor]) -> None:
    roots = [output for output in tree_leaves(outputs) if isinstance(output, Tensor) and output.requires_grad]
    if not roots:
        raise ValueError(
            "the model returned no tensor that has a gradient, and a training step needs one: pass a model whose "
            "Parameters require gradients, and that returns its output or its loss"
        )
    # Not backward(), which would add to .grad and call the hooks of whoever waits for it.
    torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots], allow_unused=True)


def _by_layer_and_role(products: Products) -> list[Product]:
    layers = list(dict.fromkeys(product.gate for product in products.found.values()))
    return sorted(products.found.values(), key=lambda product: (layers.index(product.gate), ROLES.index(product.role)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
