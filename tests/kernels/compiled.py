"""What Triton makes of a kernel for a GPU that need not be there: registers, spills, shared memory, loop depth."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctrlcompile.kernels import triton_build, triton_rows_text, triton_wgrad
from ctrlcompile.kernels.triton_device import Device
from ctrlcompile.kernels.triton_rows import Rows, RowsTile
from ctrlcompile.kernels.triton_wgrad import Wgrad, WgradTile

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_COUNTS = ("m", "probed", "splits", "images", "groups")
_INTEGERS = ("outputs", "inputs", "grad_z_stride", "x_stride", "weight_stride")
_LISTS = ("offsets", "indices", "order", "probes")
_FLOATS = ("bias", "signals", "partials")
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would run."""

    registers: int  # of a thread
    spills: int  # instructions that move registers to memory and back
    shared: int  # bytes
    warp_group_products: int  # wgmma or tcgen05 instructions
    buffers: int  # that the loop's loads go round in; 1 where nothing is pipelined


def compile_kernel(kernel: Rows | Wgrad, tile: RowsTile | WgradTile, device: Device) -> Compiled:
    """Compiles the main kernel of a module for the device; sizes and strides are multiples of 16, as in real models."""
    element = _TYPES[kernel.dtype]
    boxes = {}
    if isinstance(kernel, Rows):
        module = triton_build.load(f"{kernel.name}_{tile.name}", triton_rows_text.source(kernel, tile))
        function = module.rows_product
        names = triton_rows_text.parameters(kernel, tile)
        weight = (kernel.columns, tile.step) if kernel.transposed else (tile.step, kernel.columns)
        boxes = {"x": (tile.rows, tile.step), "weight": weight}
    else:
        module = triton_build.load(f"{kernel.name}_{tile.name}", triton_wgrad.source(kernel, tile))
        function = module.weight_gradient
        names = triton_wgrad.parameters(kernel, tile)
        boxes = {"grad_z": (tile.rows, kernel.sides[0]), "x": (tile.rows, kernel.sides[1])}
    sizes = kernel.walk.parameters if kernel.walk else []
    signature = {}
    for name in names:
        if name in (*_COUNTS, *_INTEGERS, *sizes):
            signature[name] = "i32"
        elif name in _LISTS:
            signature[name] = "*i32"
        elif name in _FLOATS:
            signature[name] = "*fp32"
        elif tile.descriptors and name in boxes:
            signature[name] = f"tensordesc<{element}[{','.join(map(str, boxes[name]))}]>"
        else:
            signature[name] = f"*{element}"
    plain = [name for name in names if name not in (*_COUNTS, *sizes) and "desc" not in signature[name]]
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in plain}
    target = GPUTarget("cuda", device.capability[0] * 10 + device.capability[1], 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    result = triton.compile(ASTSource(function, signature, {}, divisible), target=target, options=options)
    usage, spills = _resources(result.asm["cubin"])
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=spills,
        shared=result.metadata.shared,
        warp_group_products=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", result.asm["ptx"])),
        buffers=_buffers(result.asm["ttgir"]),
    )


def _resources(cubin: bytes) -> tuple[str, int]:
    """The usage as cuobjdump tells it, and how many instructions access local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        if int(re.search(r"STACK:(\d+)", usage)[1]) == 0:
            return usage, 0
        return usage, len(re.findall(r"\b(?:STL|LDL)\b", _run("cuobjdump", "-sass", file.name)))


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([str(_BINARIES / program), *arguments], capture_output=True, text=True, check=True).stdout


def _buffers(ttgir: str) -> int:
    found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:f16|bf16|f32),", ttgir)
    return min(map(int, found), default=1)
