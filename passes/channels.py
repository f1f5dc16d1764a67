"""What the elements of a tensor depend on: labels, and the graph of channel groups that they name.

A label is a node of the graph. A tensor's labels are an int64 array with its number of dimensions, each of full size
or, where everything along it has the same label, of size 1: what moves channels about (a transpose, a flatten, a
concatenation) moves labels in the same way, and what mixes them makes a new group of them.

The graph's sources are `INPUT`, for whatever no gate switches (the model's input, say), and block rows of gated
weights; its sinks are `OUTPUT`, for whatever no gate switches (the model's output), and block columns. `CONSTANT`
depends on nothing. An edge has `carries=False` where a group changes another one, but leaves it constant where the rest
of what it depends on is constant, as queries and keys do to what attention makes of values.
"""

from collections.abc import Hashable, Iterable, Sequence

import networkx as nx
import torch
from torch import Tensor

CONSTANT, INPUT = 0, 1
OUTPUT = "output"
LARGEST = 2**18  # labels of one tensor; beyond, all its elements are taken to depend on the same


class Channels:
    """The graph of channel groups, and the making of new ones."""

    def __init__(self) -> None:
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from((CONSTANT, INPUT, OUTPUT))
        self._next = INPUT + 1
        self._groups: dict[tuple[frozenset[int], frozenset[int]], int] = {}

    def new(self) -> int:
        """A label that depends on nothing yet."""
        self._next += 1
        self.graph.add_node(self._next - 1)
        return self._next - 1

    def read(self, labels: Tensor, reader: Hashable) -> None:
        """Notes that `reader` depends on all these labels."""
        self.graph.add_edges_from((label, reader, {"carries": True}) for label in _distinct(labels) - {CONSTANT})

    def joined(self, first: Tensor, *others: Tensor) -> Tensor:
        """Labels of what depends, element by element, on several tensors, broadcast against each other."""
        for other in others:
            first = self._pairwise(first, other, carries=True)
        return first

    def modulated(self, labels: Tensor, by: Tensor) -> Tensor:
        """The same, but constant wherever `labels` are constant."""
        return self._pairwise(labels, by, carries=False)

    def mixed(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Labels of what depends on everything along `dims`, which have size 1 afterwards."""
        ndim = labels.dim()
        dims = [dim % ndim for dim in dims if labels.shape[dim] > 1]
        if not dims:
            return labels
        kept = [1 if dim in dims else size for dim, size in enumerate(labels.shape)]
        rows = labels.movedim(dims, list(range(-len(dims), 0))).flatten(ndim - len(dims)).flatten(0, -2)
        distinct, at = rows.sort(1).values.unique(dim=0, return_inverse=True)
        made = torch.tensor([self._group(row.tolist()) for row in distinct.unbind()])
        return made[at].view(kept)

    def all_of(self, tensors: Iterable[Tensor]) -> Tensor:
        """One label, of what depends on everything in these tensors."""
        members = set().union(*map(_distinct, tensors))
        return torch.tensor(self._group(members))

    def _pairwise(self, labels: Tensor, other: Tensor, carries: bool) -> Tensor:
        if other.numel() == 1 and int(other) == CONSTANT:
            return labels.view([1] * (other.dim() - labels.dim()) + list(labels.shape))
        labels, other = torch.broadcast_tensors(labels, other)
        if labels.numel() > LARGEST:
            labels, other = (self.all_of([t]).view([1] * t.dim()) for t in (labels, other))
        base = self._next
        pairs, at = (labels * base + other).unique(return_inverse=True)
        one_and_other = [divmod(pair, base) for pair in pairs.tolist()]
        made = [self._group(pair) if carries else self._group(pair[:1], pair[1:]) for pair in one_and_other]
        return torch.tensor(made)[at]

    def _group(self, members: Iterable[int], modulators: Iterable[int] = ()) -> int:
        carrying = frozenset(members) - {CONSTANT}
        changing = (frozenset(modulators) if carrying else frozenset()) - carrying - {CONSTANT}
        if len(carrying) <= 1 and not changing:
            return next(iter(carrying), CONSTANT)
        if (carrying, changing) not in self._groups:
            group = self._groups[carrying, changing] = self.new()
            self.graph.add_edges_from((member, group, {"carries": True}) for member in carrying)
            self.graph.add_edges_from((member, group, {"carries": False}) for member in changing)
        return self._groups[carrying, changing]


def regrouped(labels: Tensor, shape: Sequence[int], target: Sequence[int], channels: Channels) -> Tensor | None:
    """Labels after a reshape from `shape` to `target`; None where the two do not match piece by piece."""
    pieces = _pieces(shape, target)
    if pieces is None:
        return None
    before, after = list(labels.shape), [1] * len(target)
    for i, j in pieces:
        here = [dim for dim in i if labels.shape[dim] > 1]
        sizes = [shape[dim] for dim in i]
        if here and torch.tensor(sizes, dtype=torch.float64).prod() > LARGEST:
            labels = channels.mixed(labels, here)
            before = [1 if dim in here else size for dim, size in enumerate(before)]
        elif here:
            for dim in i:
                before[dim] = shape[dim]
            for dim in j:
                after[dim] = target[dim]
    return labels.expand(before).reshape(after)


def _pieces(shape: Sequence[int], target: Sequence[int]) -> list[tuple[range, range]] | None:
    """Runs of dimensions of `shape` and of `target` with the same number of elements, in order."""
    if 0 in shape or 0 in target:
        return None
    pieces = []
    i = j = 0
    while i < len(shape) or j < len(target):
        first, second = i, j
        size, wanted = 1, 1
        while size != wanted or (i, j) == (first, second):
            if (size <= wanted and i < len(shape)) or j == len(target):
                if i == len(shape):
                    return None
                size, i = size * shape[i], i + 1
            else:
                wanted, j = wanted * target[j], j + 1
        pieces.append((range(first, i), range(second, j)))
    return pieces


def _distinct(labels: Tensor) -> set[int]:
    return set(labels.unique().tolist())
