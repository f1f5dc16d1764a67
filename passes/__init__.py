"""Graph passes: each takes Dynamo's graph and returns it with one thing changed.

- `recognise_layers`: what is a linear or a product `x @ weight` by another name becomes one, before layers are found.
- `gate_linear`: linear nodes whose weight has a gate become `ctrlprune::linear`, the gate's tensors become inputs.
- `gate_matmul`: products `x @ weight` with such a weight likewise become `ctrlprune::matmul`.
- `gate_conv`: convolution nodes likewise become `ctrlprune::conv`, on channels-last images.
- `fuse_activation`: an activation that only a gated layer feeds moves into it.
- `skip_heads`: attention computes no weights for heads that need none.
- `restore_layout`: what depends on how an image or a head lies in memory gets it as the model had it.
- `gate_nodes`: what the passes that gate layers share.
- `layer_nodes`: what a layer's node says.
- `graph_edit`: what every pass needs to leave a clean graph.

After them Inductor runs `fuse_derivative` on its own graphs: an activation's backward pass moves into the input
gradient that alone feeds it.

Beside them, and no pass since it changes nothing:

- `find_coupling`: which block rows of gated weights feed which block columns of others.
- `outline`: what pictures of a graph show.
- `channel_rules`, `channels`: what it knows of each operator, and the graph of channel groups that it builds.
- `moved_channels`: where a layer's channels are, as long as nothing but movements happens to them.

A pass is `(gm, example_inputs, *, keyword-only) -> gm`; its configuration is bound with `functools.partial`. `run`
knows no pass by name.
"""

import difflib
import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._logging._internal import trace_structured

from ctrlcompile.passes.fuse_activation import fuse_activation
from ctrlcompile.passes.gate_conv import gate_conv
from ctrlcompile.passes.gate_linear import gate_linear
from ctrlcompile.passes.gate_matmul import gate_matmul
from ctrlcompile.passes.graph_edit import operator_name
from ctrlcompile.passes.outline import Outline, outline
from ctrlcompile.passes.restore_layout import restore_layout
from ctrlcompile.passes.skip_heads import skip_heads

logger = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]


def passes_for(blocks: Mapping[str, tuple[int, int]], heads: Collection[str] = ()) -> list[Pass]:
    """The passes in the order in which they run.

    `blocks` maps the layers to gate, by node, to their block sides; `heads` names the attentions that may skip heads.
    """
    return [
        functools.partial(gate_linear, blocks=blocks),
        functools.partial(gate_matmul, blocks=blocks),
        functools.partial(gate_conv, blocks=blocks),
        fuse_activation,
        functools.partial(skip_heads, heads=heads),
        restore_layout,
    ]


@dataclass(frozen=True)
class Change:
    """What one pass did to a graph.

    Attributes:
        name: of the pass.
        before, after: the graph as Python, with shapes and source lines.
        outlines: the graph before and after, as pictures of it show it.
    """

    name: str
    before: str
    after: str
    outlines: tuple[Outline, Outline]

    @property
    def diff(self) -> str:
        """From `before` to `after`, unified; empty where the pass changed nothing."""
        before, after = self.before.splitlines(), self.after.splitlines()
        return "\n".join(difflib.unified_diff(before, after, f"before {self.name}", f"after {self.name}", lineterm=""))


def run(
    gm: fx.GraphModule, example_inputs: Sequence[Any], passes: Sequence[Pass], earlier: tuple[Change, ...] = ()
) -> tuple[fx.GraphModule, tuple[Change, ...]]:
    """Runs the passes in order; the graph that comes out, and what each of them changed, after `earlier` ones.

    Logs at INFO which passes there are and how many operators each removed and added, at DEBUG its diff; the graphs
    and the diffs are artifacts in `TORCH_TRACE`.
    """
    changes = list(earlier)
    text, drawn = (earlier[-1].after, earlier[-1].outlines[1]) if earlier else (_text(gm), outline(gm))
    if not earlier:
        _trace("0_before_passes", lambda: text)
    for number, graph_pass in enumerate(passes, 1 + len(earlier)):
        before = _operators(gm)
        gm = graph_pass(gm, example_inputs)
        after = _operators(gm)
        counts = {op: after.get(op, 0) - before.get(op, 0) for op in {**before, **after}}
        summary = ", ".join(f"{op} {count:+d}" for op, count in sorted(counts.items()) if count) or "no change"
        change = Change(_name(graph_pass), text, _text(gm), (drawn, outline(gm)))
        text, drawn = change.after, change.outlines[1]
        logger.info("%d. %s: %s", number, change.name, summary)
        if logger.isEnabledFor(logging.DEBUG) and change.diff:
            logger.debug("%s", change.diff)
        _trace_change(number, change)
        changes.append(change)
    return gm, tuple(changes)


_RELEASES = re.compile(r";  (?:\w+ = )+None$", re.MULTILINE)  # when values are let go, which a diff would be full of


def _text(gm: fx.GraphModule) -> str:
    return _RELEASES.sub("", gm.print_readable(print_output=False, expanded_def=True))


def _trace_change(number: int, change: Change) -> None:
    _trace(f"{number}_{change.name}", lambda: change.after)
    _trace(f"{number}_{change.name}_diff", lambda: change.diff)


def _trace(name: str, text: Callable[[], str]) -> None:
    trace_structured("artifact", lambda: {"name": f"ctrlcompile_{name}", "encoding": "string"}, payload_fn=text)


def _name(graph_pass: Pass) -> str:
    return (graph_pass.func if isinstance(graph_pass, functools.partial) else graph_pass).__name__


def _operators(gm: fx.GraphModule) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op.startswith("call"):
            name = operator_name(node)
            counts[name] = counts.get(name, 0) + 1
    return counts
