"""Moves an activation's backward pass, where a gated layer's input gradient alone feeds it, into the layer's last step.

Where a gated layer reads another's activation, the backward pass multiplies the gradient of the one by the slope at
what the other has saved, and adds it up for the other's bias: the gradient is written, read again, written once more
and read again. Kernels do that while their sums are in registers; where a block column is dead there is nothing to do.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch._inductor import custom_graph_pass
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from ctrlcompile import op_calls, ops
from ctrlcompile.kernels import reference
from ctrlcompile.passes.graph_edit import COPIED_META

CHANNELS = {ops.linear_dgrad.default: -1, ops.conv_dgrad.default: 1}  # the dimension where an input gradient has them
KEPT_META = ("val", "tensor_meta", *COPIED_META)


class FuseDerivative(custom_graph_pass.CustomGraphPass):
    """`activation_backward(linear_dgrad(grad), z)` becomes one `linear_dgrad`, likewise of a convolution.

    It is the one pass that cannot work on Dynamo's graph, which has no backward pass yet: Inductor runs it on each of
    its graphs. Elsewhere `activation_backward` becomes what Inductor takes gelu's to be, and joins with its neighbours.
    """

    def __call__(self, graph: fx.Graph) -> None:
        fuse_derivative(graph)

    def uuid(self) -> Any:
        """What Inductor's cache tells this pass by."""
        return custom_graph_pass.get_hash_for_files((__file__, ops.__file__, op_calls.__file__, reference.__file__))


def after(theirs: Any) -> Any:
    """Inductor's setting for custom passes, such as `post_grad_custom_pre_pass`, with ours after those of the user.

    Where Inductor takes one pass only (before PyTorch 2.13) the user's stays alone: ours makes nothing right or wrong.
    """
    if theirs is None:
        return FuseDerivative()
    if not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return theirs
    return [*(theirs if isinstance(theirs, (list, tuple)) else [theirs]), FuseDerivative()]


def fuse_derivative(graph: fx.Graph) -> None:
    """Changes a graph of ATen operators in place; see `FuseDerivative`."""
    for node in graph.find_nodes(op="call_function", target=ops.activation_backward.default):
        grad, z, activation, channels = node.args
        call = grad.args[0] if grad.target is operator.getitem else None
        with graph.inserting_before(node):
            if call is not None and _ends_here(call, grad, channels):
                result = graph.call_function(call.target, call.args, {"z": z, "activation": activation})
                result.meta.update({key: node.meta[key] for key in KEPT_META if key in node.meta})
                node.replace_all_uses_with(result)
                unused = [node, *call.users, call]
            else:
                read = [user for user in node.users if user.users]
                results = _decomposed(graph, grad, z, activation, channels, [user.args[1] for user in read])
                for user, result in zip(read, results, strict=True):
                    user.replace_all_uses_with(result)
                unused = [*node.users, node]
        for gone in unused:
            graph.erase_node(gone)


def _ends_here(call: fx.Node, grad: fx.Node, channels: int) -> bool:
    """Whether a node is an input gradient that only `grad` reads, once, with its channels where they are asked for."""
    others = [user for user in call.users if user is not grad and user.users]
    if call.target not in CHANNELS or call.kwargs or others or len(grad.users) > 1:
        return False
    dimensions = grad.meta["val"].dim()
    return CHANNELS[call.target] % dimensions == channels % dimensions


def _decomposed(
    graph: fx.Graph, grad: fx.Node, z: fx.Node, activation: str, channels: int, wanted: Sequence[int]
) -> Any:
    """Nodes for the wanted outputs of an `activation_backward`."""

    def differentiate(grad: Tensor, z: Tensor) -> list[Tensor]:
        grad_z = reference.differentiate(grad, z, activation)
        return [reference.channel_sums(grad_z, channels) if output else grad_z for output in wanted]

    traced = make_fx(differentiate, select_decomp_table())(grad.meta["val"], z.meta["val"])
    inputs = dict(zip(traced.graph.find_nodes(op="placeholder"), (grad, z), strict=True))
    return graph.graph_copy(traced.graph, inputs)
