"""Scaled dot-product attention on a CPU of live heads only, by the framework's own kernels.

A head is dead where nothing that a gate has left alive feeds its values, and nobody reads what comes out. Its values
are then the same at every position (but where padding or dropout made holes), so that their average, which is what
comes out, needs no weights; and all its gradients are zero. `live` holds a flag per head.
"""

import itertools

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]


def forward(
    query: Tensor, key: Tensor, value: Tensor, live: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention` returns, and the logarithms of its sums for `backward`.

    query `[N, heads, L, E]`, key and value `[N, heads, S, E]`, each with a unit stride along E, live bool `[heads]`
    on the CPU; returns `[N, heads, L, E]`, which is `[N, L, heads, E]` in memory, and `[N, heads, L]` likewise.
    """
    alive, dead = _runs(live)
    if not dead:
        return _forward([query, key, value], is_causal, scale)
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    sums = query.new_zeros(batch, length, heads, dtype=_wide(query)).transpose(1, 2)
    for together in _parts(alive, batch):
        found = _forward([_taken(tensor, together) for tensor in (query, key, value)], is_causal, scale)
        for whole, part in zip((out, sums), found, strict=True):
            _put(part, together, whole)
    for run in dead:
        out[:, run] = value[:, run].mean(2, keepdim=True)
    return out, sums


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, live: Tensor, is_causal: bool,
    scale: float | None,
) -> Triple:  # fmt: skip
    """Gradients of query, key and value, of which dead heads have none; in memory `[N, L, heads, E]`."""
    alive, dead = _runs(live)
    if not dead:
        return _backward([grad, query, key, value, out, sums], is_causal, scale)
    given = (query, key, value)
    whole = tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in given)
    for together in _parts(alive, query.shape[0]):
        tensors = [_taken(tensor, together) for tensor in (grad, query, key, value, out, sums)]
        for part, gradient in zip(_backward(tensors, is_causal, scale), whole, strict=True):
            _put(part, together, gradient)
    for run in dead:
        for gradient in whole:
            gradient[:, run] = 0
    return whole[0], whole[1], whole[2]


def _forward(operands: list[Tensor], is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: tuple[Tensor, Tensor] = attend(*operands, 0.0, is_causal, scale=scale)
    return found


def _backward(tensors: list[Tensor], is_causal: bool, scale: float | None) -> Triple:
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Triple = differentiate(*tensors, 0.0, is_causal, scale=scale)
    return found


def _runs(live: Tensor) -> tuple[list[slice], list[slice]]:
    """The live heads and the dead ones, as runs of heads side by side."""
    runs: dict[bool, list[slice]] = {True: [], False: []}
    start = 0
    for flag, group in itertools.groupby(live.tolist()):
        end = start + len(list(group))
        runs[bool(flag)].append(slice(start, end))
        start = end
    return runs[True], runs[False]


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
