"""Graph passes: each takes Dynamo's graph and returns it with one thing changed.

- `gate_linear`: linear nodes whose weight has a gate become `ctrlprune::linear`, the gate's tensors become inputs.
- `fuse_activation`: an activation that only a gated linear feeds moves into it.
- `graph_edit`: what every pass needs to leave a clean graph.

A pass is `(gm, example_inputs, *, keyword-only) -> gm`; its configuration is bound with `functools.partial`. `run`
knows no pass by name.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from ctrlcompile.passes.fuse_activation import fuse_activation
from ctrlcompile.passes.gate_linear import gate_linear

logger = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]


def passes_for(blocks: Mapping[str, tuple[int, int]]) -> list[Pass]:
    """The passes in the order in which they run; `blocks` maps the linear nodes to gate to their block sides."""
    return [
        functools.partial(gate_linear, blocks=blocks),
        fuse_activation,
    ]


def run(gm: fx.GraphModule, example_inputs: Sequence[Any], passes: Sequence[Pass]) -> fx.GraphModule:
    """Runs the passes in order; logs at INFO which ones there are and what each changed."""
    for number, graph_pass in enumerate(passes, 1):
        before = _operators(gm)
        gm = graph_pass(gm, example_inputs)
        after = _operators(gm)
        changes = {op: after.get(op, 0) - before.get(op, 0) for op in {**before, **after}}
        text = ", ".join(f"{op} {change:+d}" for op, change in sorted(changes.items()) if change) or "no change"
        logger.info("%d. %s: %s", number, _name(graph_pass), text)
    return gm


def _name(graph_pass: Pass) -> str:
    return (graph_pass.func if isinstance(graph_pass, functools.partial) else graph_pass).__name__


def _operators(gm: fx.GraphModule) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op.startswith("call"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            counts[name] = counts.get(name, 0) + 1
    return counts
