"""Follows single channels of gated layers through operators that do nothing but move values about.

What a gated layer computes where all its rows are dead is its bias, the same for every row of its input. A value made
of that by movements alone is the same along a dimension if no channel moves along it. Labels are those of `channels`,
by the same rules, except that there is one for each channel.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ctrlcompile.passes.channel_rules import MOVES, Call, Labels
from ctrlcompile.passes.channels import Channels

SINGLE = 2**32  # labels from here on are channels; what mixes several gets a smaller one

Sizes = Callable[[Any], list[int] | None]


class MovedChannels:
    """Where the channels of gated layers are, in those values of a graph that consist of nothing else.

    Args:
        sizes: the shape of a node's value; None for what is no tensor.
        harmless: targets that write into no input.
    """

    def __init__(self, sizes: Sizes, harmless: Collection[Any]) -> None:
        self._sizes, self._harmless = sizes, harmless
        self._channels = Channels()
        self._values: dict[fx.Node, Labels] = {}
        self._layer: dict[fx.Node, fx.Node] = {}  # whose channels a value consists of

    def start(self, layer: fx.Node, axis: int) -> None:
        """Notes a gated layer, whose output has its channels along `axis`."""
        sizes = self._sizes(layer)
        assert sizes is not None
        shape = [size if dim == axis else 1 for dim, size in enumerate(sizes)]
        self._layer[layer] = layer
        self._values[layer] = SINGLE + torch.arange(sizes[axis]).view(shape)

    def follow(self, node: fx.Node) -> None:
        """Notes what a node makes of values that are known, if it only moves them."""
        rule = MOVES.get(node.target)
        if rule is None or not node.all_input_nodes or node.all_input_nodes[0] not in self._values:
            return
        labels = rule(Call(node, self._channels, self._values, self._sizes))
        if labels is not None:
            self._values[node], self._layer[node] = labels, self._layer[node.all_input_nodes[0]]

    def pass_on(self, outer: fx.Node, inner: fx.Node) -> None:
        """Notes that `inner`, an input of a body, has the value of `outer`."""
        if outer in self._values:
            self._values[inner], self._layer[inner] = self._values[outer], self._layer[outer]

    def forget(self, nodes: Iterable[fx.Node]) -> None:
        """Notes that values were written into."""
        for node in nodes:
            self._values.pop(node, None)

    def same_along(self, node: fx.Node, dim: int) -> bool:
        """Whether a value consists of channels that are all the same along a dimension, and nobody writes into them."""
        labels = self._values.get(node)
        if not isinstance(labels, Tensor) or labels.dim() != len(self._sizes(node) or ()):
            return False
        return labels.shape[dim] == 1 and bool((labels >= SINGLE).all()) and self._only_read(self._layer[node])

    def _only_read(self, layer: fx.Node) -> bool:
        """Whether all that reads a layer's output, moved or not, is known not to write: few operators need be."""
        users = (user for node, of in self._layer.items() if of is layer for user in node.users)
        return all(user in self._values or user.op == "output" or user.target in self._harmless for user in users)
