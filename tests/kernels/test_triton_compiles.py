"""Tiles that may be chosen compile for the GPUs they are meant for: no spills, enough shared memory, full pipelines.

No GPU is needed. A choice of kernels is compiled at each run; `CTRLCOMPILE_TEST_ALL_TILES=1` compiles every candidate.
"""

import os

import pytest
import torch

from ctrlcompile.kernels import triton_rows, triton_wgrad
from ctrlcompile.kernels.reference import backward
from ctrlcompile.kernels.triton_device import A100, B200, H100
from ctrlcompile.kernels.triton_rows import Rows
from ctrlcompile.kernels.triton_wgrad import Wgrad
from ctrlcompile.kernels.window import Window

pytest.importorskip("triton")

from .compiled import compile_kernel

HALF, FLOAT = torch.bfloat16, torch.float32
DEVICES = {"sm_80": A100, "sm_90": H100, "sm_100": B200}
SIDES = (16, 32, 48, 64, 80, 96, 112, 128)
SAME = {"taps": (3, 3), "window": Window((1, 1), ((1, 1), (1, 1)), (1, 1))}
STRIDED = {"taps": (3, 3), "window": Window((2, 2), ((1, 1), (1, 1)), (1, 1))}
GROUPED = {"taps": (3, 3), "window": Window((1, 1), ((1, 1), (1, 1)), (1, 1), 2)}


def kernels(block, dtype, precision="ieee", **convolution):
    out, into = block
    activation, last = ("relu", "none") if convolution else ("gelu", backward("gelu"))
    return {
        "forward": Rows(out, into, True, dtype, activation, True, False, precision, **convolution),
        "dgrad": Rows(into, out, False, dtype, last, precision=precision, **convolution),
        "wgrad": Wgrad(out, into, dtype, precision, **convolution),
    }


def chosen():
    """Name, kernel, tile, device: the best guesses of main blocks, and every family of tile at least once a device."""
    for name, device in DEVICES.items():
        blocks = [(128, 64), (128, 128), (64, 64), (32, 32)] if device is H100 else [(128, 64), (32, 32)]
        for block in blocks:
            for role, kernel in kernels(block, HALF).items():
                yield name, role, block, kernel, candidates(kernel, 8192, 4096, device)[0], device
    for block, m, size, aligned in [
        ((128, 64), 8, 4096, True),
        ((64, 64), 8192, 4096, False),
        ((48, 16), 512, 768, False),
    ]:
        for role, kernel in kernels(block, torch.float16).items():
            yield "sm_90", role, block, kernel, candidates(kernel, m, size, H100, aligned)[0], H100
    for precision in ("ieee", "tf32"):
        for role, kernel in kernels((64, 64), FLOAT, precision).items():
            yield "sm_90", f"{precision} {role}", (64, 64), kernel, candidates(kernel, 8192, 4096, H100)[0], H100
    for name, block, convolution in [
        ("sm_90", (128, 64), STRIDED),
        ("sm_90", (64, 64), SAME),
        ("sm_80", (64, 64), SAME),
    ]:
        for role, kernel in kernels(block, HALF, **convolution).items():
            tile = candidates(kernel, 1 << 16, 256, DEVICES[name])[0]
            yield name, f"{kernel.walk.name} {role}", block, kernel, tile, DEVICES[name]


def every():
    seen = set()
    for name, device in DEVICES.items():
        for block in ((out, into) for out in SIDES for into in SIDES):
            kinds = [(HALF, "ieee", {}), (torch.float16, "ieee", {}), (FLOAT, "ieee", {}), (FLOAT, "tf32", {})]
            kinds += [(HALF, "ieee", window) for window in (SAME, STRIDED, GROUPED)] + [(FLOAT, "tf32", SAME)]
            for dtype, precision, convolution in kinds:
                for role, kernel in kernels(block, dtype, precision, **convolution).items():
                    for m, size, aligned in [
                        (8192, 4096, True),
                        (8192, 4096, False),
                        (512, 768, True),
                        (8, 4096, True),
                    ]:
                        for tile in candidates(kernel, m, size, device, aligned):
                            if (kernel, tile, device) not in seen:
                                seen.add((kernel, tile, device))
                                yield name, role, block, kernel, tile, device


def candidates(kernel, m, size, device, aligned=True):
    family = triton_rows if isinstance(kernel, Rows) else triton_wgrad
    return family.candidates(kernel, m, size, size, device, aligned)


def cases():
    found = every() if os.environ.get("CTRLCOMPILE_TEST_ALL_TILES") else chosen()
    for name, role, block, kernel, tile, device in found:
        yield pytest.param(kernel, tile, device, id=f"{role} {block[0]}x{block[1]} {tile.name} {name}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CTRLCOMPILE_CACHE_DIR", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize(("kernel", "tile", "device"), list(cases()))
def test_it_compiles_without_spills_and_pipelines_as_deep_as_asked(kernel, tile, device):
    compiled = compile_kernel(kernel, tile, device)
    family = triton_rows if isinstance(kernel, Rows) else triton_wgrad
    # With registers to spare, ptxas at times keeps a few addresses of the epilogue in memory, to hold more warps; and
    # in the widest tiles where the epilogue reads as many values as it has sums.
    reads = isinstance(kernel, Rows) and kernel.takes_z
    assert compiled.spills <= (16 if compiled.registers < 200 or reads else 0)
    assert compiled.shared <= min(family.shared_bytes(kernel, tile), device.shared_memory)
    if device.warp_group_products and kernel.dtype != FLOAT and tensor_core_rows(kernel, tile) >= 64:
        assert compiled.warp_group_products > 0
    # What is read into registers at the start of an iteration frees its buffer for the loads of a later one.
    assert compiled.buffers == tile.stages - (compiled.warp_group_products == 0)


def tensor_core_rows(kernel, tile):
    if isinstance(kernel, Rows):
        return kernel.columns if tile.swap else tile.rows
    out, into = kernel.sides
    return (into if tile.descriptors else into * tile.group) if kernel.swapped else out
