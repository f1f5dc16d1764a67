"""What each operator does to the labels of its arguments: the table that `find_coupling` walks a graph with.

A rule takes a `Call` and returns the labels of its output, a list of them for several outputs, or None where it does
not know: the output then depends on everything that the call is given, which is right for every operator.

Per-channel constants (a bias, the parameters and statistics of a batch norm) leave constant what is constant. Constants
that vary along other dimensions, such as a position embedding, count as an input of the model: a channel that shows
nothing but the position is a feature still. Zero padding leaves constant what is constant, although the border shows.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ctrlcompile.passes.channels import CONSTANT, INPUT, LARGEST, Channels, regrouped
from ctrlcompile.passes.graph_edit import argument

Labels: TypeAlias = Tensor | list[Tensor]  # no dimensions: all that the value holds has this label


@dataclass(frozen=True)
class Call:
    """A node with what is known of its arguments; `sizes` gives a value's shape, symbols as large primes."""

    node: fx.Node
    channels: Channels
    values: Mapping[fx.Node, Labels]
    sizes: Callable[[Any], list[int] | None]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name, `axis` being NumPy's for `dim`."""
        if name == "dim" and "axis" in self.node.kwargs:
            name = "axis"
        return argument(self.node, position, name, default)

    def labels(self, value: Any) -> Tensor:
        """An argument's labels, with as many dimensions as it has."""
        labels = self.values[value] if isinstance(value, fx.Node) else torch.tensor(CONSTANT)
        if isinstance(labels, list):
            labels = self.channels.all_of(labels)
        return labels.view([1] * len(self.sizes(value) or ())) if labels.dim() == 0 else labels

    def beside(self, labels: Tensor, *read: Any) -> Tensor:
        """`labels` of what also depends on all the arguments that are not in `read`."""
        others = [self.labels(other) for other in self.node.all_input_nodes if other not in read]
        return self.channels.joined(labels, self.channels.all_of(others))


Rule: TypeAlias = Callable[[Call], Labels | None]


def _elementwise(call: Call) -> Tensor | None:
    tensors = [node for node in call.node.all_input_nodes if call.sizes(node) is not None]
    if not tensors:
        return None
    return with_constants(call, call.beside(call.channels.joined(*map(call.labels, tensors)), *tensors), tensors)


def with_constants(call: Call, labels: Tensor, tensors: Sequence[fx.Node]) -> Tensor:
    """`labels` of what also depends on `tensors`: constants that vary where they do not count as an input."""
    varying = any(
        size > 1 and labels.shape[dim] == 1
        for tensor in tensors
        if bool((call.labels(tensor) == CONSTANT).all())
        for dim, size in _from_the_right(call.sizes(tensor))
    )
    if varying and not bool((labels == CONSTANT).all()):
        labels = call.channels.joined(labels, torch.tensor(INPUT))
    return labels


def _from_the_right(sizes: Sequence[int] | None) -> Iterable[tuple[int, int]]:
    return ((dim - len(sizes), size) for dim, size in enumerate(sizes)) if sizes else ()


def _same(call: Call) -> Tensor:
    return call.labels(call.argument(0, "input"))


def _per_channel(call: Call) -> Tensor:
    """Norms over everything but the channels, which are dimension 1."""
    x = call.argument(0, "input")
    labels = call.labels(x)
    return call.beside(call.channels.mixed(labels, [d for d in range(labels.dim()) if d != 1]), x)


def _layer_norm(call: Call) -> Tensor | None:
    x, over = call.argument(0, "input"), call.argument(1, "normalized_shape")
    if isinstance(over, fx.Node):  # a slice of a dynamic shape
        return None
    return call.beside(call.channels.mixed(call.labels(x), range(-len(over), 0)), x)


def _group_norm(call: Call) -> Tensor | None:
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    return call.beside(_by_groups(call, x, groups, list(range(2, call.labels(x).dim())), 1), x)


def _by_groups(call: Call, x: Any, groups: int, spatial: list[int], axis: int) -> Tensor:
    """Each of the output's channels, on `axis`, depends on the input's channels of its group."""
    labels = call.channels.mixed(call.labels(x), spatial)
    out = call.sizes(call.node)
    if labels.shape[axis] == 1 or out is None:
        return labels
    grouped = call.channels.mixed(labels.unflatten(axis, (groups, -1)), [axis + 1])
    return grouped.expand(*grouped.shape[: axis + 1], out[axis] // groups, *grouped.shape[axis + 2 :]).flatten(
        axis, axis + 1
    )


def _convolution(call: Call) -> Tensor | None:
    x, weight = call.argument(0, "input"), call.argument(1, "weight")
    ndim, sizes = call.labels(x).dim(), call.sizes(weight)
    if sizes is None:
        return None
    spatial = list(range(ndim - len(sizes) + 2, ndim))
    return call.beside(_by_groups(call, x, call.argument(6, "groups", 1), spatial, ndim - len(sizes) + 1), x)


def _linear(call: Call) -> Tensor:
    x = call.argument(0, "input")
    return call.beside(call.channels.mixed(call.labels(x), [-1]), x)


def _matmul(call: Call) -> Tensor | None:
    x, y = call.argument(0, "input"), call.argument(1, "mat2" if "mat2" in call.node.kwargs else "other")
    first, second = call.labels(x), call.labels(y)
    if min(first.dim(), second.dim()) < 2:
        return None
    return call.channels.joined(call.channels.mixed(first, [-1]), call.channels.mixed(second, [-2]))


def _attention(call: Call) -> Tensor | None:
    """What comes out is an average of the values, so it is constant where they are."""
    nodes = [call.argument(i, name) for i, name in enumerate(("query", "key", "value"))]
    sizes = [call.sizes(node) for node in nodes]
    if any(size is None or len(size) < 3 for size in sizes):
        return None
    query, key, value = map(call.labels, nodes)
    heads, fewer = sizes[0][-3], sizes[1][-3]  # type: ignore[index]
    if heads != fewer:
        key, value = (x if x.shape[-3] == 1 else x.repeat_interleave(heads // fewer, -3) for x in (key, value))
    weights = call.channels.joined(call.channels.mixed(query, [-1]), call.channels.mixed(key, [-1, -2]))
    return call.channels.modulated(call.channels.mixed(value, [-2]), call.beside(weights, *nodes))


def _mixing(position: int, name: str = "dim") -> Rule:
    """Everything along the dimensions of one argument, on everything else of which nothing depends."""

    def rule(call: Call) -> Tensor | None:
        dims = _dims(call.argument(position, name))
        x = call.argument(0, "input")
        return None if dims is None else call.beside(call.channels.mixed(call.labels(x), dims), x)

    return rule


def _reduction(call: Call) -> Tensor | None:
    x, dims = call.argument(0, "input"), _dims(call.argument(1, "dim"))
    sizes, out = call.sizes(x), call.sizes(call.node)
    if not dims or sizes is None or out is None:
        return None
    labels = call.beside(call.channels.mixed(call.labels(x), dims), x)
    if len(out) == len(sizes):
        return labels
    gone = {dim % len(sizes) for dim in dims}
    return labels.view([size for dim, size in enumerate(labels.shape) if dim not in gone])


def _dims(dim: Any) -> list[int] | None:
    dims = [dim] if isinstance(dim, int) else dim
    known = isinstance(dims, (list, tuple)) and all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    return list(dims) if known else None


def _spatial(dims: int) -> Rule:
    """Each channel by itself, over the last dimensions: pooling."""

    def rule(call: Call) -> Tensor:
        return call.channels.mixed(call.labels(call.argument(0, "input")), range(-dims, 0))

    return rule


def _interpolate(call: Call) -> Tensor:
    labels = call.labels(call.argument(0, "input"))
    return call.channels.mixed(labels, range(2, labels.dim()))


def _pad(call: Call) -> Tensor | None:
    labels, pads = call.labels(call.argument(0, "input")), call.argument(1, "pad")
    for dim, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
        if labels.shape[-dim] == 1 or (before, after) == (0, 0):
            continue
        if (
            call.argument(2, "mode", "constant") != "constant"
            or not isinstance(before, int)
            or not isinstance(after, int)
        ):
            return None
        labels = F.pad(labels.movedim(-dim, -1), (before, after), value=CONSTANT).movedim(-1, -dim)
    return labels


def _reshape(call: Call) -> Tensor | None:
    x = call.argument(0, "input")
    sizes, out = call.sizes(x), call.sizes(call.node)
    return None if sizes is None or out is None else regrouped(call.labels(x), sizes, out, call.channels)


def _movement(name: str) -> Rule:
    """A permutation of dimensions, or along some: labels are moved as the values are."""

    def rule(call: Call) -> Tensor | None:
        if len(call.node.all_input_nodes) > 1 or "input" in call.node.kwargs:
            return None
        x, *rest = call.node.args
        return getattr(torch.Tensor, name)(call.labels(x), *rest, **call.node.kwargs)

    return rule


def _expand(call: Call) -> Tensor | None:
    labels, out = call.labels(call.argument(0, "input")), call.sizes(call.node)
    return None if out is None else labels.view([1] * (len(out) - labels.dim()) + list(labels.shape))


def _pieces(name: str) -> Rule:
    """Several pieces along a dimension."""
    dim_at = 1 if name == "unbind" else 2

    def rule(call: Call) -> list[Tensor] | None:
        if not call.node.args:
            return None
        labels, dim = call.labels(call.node.args[0]), call.argument(dim_at, "dim", 0)
        if labels.shape[dim] > 1:
            if len(call.node.all_input_nodes) > 1:
                return None
            target = call.node.target  # a method's arguments may have other names than the function's
            operation = getattr(torch.Tensor, target) if isinstance(target, str) else target
            return list(operation(labels, *call.node.args[1:], **call.node.kwargs))
        count = 1 + max((int(user.args[1]) for user in call.node.users if user.target is operator.getitem), default=0)  # type: ignore[arg-type]
        return [labels.squeeze(dim) if name == "unbind" else labels] * count

    return rule


def _cat(call: Call) -> Tensor | None:
    tensors, dim, out = call.argument(0, "tensors"), call.argument(1, "dim", 0), call.sizes(call.node)
    if out is None:
        return None
    pieces = [t for t in tensors if len(call.sizes(t) or out) == len(out)]  # cat leaves out others, which are empty
    return _concatenated(call, [(call.labels(t), (call.sizes(t) or out)[dim]) for t in pieces], dim, out)


def _stack(call: Call) -> Tensor | None:
    tensors, dim, out = call.argument(0, "tensors"), call.argument(1, "dim", 0), call.sizes(call.node)
    return None if out is None else _concatenated(call, [(call.labels(t).unsqueeze(dim), 1) for t in tensors], dim, out)


def _concatenated(call: Call, pieces: list[tuple[Tensor, int]], dim: int, out: Sequence[int]) -> Tensor:
    """A constant piece beside others varies along `dim`, so it counts as an input of the model."""
    found = [torch.full_like(labels, INPUT) if bool((labels == CONSTANT).all()) else labels for labels, _ in pieces]
    shape = [max(labels.shape[d] for labels in found) for d in range(len(out))]
    shape[dim] = out[dim]
    if torch.tensor(shape, dtype=torch.float64).prod() > LARGEST:
        return call.channels.joined(*(call.channels.mixed(labels, [dim]) for labels in found))
    sizes = [[*shape[: dim % len(out)], size, *shape[dim % len(out) + 1 :]] for _, size in pieces]
    return torch.cat([labels.expand(size) for labels, size in zip(found, sizes, strict=True)], dim)


def _getitem(call: Call) -> Labels | None:
    source, index = call.node.args
    value = call.values[source] if isinstance(source, fx.Node) else None
    if isinstance(value, list):
        return value[index] if isinstance(index, int) else None
    sizes = call.sizes(source)
    return None if sizes is None else _indexed(call.labels(source), index)


def _indexed(labels: Tensor, index: Any) -> Tensor | None:
    """Slices, numbers, None and an ellipsis; along a dimension of one label, any slice has the same."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, (int, slice, type(None), type(...))) and not isinstance(part, bool) for part in parts):
        return None
    if ... not in parts:
        parts.append(...)
    at = parts.index(...)
    parts[at : at + 1] = [slice(None)] * (labels.dim() - sum(part is not None for part in parts) + 1)
    taken: list[Any] = []
    for part in parts:
        size = None if part is None else labels.shape[len(taken) - taken.count(None)]
        if size == 1:
            part = slice(None) if isinstance(part, slice) else 0
        elif isinstance(part, slice) and any(isinstance(end, fx.Node) for end in (part.start, part.stop, part.step)):
            return None
        taken.append(part)
    return labels[tuple(taken)]


def _glu(call: Call) -> Tensor | None:
    labels, dim = call.labels(call.argument(0, "input")), call.argument(1, "dim", -1)
    return labels if labels.shape[dim] == 1 else call.channels.joined(*labels.chunk(2, dim))


ELEMENTWISE = """
    abs add addcdiv addcmul and_ ceil celu clamp clamp_max clamp_min clip copy cos div elu eq erf exp expm1 floor
    floordiv floor_divide fmod ge gelu gt hardshrink hardsigmoid hardswish hardtanh invert le leaky_relu lerp log log10
    log1p log2 logical_and logical_not logical_or logsigmoid lt masked_fill maximum minimum mish mod mul nan_to_num ne
    neg negative or_ pos pow reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sigmoid sign silu sin softplus
    softshrink softsign sqrt square sub tan tanh tanhshrink threshold true_divide truediv trunc where xor
"""
SAME = """
    alpha_dropout bfloat16 clone contiguous cpu cuda detach double dropout dropout1d dropout2d dropout3d
    feature_alpha_dropout float half to type type_as
"""
PIECES = "chunk split tensor_split unbind"
EXPANSIONS = "broadcast_to expand expand_as"
RESHAPES = "flatten ravel reshape reshape_as squeeze unflatten unsqueeze view view_as"
MOVEMENTS = "adjoint flip movedim moveaxis permute swapaxes swapdims t transpose"
COPIES = "bfloat16 clone contiguous detach double float half to type"
VIEWS = {*SAME.split(), *RESHAPES.split(), *MOVEMENTS.split(), *PIECES.split(), *EXPANSIONS.split(), "getitem"}
POOLING = "adaptive_avg_pool adaptive_max_pool avg_pool lp_pool max_pool"

BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(SAME.split(), _same),
    **dict.fromkeys(RESHAPES.split(), _reshape),
    **{name: _movement(name) for name in MOVEMENTS.split()},
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), _per_channel),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    **{f"{kind}{n}d": _convolution for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "linear": _linear,
    **dict.fromkeys(("bmm", "matmul", "mm"), _matmul),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("cumsum", "log_softmax", "softmax"), _mixing(1)),
    "normalize": _mixing(2),
    "roll": _mixing(2, "dims"),
    **dict.fromkeys(("amax", "amin", "logsumexp", "mean", "prod", "std", "sum", "var"), _reduction),
    **{f"{kind}{n}d": _spatial(n) for kind in POOLING.split() for n in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample"), _interpolate),
    "pad": _pad,
    **dict.fromkeys(EXPANSIONS.split(), _expand),
    **{name: _pieces(name) for name in PIECES.split()},
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
    "getitem": _getitem,
    "glu": _glu,
}

NAMESPACES = (torch, F, torch._C._nn, operator)


def _table(names: Mapping[str, Rule], spelling: str) -> dict[Any, Rule]:
    """Rules by method name and by function, for each of the ways in which Dynamo's graphs call an operator."""
    table: dict[Any, Rule] = {}
    for name, rule in names.items():
        spelled = spelling.format(name)
        table[spelled] = rule
        functions = (getattr(namespace, spelled, None) for namespace in NAMESPACES)
        table.update((function, rule) for function in functions if callable(function))
    return table


RULES = _table(BY_NAME, "{}")
IN_PLACE = _table(BY_NAME, "{}_") | {
    function: rule
    for name, rule in BY_NAME.items()
    if callable(function := getattr(operator, f"i{name.rstrip('_')}", None))
}
# Operators that change no value but in rounding.
MOVING = (COPIES, RESHAPES, MOVEMENTS, PIECES, EXPANSIONS, "getitem")
MOVES = _table({name: BY_NAME[name] for names in MOVING for name in names.split()}, "{}")
# Operators whose output never lies in the memory of an input.
NEW_MEMORY = _table({name: rule for name, rule in BY_NAME.items() if name not in VIEWS}, "{}").keys()
