"""What the cost model predicts of variants against what they take, over the benchmark shapes of `kernels.py`.

    python benchmarks/cost_model.py                  # a CPU, float32, blocks of 32: under a minute
    python benchmarks/cost_model.py --block 16 --json FILE

Every product by each of its variants (block-sparse, dense, coarser blocks) under random masks, their calls in turn, the
median of each. The cost model is then told these times one by one, as in a training run whose density falls,
and predicts before each. Prints the median of |predicted / measured - 1| for

- the same product, measured before under denser masks: what decides about a variant that has run before;
- another shape, where only products of the other shapes were measured (all but this one, at every density).

The dense product does not depend on the mask, so that its errors for the same product are the machine's own drift.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from torch import nn

import ctrlcompile as cc
from ctrlcompile import variants
from ctrlcompile.inspect.clock import alternate
from ctrlcompile.kernels import cpu_linear, dense_linear
from ctrlcompile.kernels.index_lists import BlockLists
from ctrlcompile.variant_cost import KEPT_OWN, CostModel, Observation, Size
from ctrlcompile.variants import DENSE, ROLES, Variant
from kernels import DENSITIES, SETTINGS, Block, Sizes, random_mask

Row = dict[str, Any]
NO_PROBES = torch.full((1,), -1, dtype=torch.int32)


def run(
    role: str,
    variant: Variant,
    x: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    lists: BlockLists,
    block: Block,
) -> object:
    """One call of a product by a variant, whose blocks and lists these are."""
    family = dense_linear if variant == DENSE else cpu_linear
    if role == "forward":
        return family.forward(x, weight, None, lists, block, "none")
    if role == "dgrad":
        return family.dgrad(grad, weight, lists, block)
    return family.wgrad(grad, x, weight, lists, NO_PROBES, block)


def measure(shape: Sizes, block: Block, rounds: int) -> list[Row]:
    """Median seconds of each role by each variant at each density, with the share of the weight that it multiplies."""
    m, k, n = shape
    weight = nn.Linear(k, n, bias=False)
    gate = cc.gates(weight, block)["weight"]
    x, grad = torch.randn(m, k), torch.randn(m, n)
    calls: dict[tuple[str, Variant, float], Callable[[], object]] = {}
    shares: dict[tuple[Variant, float], float] = {}
    for density in DENSITIES:
        gate.update_(random_mask(gate.grid, density))
        masked, table = gate.weight.detach().clone(), variants.Table()
        for role in ROLES:
            for variant in variants.candidates(gate, role, 1):
                lists, sides = BlockLists(*(part.clone() for part in table.lists(variant, gate))), variant.block(block)
                shares[variant, density] = table.share(variant, gate)
                calls[role, variant, density] = functools.partial(run, role, variant, x, grad, masked, lists, sides)
    times = alternate(calls, rounds, torch.device("cpu"))
    return [
        {
            "M": m, "K": k, "N": n, "role": role, "variant": variant.name(gate.block), "density": density,
            "share": shares[variant, density], "seconds": statistics.median(times[role, variant, density]),
        }
        for role, variant, density in calls
    ]  # fmt: skip


def predict(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with what was predicted of it: `same_product` (None of the first) and `another_shape`."""
    model, found = CostModel(), []
    own: defaultdict[object, deque[Observation]] = defaultdict(lambda: deque(maxlen=KEPT_OWN))
    for row in sorted(rows, key=lambda row: -row["density"]):
        product = own[shape_of(row), kind_of(row)]
        known = model.predict(kind_of(row), product, size_of(row)) if product else None
        others = CostModel()
        for other in rows:
            if kind_of(other) == kind_of(row) and shape_of(other) != shape_of(row):
                others.observe(kind_of(row), deque(), Observation(size_of(other), other["seconds"]))
        found.append(row | {"same_product": known, "another_shape": others.predict(kind_of(row), (), size_of(row))})
        model.observe(kind_of(row), product, Observation(size_of(row), row["seconds"]))
    return found


def kind_of(row: Row) -> tuple[str, str]:
    return row["role"], row["variant"]


def shape_of(row: Row) -> Sizes:
    return row["M"], row["K"], row["N"]


def size_of(row: Row) -> Size:
    return Size(*shape_of(row), row["share"], torch.float32.itemsize)


def error(rows: Iterable[Row], what: str) -> float | None:
    """The median of |predicted / measured - 1| of those that were predicted; None where none was."""
    errors = [abs(row[what] / row["seconds"] - 1) for row in rows if row[what] is not None]
    return statistics.median(errors) if errors else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=int, nargs="*", help="by their numbers in `kernels.py`; all unless given")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    shapes = SETTINGS["cpu"].shapes
    chosen = [shapes[number] for number in args.shapes] if args.shapes else shapes
    rows = predict([row for shape in chosen for row in measure(shape, (args.block, args.block), args.rounds)])
    table = Table("role", "variant", "same product", "another shape", title="median error of the cost model")
    groups = {kind: [row for row in rows if kind_of(row) == kind] for kind in map(kind_of, rows)}
    groups["all", ""] = rows
    groups["all", "but dense"] = [row for row in rows if row["variant"] != "dense"]
    errors = []
    for (role, variant), group in groups.items():
        same, another = error(group, "same_product"), error(group, "another_shape")
        errors.append({"role": role, "variant": variant, "same_product": same, "another_shape": another})
        table.add_row(role, variant, *("" if found is None else f"{found:.1%}" for found in (same, another)))
    Console(width=100).print(table)
    if args.json:
        result = {"machine": describe(torch.device("cpu")), "block": args.block, "errors": errors, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
