"""What a compiled region costs in FLOPs, as expressions in its batch and sequence sizes.

The dense cost of a region is counted once, at compile time, by running its graph forward and backward on fake tensors
under PyTorch's own FLOP counter: attention, batched products and everything else that the counter knows is in it. The
symbols of dynamic shapes stay symbols (sympy) and are bound at each call.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ctrlcompile.passes.graph_edit import CHECKPOINT, argument, scopes
from ctrlcompile.passes.skip_heads import OPERANDS, is_attention

Expression: TypeAlias = int | sympy.Expr


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * sdpa_flop_count(q, k, v)


def _conv_backward(
    grad: Any, x: Any, weight: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: Any, wanted: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    positions = x if transposed else grad
    return sum(wanted[:2]) * 2 * positions[0] * prod(positions[2:]) * prod(weight)


# PyTorch's counter knows the attention operators of GPUs; these are the CPU's. What the backward computes a second
# time is left out, as everywhere here. Of a convolution in groups it counts the weight gradient as many times.
CORRECTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _conv_backward,
}


@dataclass(frozen=True)
class ProductCost:
    """FLOPs of one linear or convolution node at density 1; 2 per multiply-add."""

    forward: Expression
    dgrad: Expression
    wgrad: Expression

    @property
    def total(self) -> Expression:
        """All three products."""
        return self.forward + self.dgrad + self.wgrad


@dataclass(frozen=True)
class RegionCost:
    """FLOPs of one region: the whole of it, dense, each gated node's part, at density 1, and the attentions' by node.

    `symbols` are the sizes that the expressions depend on, in the order in which `bind` takes their values.
    """

    dense: Expression
    products: tuple[ProductCost, ...]
    symbols: tuple[sympy.Symbol, ...] = ()
    attentions: Mapping[str, Expression] = field(default_factory=dict)
    _bound: dict[tuple[int, ...], "BoundCost"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def uncounted(self) -> bool:
        """Whether a part depends on sizes that only the running graph knows, and is left out."""
        return bool(sympy.sympify(self.dense).free_symbols.difference(self.symbols))

    def bind(self, sizes: tuple[int, ...]) -> "BoundCost":
        """The cost at these sizes, one for each symbol; kept, since a run has few of them."""
        bound = self._bound.get(sizes)
        if bound is None:
            values = dict(zip(self.symbols, sizes, strict=True))

            def number(expression: Expression) -> float:
                known = sympy.sympify(expression).subs(values)
                return float(known.subs(dict.fromkeys(known.free_symbols, 0)))  # see `uncounted`

            products = tuple((number(p.total), number(p.wgrad)) for p in self.products)
            attentions = {name: number(flops) for name, flops in self.attentions.items()}
            bound = BoundCost(number(self.dense), products, attentions)
            self._bound[sizes] = bound
        return bound


@dataclass(frozen=True)
class BoundCost:
    """FLOPs of a region at given sizes: `products` holds (forward + dgrad + wgrad, wgrad) of each layer."""

    dense: float
    products: tuple[tuple[float, float], ...]
    attentions: Mapping[str, float] = field(default_factory=dict)

    def skipped(self, live_shares: Mapping[str, float]) -> float:
        """What attentions, by node, save of which only a part of the heads is live."""
        return sum((1 - share) * self.attentions[name] for name, share in live_shares.items())


def region_flops(gm: fx.GraphModule) -> Expression:
    """FLOPs of a Dynamo graph, dense: forward and, where gradients are on and anything asks for one, backward.

    What activation checkpointing computes a second time is left out, here and in the gated part alike.
    """
    examples = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    mode = next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), None)
    if mode is None:
        return 0
    with _scratch(mode), FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        inputs = [_fresh(example) for example in examples]
        outputs = [
            o
            for o in torch.utils._pytree.tree_leaves(_WithoutCheckpoints(gm).run(*inputs))
            if isinstance(o, torch.Tensor)
        ]
        roots = [o for o in outputs if o.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return expression(counter.get_total_flops())


def attention_flops(gm: fx.GraphModule) -> dict[str, Expression]:
    """FLOPs of each attention that can skip heads, dense, by node: forward, and backward where there is one."""
    found: dict[str, Expression] = {}
    for scope in scopes(gm):
        for node in filter(is_attention, scope.gm.graph.nodes):
            values = [argument(node, at, name).meta["example_value"] for at, name in enumerate(OPERANDS)]
            flops = sdpa_flop_count(*(value.shape for value in values))
            passes = 3 if any(value.requires_grad for value in values) else 1
            found[f"{scope.prefix}{node.name}"] = passes * expression(flops)
    return found


def symbols_of(gm: fx.GraphModule) -> tuple[tuple[sympy.Symbol, ...], tuple[int, ...]]:
    """The size symbols that a Dynamo graph takes as inputs, and their argument positions."""
    found: dict[sympy.Symbol, int] = {}
    for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and isinstance(symbol := expression(value), sympy.Symbol):
            found.setdefault(symbol, position)
    return tuple(found), tuple(found.values())


def expression(value: Any) -> Expression:
    """An int or SymInt as an int or a sympy expression."""
    return value.node.expr if isinstance(value, torch.SymInt) else int(value)


def _fresh(example: Any) -> Any:
    if not isinstance(example, torch.Tensor):
        return example
    if isinstance(example, FakeTensor) and example.item_memo is not None:
        return example  # a Python float that became an input: a copy would not know its value any more
    return example.detach().requires_grad_(example.requires_grad)


class _WithoutCheckpoints(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is CHECKPOINT:
            return type(self)(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


@contextlib.contextmanager
def _scratch(mode: FakeTensorMode) -> Iterator[None]:
    fresh = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()

    def untouched(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    # A checkpoint around the compiled call has saved-tensor hooks, which must not see fake tensors. Without any, none
    # are added: `torch.func.grad` refuses them.
    hooks: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if saved_tensors_are_hooked():
        hooks = torch.autograd.graph.saved_tensors_hooks(untouched, untouched)
    # The graph may change the grad mode, and leave it so.
    with mode, fresh, hooks, torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


def saved_tensors_are_hooked() -> bool:
    """Whether a forward pass runs under saved-tensor hooks, as inside a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
