"""Which kernel computes a gated linear: generated C++ on a CPU, generated Triton on a GPU, a dense product elsewhere.

Where no kernel can run, dense products compute the same, after one warning that says why. On a GPU a gate that is
denser than the measured crossover of its shape runs as the framework's own dense product, too.
"""

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ctrlcompile.gate import Block, registry
from ctrlcompile.kernels import cpu_linear, dense_linear, isa, reference
from ctrlcompile.kernels.build import KernelBuildError
from ctrlcompile.kernels.index_lists import BlockLists, build, mask_of

Types = tuple[torch.device, torch.dtype, torch.dtype, Block, str]  # device, input, weight, block, activation


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: BlockLists, block: Block, activation: str
) -> tuple[Tensor, Tensor]:
    """`reference.linear` by the fastest kernel that can run; x `[M, K]` with a unit stride along K."""
    try:
        if (kernel := _kernel("forward", x, weight, lists, block, activation)) is not None:
            return kernel.forward(x, weight, bias, lists, block, activation)
    except KernelBuildError as error:
        _give_up(_types(weight.device, x.dtype, weight.dtype, block, activation), error)
    if weight.device.type == "cuda":
        return dense_linear.forward(x, weight, bias, lists, block, activation)
    return reference.linear(x, weight, bias, mask_of(lists), block, activation)


def dgrad(grad_z: Tensor, weight: Tensor, lists: BlockLists, block: Block) -> Tensor:
    """`reference.linear_dgrad` likewise; grad_z `[M, N]`."""
    try:
        if (kernel := _kernel("dgrad", grad_z, weight, lists, block)) is not None:
            return kernel.dgrad(grad_z, weight, lists, block)
    except KernelBuildError as error:
        _give_up(_types(weight.device, grad_z.dtype, weight.dtype, block), error)
    if weight.device.type == "cuda":
        return dense_linear.dgrad(grad_z, weight, lists, block)
    return reference.linear_dgrad(grad_z, weight, mask_of(lists), block)


def wgrad(
    grad_z: Tensor, x: Tensor, weight: Tensor, lists: BlockLists, probes: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """`reference.linear_wgrad` likewise; grad_z `[M, N]`, x `[M, K]`."""
    try:
        if (kernel := _kernel("wgrad", x, weight, lists, block)) is not None:
            return kernel.wgrad(grad_z, x, weight, lists, probes, block)
    except KernelBuildError as error:
        _give_up(_types(weight.device, x.dtype, weight.dtype, block), error)
    if weight.device.type == "cuda":
        return dense_linear.wgrad(grad_z, x, weight, lists, probes, block)
    return reference.linear_wgrad(grad_z, x, weight, mask_of(lists), probes, block)


def why_no_kernel(
    device: torch.device,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    block: Block,
    activation: str = "none",
    *,
    strict: bool = False,
) -> str | None:
    """Builds the kernels for these types and this block; None where they can run, else the reason.

    Raises what the build raised when `strict`; otherwise a failed build warns once and is remembered.
    """
    types = _types(device, x_dtype, weight_dtype, block, activation)
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
    return None


def kernel_name(device: torch.device, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """What users call the kernel for these types: language, instruction set or device, types."""
    _, x_dtype, weight_dtype, _, _ = _types(device, x_dtype, weight_dtype, (0, 0))
    types = " x ".join(sorted({str(dtype).removeprefix("torch.") for dtype in (x_dtype, weight_dtype)}))
    return f"C++ {isa.current().name} {types}" if device.type == "cpu" else f"Triton {types}"


def kernel_sources(
    device: torch.device, x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block, activation: str
) -> dict[str, Path]:
    """The generated source of the kernel of each role; empty where no kernel runs, or it depends on the call's size."""
    if device.type != "cpu" or why_no_kernel(device, x_dtype, weight_dtype, block, activation) is not None:
        return {}
    return cpu_linear.sources(x_dtype, weight_dtype, block, activation)


_working: set[Types] = set()
_broken: dict[Types, str] = {}


def _types(
    device: torch.device, x_dtype: torch.dtype, weight_dtype: torch.dtype, block: Block, activation: str = "none"
) -> Types:
    # A float32 weight under a GPU's autocast is cast like its input before the operator sees it.
    weight_dtype = weight_dtype if device.type == "cpu" or weight_dtype != torch.float32 else x_dtype
    return device, x_dtype, weight_dtype, block, activation


def _unsupported(types: Types) -> str | None:
    device, x_dtype, weight_dtype, block, _ = types
    if device.type == "cpu":
        return cpu_linear.supported(x_dtype, weight_dtype, block)
    if device.type == "cuda":
        return _triton().supported(x_dtype, weight_dtype, block, device)
    return f"no kernels for device type {device.type!r}"


def _kernel(
    role: str, x: Tensor, weight: Tensor, lists: BlockLists, block: Block, activation: str = "none"
) -> ModuleType | None:
    device = weight.device
    if why_no_kernel(device, x.dtype, weight.dtype, block, activation) is not None:
        return None
    if device.type == "cpu":
        return cpu_linear
    gate = registry.with_lists(lists.crow_indices)
    if gate is not None and gate.density > _crossover(role, x, weight, block):
        return dense_linear
    return _triton()


def _crossover(role: str, x: Tensor, weight: Tensor, block: Block) -> float:
    n, k = weight.shape
    return float(_triton().crossover(role, x.dtype, block, x.shape[0], n, k, weight.device))


def _triton() -> Any:
    return importlib.import_module("ctrlcompile.kernels.triton_linear")  # Triton itself only where it is needed


def _give_up(types: Types, error: KernelBuildError) -> str:
    if not _broken:
        warnings.warn(f"ctrlcompile computes gated layers densely: {error}", RuntimeWarning, stacklevel=3)
    _working.discard(types)
    _broken[types] = f"kernel not built: {error}"
    return _broken[types]


def _try(types: Types) -> None:
    device, x_dtype, weight_dtype, block, activation = types
    kernel = cpu_linear if device.type == "cpu" else _triton()
    lists = build(torch.ones(1, 1, dtype=torch.bool, device=device))
    probes = torch.full((1,), -1, dtype=torch.int32, device=device)
    x, weight = torch.ones(1, block[1], dtype=x_dtype, device=device), torch.ones(block, dtype=weight_dtype).to(device)
    y, _ = kernel.forward(x, weight, None, lists, block, activation)
    kernel.dgrad(y, weight, lists, block)
    kernel.wgrad(y, x, weight, lists, probes, block)
