"""Moves an activation's backward pass, where a gated layer's input gradient alone feeds it, into the layer's last step.

Where a gated layer reads another's activation, the backward pass multiplies the gradient of the one by the slope at
what the other has saved: the gradient is written, read again and written once more. Kernels do that while their sums
are in registers; where a block column is dead there is nothing to multiply.
"""

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ctrlcompile import ops
from ctrlcompile.passes.graph_edit import COPIED_META

KEPT_META = ("val", "tensor_meta", *COPIED_META)


class FuseDerivative(CustomGraphPass):
    """`activation_backward(linear_dgrad(grad), z)` becomes one `linear_dgrad`, likewise of a convolution.

    It is the one pass that cannot work on Dynamo's graph, which has no backward pass yet: Inductor runs it on each of
    its graphs. `before` is what Inductor was already told to run there.
    """

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        fuse_derivative(graph)

    def uuid(self) -> Any:
        """What Inductor's cache tells this pass by; None, as the other's, where graphs must not be cached."""
        if self.before is None:
            return get_hash_for_files((__file__,))
        theirs = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        return None if theirs is None else (theirs, get_hash_for_files((__file__,)))


def fuse_derivative(graph: fx.Graph) -> None:
    """Changes a graph of ATen operators in place; see `FuseDerivative`."""
    for node in graph.find_nodes(op="call_function", target=ops.activation_backward.default):
        call, z, activation = node.args
        if call.target not in (ops.linear_dgrad.default, ops.conv_dgrad.default) or len(call.users) > 1 or call.kwargs:
            continue
        with graph.inserting_before(node):
            fused = graph.call_function(call.target, call.args, {"z": z, "activation": activation})
        fused.meta.update({key: node.meta[key] for key in KEPT_META if key in node.meta})
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(call)
