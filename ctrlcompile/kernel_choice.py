"""Which kernel computes a gated layer: generated C++ on a CPU, generated Triton on a GPU, a dense product elsewhere.

Where no kernel can run, the framework's dense products compute the same, after one warning that says why. On a CPU a
gate may have other variants in force (`variants`); on a GPU one that is denser than the measured crossover of its shape
runs as a dense product, too. A convolution whose window is a single tap that sees every position is a linear, and
computed as one.
"""

import functools
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrlcompile import variants
from ctrlcompile.blocks import Block
from ctrlcompile.gate import registry
from ctrlcompile.kernels import index_lists, isa
from ctrlcompile.kernels.build import KernelBuildError
from ctrlcompile.kernels.index_lists import BlockLists
from ctrlcompile.kernels.reference import DIFFERENTIATED, Before, backward
from ctrlcompile.kernels.verbs import Dgrad, Forward, Verb, Wgrad
from ctrlcompile.kernels.window import Window, channels_last


@dataclass(frozen=True, eq=False)  # a key of caches that are read at each call
class Family:
    """The kernels of one kind of layer: modules of `ctrlcompile.kernels` with the same verbs.

    `tried_on` is the window of the smallest layer that they are tried on before they are relied on, 3 taps wide; None
    for linears.
    """

    cpu: str
    gpu: str
    dense: str
    tried_on: Window | None = None


LINEAR = Family("cpu_linear", "triton_linear", "dense_linear")
CONV = Family("cpu_conv", "triton_conv", "dense_conv", Window((1, 1), ((1, 1), (1, 1)), (1, 1)))

# family, device, input, weight, block, activation
Types = tuple[Family, torch.device, torch.dtype, torch.dtype, Block, str]


def family_of(window: Window | None, taps: Sequence[int]) -> Family:
    """The kernels for a convolution with a kernel of `taps`; None for `window`: for a linear."""
    return LINEAR if window is None or window.is_linear(taps) else CONV


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.linear`, or `reference.conv` with a window, by the fastest kernel that can run.

    x `[M, K]` with a unit stride along K, or `[N, I, *size]` channels-last; what comes out lies as x does. z is empty
    where the activation's derivative is known from y.
    """
    if window is not None and family_of(window, weight.shape[2:]) is LINEAR:
        y, z = forward(_rows(x), weight.flatten(1), bias, lists, block, activation)
        return _image(y, x), _image(z, x) if z.dim() == y.dim() else z
    result: tuple[Tensor, Tensor] = _compute(Forward(x, weight, bias, lists, block, activation, window))
    return result


def dgrad(
    grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block, window: Window | None = None,
    input_size: tuple[int, ...] = (), before: Before | None = None,
) -> Tensor:  # fmt: skip
    """`reference.linear_dgrad` or `reference.conv_dgrad` likewise; grad_z `[M, N]` or `[N, O, *out]` channels-last."""
    if window is not None and family_of(window, weight.shape[2:]) is LINEAR:
        before = None if before is None else before._replace(z=_rows(before.z))
        return _image(dgrad(_rows(grad_z), weight.flatten(1), lists, block, before=before), grad_z)
    result: Tensor = _compute(Dgrad(grad_z, weight, lists, block, window, input_size, before))
    return result


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.linear_wgrad` or `reference.conv_wgrad` likewise."""
    if window is not None and family_of(window, weight.shape[2:]) is LINEAR:
        gradient, signals = wgrad(_rows(grad_z), _rows(x), weight.flatten(1), lists, probes, block)
        return gradient.view(weight.shape), signals
    result: tuple[Tensor, Tensor] = _compute(Wgrad(grad_z, x, weight, lists, probes, block, window))
    return result


def why_no_kernel(
    device: torch.device,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    block: Block,
    activation: str = "none",
    *,
    family: Family = LINEAR,
    strict: bool = False,
) -> str | None:
    """Builds the kernels for these types and this block; None where they can run, else the reason.

    Raises what the build raised when `strict`; otherwise a failed build warns once and is remembered.
    """
    types = _types(family, device, x_dtype, weight_dtype, block, activation)
    if types in _working:
        return None
    if types in _broken and not strict:
        return _broken[types]
    if (reason := _unsupported(types)) is not None:
        return reason
    try:
        _try(types)
    except KernelBuildError as error:
        if strict:
            raise
        return _give_up(types, error)
    _working.add(types)
    if device.type == "cpu" and x_dtype == torch.bfloat16 and isa.has_amx():
        _tell_of_amx()
    return None


def kernel_name(device: torch.device, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """What users call the kernel for these types: language, instruction set or device, types."""
    _, _, x_dtype, weight_dtype, _, _ = _types(LINEAR, device, x_dtype, weight_dtype, (0, 0))
    types = " x ".join(sorted({str(dtype).removeprefix("torch.") for dtype in (x_dtype, weight_dtype)}))
    return f"C++ {isa.current(x_dtype).name} {types}" if device.type == "cpu" else f"Triton {types}"


def device_name(device: torch.device) -> str:
    """What people call the device: the GPU's name, or the CPU with its instruction set."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({isa.current().name})"


def kernel_sources(
    device: torch.device,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    block: Block,
    activation: str,
    family: Family = LINEAR,
) -> dict[str, Path]:
    """The generated source of the kernel of each role; empty where no kernel runs, or it depends on the call's size."""
    if device.type != "cpu" or why_no_kernel(device, x_dtype, weight_dtype, block, activation, family=family):
        return {}
    sources: dict[str, Path] = _module(family.cpu).sources(x_dtype, weight_dtype, block, activation)
    return sources


_working: set[Types] = set()
_broken: dict[Types, str] = {}


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"ctrlcompile.kernels.{name}")  # Triton itself only where it is needed


def _rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """Rows as an image `[N, C, *size]`, channels-last, with batch and size of another."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).movedim(-1, 1)


def _compute(verb: Verb) -> Any:
    family, weight = family_of(verb.window, verb.weight.shape[2:]), verb.weight
    try:
        if (kernel := _kernel(verb, family)) is not None:
            gate = registry.with_lists(verb.lists.crow_indices)
            if gate is not None and (table := variants.table_of(gate)) is not None:
                return variants.compute(verb, gate, table, kernel, _module(family.dense))
            return verb.by(kernel)
    except KernelBuildError as error:
        types = _types(family, weight.device, verb.moving.dtype, weight.dtype, verb.block, verb.last)
        _give_up(types, error)
    # A gate keeps masked blocks zero; a CPU need not rely on it. The weight gradient looks at the lists by itself.
    if verb.role != "wgrad" and weight.device.type == "cpu":
        active = index_lists.expand(index_lists.mask_of(verb.lists), verb.block, weight.shape)
        verb = verb._replace(weight=torch.where(active, weight, 0).to(verb.moving.dtype))
    return verb.by(_module(family.dense))


def _types(
    family: Family,
    device: torch.device,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    block: Block,
    activation: str = "none",
) -> Types:
    # A float32 weight under a GPU's autocast is cast like its input before the operator sees it.
    weight_dtype = weight_dtype if device.type == "cpu" or weight_dtype != torch.float32 else x_dtype
    return family, device, x_dtype, weight_dtype, block, activation


def _unsupported(types: Types) -> str | None:
    family, device, x_dtype, weight_dtype, block, _ = types
    reason: str | None = f"no kernels for device type {device.type!r}"
    if device.type == "cpu":
        reason = _module(family.cpu).supported(x_dtype, weight_dtype, block)
    elif device.type == "cuda":
        reason = _module(family.gpu).supported(x_dtype, weight_dtype, block, device)
    return reason


def _kernel(verb: Verb, family: Family) -> Any:
    """The module to compute a call with; None where no kernel of the family can run."""
    device, types = verb.weight.device, (verb.moving.dtype, verb.weight.dtype)
    if why_no_kernel(device, *types, verb.block, verb.last, family=family) is not None:
        return None
    if device.type == "cpu":
        return _module(family.cpu)
    gate = registry.with_lists(verb.lists.crow_indices)
    if gate is not None and gate.density > _crossover(verb, family):
        return _module(family.dense)
    return _module(family.gpu)


def _crossover(verb: Verb, family: Family) -> float:
    shape, rows = tuple(verb.weight.shape), verb.moving.shape[0]
    sizes = (rows, *shape) if verb.window is None else (rows, verb.image, shape, verb.window)
    crossover = _module(family.gpu).crossover
    return float(crossover(verb.role, verb.moving.dtype, verb.block, *sizes, verb.weight.device))


def _give_up(types: Types, error: KernelBuildError) -> str:
    if not any(reason.endswith(str(error)) for reason in _broken.values()):
        warnings.warn(f"ctrlcompile computes gated layers densely: {error}", RuntimeWarning, stacklevel=3)
    _working.discard(types)
    _broken[types] = f"kernel not built: {error}"
    return _broken[types]


@functools.cache
def _tell_of_amx() -> None:
    warnings.warn(
        "ctrlcompile prunes layers in bfloat16 on a CPU with AMX: that saves FLOPs, not time. Its kernels do "
        "not use AMX, the CPU's dense bfloat16 products do, and are several times as fast",
        RuntimeWarning,
        stacklevel=4,
    )


def _try(types: Types) -> None:
    family, device, x_dtype, weight_dtype, block, activation = types
    kernel = _module(family.cpu if device.type == "cpu" else family.gpu)
    lists = index_lists.build(torch.ones(1, 1, dtype=torch.bool, device=device))
    probes = torch.full((1,), -1, dtype=torch.int32, device=device)
    window = () if family.tried_on is None else (family.tried_on,)
    size = () if family.tried_on is None else (3,) * len(family.tried_on.stride)
    x = torch.ones(1, block[1], *size, dtype=x_dtype, device=device)
    x = channels_last(x) if size else x
    weight = torch.ones(*block, *size, dtype=weight_dtype, device=device)
    backwards = {backward(name): name for name in DIFFERENTIATED}
    before = Before.of(x, backwards[activation]) if activation in backwards else None
    y, _ = kernel.forward(x, weight, None, lists, block, "none" if activation in backwards else activation, *window)
    kernel.dgrad(y, weight, lists, block, *window, *(size for _ in window), before)
    for module in (kernel, _module(family.dense)):  # of which that builds, too, what it does after a dense product
        module.wgrad(y, x, weight, lists, probes, block, *window)
