"""What a benchmark ran on and with, as its JSON keeps it."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ctrlcompile.kernels import build, isa

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MOST_BYTES = 2**31 - 1


def describe(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """The machine, the versions, commit and command of this run; of a GPU its name, driver and Triton as well.

    `dtype`: of the products, on which depends what instructions a CPU has for them.
    """
    found: dict[str, object] = {
        "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit(), "command": command(),
    }  # fmt: skip
    if device.type != "cuda":
        return found | {"isa": isa.current(dtype).name, "compiler": _first_line(*build.compiler(), "--version")}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory, "second_level_cache_bytes": properties.L2_cache_size,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda, "triton": triton.__version__,
    }  # fmt: skip


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed, for all contestants of a process alike; whether it does.

    Else it depends on what the others have freed whose results come anew from the system, page fault by page fault.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(M_MMAP_THRESHOLD, MOST_BYTES):
        return False  # the other one alone makes it worse
    return bool(mallopt(M_TRIM_THRESHOLD, MOST_BYTES))


def command() -> str:
    """What was typed, whichever interpreter ran it."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def commit() -> str:
    """Of this checkout, with `-dirty` where files differ from it; empty where git cannot tell."""
    return _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*")


def _cpu() -> str:
    """Name, family and model, as Linux has them: a name alone may stand for several generations."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor()
    return f"{found['model name']}, family {found.get('cpu family', '?')}, model {found.get('model', '?')}"


def _first_line(*program: str) -> str:
    """What a program says of itself; empty where it is not there."""
    if shutil.which(program[0]) is None:
        return ""
    said = subprocess.run(program, capture_output=True, text=True, check=False).stdout
    return next(iter(said.splitlines()), "")
