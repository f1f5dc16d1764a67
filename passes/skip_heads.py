"""Rewrites attention into `ctrlprune::attention`, which computes no weights for heads that need none.

Which heads those are follows from the masks of other layers' gates and is data: the kind of each head enters the graph
as an input, one for each attention, after all other placeholders. `gm.meta["skipped_heads"]` lists the attentions, by
node, in the order of these inputs.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ctrlcompile import ops
from ctrlcompile.passes.gate_nodes import with_first_output
from ctrlcompile.passes.graph_edit import argument, clean, copy_meta, scopes

OPERANDS = ("query", "key", "value")


def skip_heads(gm: fx.GraphModule, example_inputs: Sequence[Any], *, heads: Collection[str]) -> fx.GraphModule:
    """Rewrites the attentions named in `heads`."""
    skipped = gm.meta.setdefault("skipped_heads", [])
    for scope in scopes(gm):
        for node in list(scope.gm.graph.nodes):
            name = f"{scope.prefix}{node.name}"
            if name not in heads:
                continue
            with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
                entry = gm.graph.placeholder(f"{name.replace('.', '_')}_kinds")
            entry._dynamo_source = None
            skipped.append(name)
            kinds = scope.bring_in(entry)
            query, key, value = _operands(node)
            causal, scale = argument(node, 5, "is_causal", False), argument(node, 6, "scale")
            with scope.gm.graph.inserting_before(node):
                call = scope.gm.graph.call_function(ops.attention.default, (query, key, value, kinds, causal, scale))
                _, out = with_first_output(call)
            copy_meta(node, call)
            copy_meta(node, out).meta["example_value"] = node.meta["example_value"]
            node.replace_all_uses_with(out)
            scope.gm.graph.erase_node(node)
    return clean(gm)


def is_attention(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is attention as `ctrlprune::attention` computes it: on a CPU, of as many keys'
    heads as queries', without a mask and without dropout."""
    if node.target is not F.scaled_dot_product_attention or node.op != "call_function":
        return False
    tensors = [x.meta.get("example_value") if isinstance(x, fx.Node) else None for x in _operands(node)]
    query, key, value = tensors
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    plain = argument(node, 3, "attn_mask") is None and argument(node, 4, "dropout_p", 0.0) == 0
    causal = argument(node, 5, "is_causal", False)
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    alike = alike and all(statically_known_true(query.shape[0] == other.shape[0]) for other in (key, value))
    heads = [tensor.shape[1] for tensor in (query, key, value)] if query.dim() == key.dim() == value.dim() == 4 else []
    known = all(isinstance(count, int) and count == heads[0] > 1 for count in heads) and bool(heads)
    if not (plain and isinstance(causal, bool) and alike and known and query.is_cpu):
        return False
    return bool(node.meta["example_value"].dtype == query.dtype)  # autocast may compute in another type


def _operands(node: fx.Node) -> list[Any]:
    return [argument(node, position, name) for position, name in enumerate(OPERANDS)]
