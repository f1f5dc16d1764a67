"""Scaled dot-product attention on a CPU that computes weights for no head that needs none.

`kinds` says of each head which it is:

- DEAD: nothing that a gate has left alive feeds its values, and nobody reads what comes out. The values are then the
  same at every position (but where padding or dropout made holes), so what comes out is their average whatever the
  weights, and all gradients are zero.
- UNIFORM: nothing feeds its queries and its keys, so that each is the same at every position. All keys then weigh the
  same, what comes out is the average of the values, in causal attention of those so far, and time grows with the length
  and not with its square. Gradients are those of attention: the derivative of a softmax sums to zero over the keys, so
  that where these are constant queries get none.
- LIVE: any other, for the framework's own kernels.
"""

import itertools

import torch
from torch import Tensor

from . import cpu_averages
from .cpp_averages import DEAD as DEAD
from .cpp_averages import LIVE as LIVE
from .cpp_averages import UNIFORM as UNIFORM

Triple = tuple[Tensor, Tensor, Tensor]


def forward(
    query: Tensor, key: Tensor, value: Tensor, kinds: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention` returns, and the logarithms of its sums for `backward`.

    query `[N, heads, L, E]`, key and value `[N, heads, S, E]`, each with a unit stride along E, kinds uint8 `[heads]`
    on the CPU; returns `[N, heads, L, E]`, which is `[N, L, heads, E]` in memory, and `[N, heads, L]` likewise, of live
    heads.
    """
    runs = _live(kinds)
    if runs is None:
        return _forward([query, key, value], is_causal, scale)
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    sums = query.new_zeros(batch, length, heads, dtype=_wide(query)).transpose(1, 2)
    for together in _parts(runs, batch):
        found = _forward([_taken(tensor, together) for tensor in (query, key, value)], is_causal, scale)
        for whole, part in zip((out, sums), found, strict=True):
            _put(part, together, whole)
    cpu_averages.forward(value, out, kinds, is_causal)
    return out, sums


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, kinds: Tensor, is_causal: bool,
    scale: float | None,
) -> Triple:  # fmt: skip
    """Gradients of query, key and value; in memory `[N, L, heads, E]`."""
    runs = _live(kinds)
    if runs is None:
        return _backward([grad, query, key, value, out, sums], is_causal, scale)
    dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], *t.shape[1::2]).transpose(1, 2) for t in (query, key, value))
    for together in _parts(runs, query.shape[0]):
        tensors = [_taken(tensor, together) for tensor in (grad, query, key, value, out, sums)]
        for part, gradient in zip(_backward(tensors, is_causal, scale), (dq, dk, dv), strict=True):
            _put(part, together, gradient)
    cpu_averages.backward(grad, query, value, out, (dq, dk, dv), kinds, is_causal, scale)
    return dq, dk, dv


def _forward(operands: list[Tensor], is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = attend(*operands, 0.0, is_causal, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), sums  # it is laid out as the queries are


def _backward(tensors: list[Tensor], is_causal: bool, scale: float | None) -> Triple:
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Triple = differentiate(*tensors, 0.0, is_causal, scale=scale)
    return found


def _live(kinds: Tensor) -> list[slice] | None:
    """The live heads as runs of heads side by side; None where all are."""
    runs: list[slice] = []
    start = 0
    for kind, group in itertools.groupby(kinds.tolist()):
        end = start + len(list(group))
        if kind == LIVE:
            runs.append(slice(start, end))
        start = end
    return None if runs == [slice(0, kinds.numel())] else runs


def _parts(runs: list[slice], batch: int) -> list[list[slice]]:
    """Which runs to compute together: each by itself, which copies no input, if the batch keeps all threads busy."""
    return [[run] for run in runs] if batch >= torch.get_num_threads() else [runs] * bool(runs)


def _taken(tensor: Tensor, runs: list[slice]) -> Tensor:
    """Some heads of `[N, heads, ...]`."""
    parts = [tensor[:, run] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _put(part: Tensor, runs: list[slice], whole: Tensor) -> None:
    start = 0
    for run in runs:
        end = start + run.stop - run.start
        whole[:, run] = part[:, start:end]
        start = end


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
