"""What of this machine and installation works, what does not, and what to do about it."""

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ctrlcompile import kernel_choice, ops
from ctrlcompile.blocks import Block
from ctrlcompile.kernels import build, index_lists, isa, reference
from ctrlcompile.kernels.window import Window, channels_last

OLDEST_TORCH = "2.11"
_TIMEOUT_S = 600
_WORSE_THAN_DENSE = {torch.float32: 10, torch.bfloat16: 2}  # times a dense product's error that a kernel's may be


@dataclass(frozen=True)
class Check:
    """One thing looked at: `missing` is what this machine does without, `broken` what has to be put right."""

    what: str
    state: Literal["works", "missing", "broken"]
    found: str
    advice: str = ""


def checks() -> Iterator[Check]:
    """Looks at everything in turn; builds kernels in a folder of their own and compares what they compute."""
    yield _torch()
    yield _backend()
    yield _compiler()
    yield _instructions()
    yield _kernels("cpu")
    yield _triton()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        yield Check("GPU", "works", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
        yield _kernels("cuda")
    else:
        yield Check("GPU", "missing", f"none that this PyTorch ({torch.__version__}) can use: models run on the CPU")
    yield _cache()


def _torch() -> Check:
    found = f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    if torch.__version__ >= OLDEST_TORCH:  # a TorchVersion, which compares as versions do
        return Check("PyTorch", "works", found)
    return Check("PyTorch", "broken", found, f"Install PyTorch {OLDEST_TORCH} or newer")


def _backend() -> Check:
    if importlib.metadata.entry_points(group="torch_dynamo_backends", name="ctrlprune"):
        return Check("backend", "works", "torch.compile finds backend='ctrlprune'")
    advice = (
        "Install the package (pip install ctrlcompile, or pip install -e . in its repository); a copy is not enough"
    )
    return Check("backend", "broken", "torch.compile does not find backend='ctrlprune'", advice)


def _compiler() -> Check:
    try:
        program = build.compiler()
        version = subprocess.run((*program, "--version"), capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
    except build.KernelBuildError as error:
        return Check("C++ compiler", "broken", f"{error.what}: {error.why}", error.advice)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("C++ compiler", "broken", str(error), "Set CXX to one that works")
    return Check("C++ compiler", "works", f"{' '.join(program)}: {next(iter(version.splitlines()), '')}")


def _instructions() -> Check:
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        names = dict.fromkeys(isa.current(dtype).name for dtype in (torch.float32, torch.bfloat16))
    except ValueError as error:
        return Check("instruction set", "broken", str(error), "Unset CTRLCOMPILE_ISA")
    chosen = " by CTRLCOMPILE_ISA" if os.environ.get("CTRLCOMPILE_ISA") else ""
    return Check("instruction set", "works", f"kernels for {', '.join(names)}{chosen}; PyTorch runs {capability}")


def _kernels(device: str) -> Check:
    what = "CPU kernels" if device == "cpu" else "GPU kernels"
    command = [sys.executable, "-c", f"from ctrlcompile.inspect.doctor import probe; probe({device!r})"]
    # In a process of its own, since a wrong instruction set ends it.
    with tempfile.TemporaryDirectory(prefix="ctrlcompile-doctor-") as folder:
        environment = {**os.environ, "CTRLCOMPILE_CACHE_DIR": folder}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Check(what, "broken", f"did not finish within {_TIMEOUT_S} s", "Look at the C++ compiler")
    if done.returncode < 0:
        advice = "Unset CTRLCOMPILE_ISA" if os.environ.get("CTRLCOMPILE_ISA") else "Set CTRLCOMPILE_ISA=portable"
        return Check(what, "broken", f"end the process with {signal.Signals(-done.returncode).name}", advice)
    if done.returncode:
        return Check(what, "broken", done.stderr.strip().splitlines()[-1], "See the lines above; models run densely")
    result = json.loads(done.stdout.splitlines()[-1])
    if result["reason"] is not None:
        return Check(what, "missing", f"{result['reason']}: gated layers are computed densely there")
    layers, other = result["layers"].items(), result["no_bfloat16"]
    found = "built and run; " + ", ".join(
        f"error of {name} {its['error']:.1e} (computed densely {its['dense_error']:.1e})" for name, its in layers
    )
    if all(its["error"] <= its["most"] * its["dense_error"] for _, its in layers):
        if other is None:
            return Check(what, "works", found)
        return Check(what, "missing", f"{found}; in bfloat16 gated layers are computed densely: {other}")
    return Check(what, "broken", found, "Set CTRLCOMPILE_ISA=portable, or CXX to another compiler, and look again")


def probe(device_type: str) -> None:
    """Prints, as JSON, why kernels cannot run on a device, or else their largest error and that of dense products.

    What has a kernel for float32 and none for bfloat16 says why not.
    """
    device, block = torch.device(device_type), (16, 32)
    if device_type == "cuda":  # a process of its own: computes as the reference does
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    reasons = {}
    layers: dict[str, dict[str, float]] = {}
    for dtype, most in _WORSE_THAN_DENSE.items():
        full = dtype == torch.float32
        missing = [
            kernel_choice.why_no_kernel(device, dtype, dtype, block, "relu", family=family, strict=full)
            for family in (kernel_choice.LINEAR, kernel_choice.CONV)
        ]
        reasons[dtype] = next((reason for reason in missing if reason is not None), None)
        if reasons[dtype] is not None:
            continue
        name = str(dtype).removeprefix("torch.")
        layers[f"linears in {name}"] = _try_linear(device, dtype, block) | {"most": most}
        layers[f"convolutions in {name}"] = _try_conv(device, dtype, block) | {"most": most}
    answer = {"reason": reasons[torch.float32], "no_bfloat16": reasons[torch.bfloat16], "layers": layers}
    print(json.dumps(answer))


def _try_linear(device: torch.device, dtype: torch.dtype, block: Block) -> dict[str, float]:
    """Forward, dgrad and wgrad of a linear under a random mask: largest error, and that of dense products."""
    m, k, n = 70, 150, 90
    x, grad, weight, bias = _random(device, dtype, (m, k), (m, n), (n, k), (n,))
    mask, lists, probes, signals = _gated(weight, block)

    def dense(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (
            reference.linear(x, weight, bias, mask, block, "relu")[0],
            reference.linear_dgrad(grad, weight, mask, block),
            reference.linear_wgrad(grad, x, weight, mask, probes, block)[0],
        )

    ours = (
        ops.linear(x, weight, bias, signals, lists, probes, *block, "relu")[0],
        ops.linear_dgrad(grad, weight, lists, *block)[0],
        ops.linear_wgrad(grad, x, weight, lists, probes, *block)[0],
    )
    return _errors(ours, dense, x, grad, weight, bias)


def _try_conv(device: torch.device, dtype: torch.dtype, block: Block) -> dict[str, float]:
    """The same of a convolution of 3x3 taps."""
    images, k, n, side, window = 2, 70, 50, 9, Window((2, 1), ((1, 1), (1, 0)), (1, 1))
    size = window.output_size((side, side), (3, 3))
    x, grad, weight, bias = _random(device, dtype, (images, k, side, side), (images, n, *size), (n, k, 3, 3), (n,))
    x, grad = channels_last(x), channels_last(grad)
    mask, lists, probes, signals = _gated(weight, block)

    def dense(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (
            reference.conv(x, weight, bias, mask, block, "relu", window)[0],
            reference.conv_dgrad(grad, weight, mask, block, window, (side, side)),
            reference.conv_wgrad(grad, x, weight, mask, probes, block, window)[0],
        )

    moves = window.arguments
    ours = (
        ops.conv(x, weight, bias, signals, lists, probes, *block, "relu", *moves)[0],
        ops.conv_dgrad(grad, weight, lists, *block, [side, side], *moves)[0],
        ops.conv_wgrad(grad, x, weight, lists, probes, *block, *moves)[0],
    )
    return _errors(ours, dense, x, grad, weight, bias)


def _random(device: torch.device, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*size, device=device).to(dtype) for size in sizes]


def _gated(weight: Tensor, block: Block) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """A random mask of a weight's blocks, its lists, no probes, and room for signals."""
    shape = weight.shape[0], weight.shape[1]
    mask = torch.rand(index_lists.grid_shape(shape, block), device=weight.device) < 0.5
    probes = torch.full((1,), -1, dtype=torch.int32, device=weight.device)
    return mask, list(index_lists.build(mask)), probes, torch.zeros(2, *mask.shape, device=weight.device)


def _errors(ours: tuple[Tensor, ...], dense: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> dict[str, float]:
    """Of `ours` and of `dense` in the operands' type, against `dense` in float64."""
    exact = dense(*(operand.double() for operand in operands))

    def error(results: tuple[Tensor, ...]) -> float:
        return max(float((result - right).abs().max()) for result, right in zip(results, exact, strict=True))

    return {"error": error(ours), "dense_error": error(dense(*operands))}


def _triton() -> Check:
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        advice = "" if not torch.cuda.is_available() else "Install the Triton that goes with this PyTorch"
        state: Literal["missing", "broken"] = "broken" if torch.cuda.is_available() else "missing"
        return Check("Triton", state, f"not installed ({error}): only a GPU needs it", advice)
    return Check("Triton", "works", f"Triton {version}")


def _cache() -> Check:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = build.cache_folder()
    if caught:
        return Check("kernel cache", "broken", str(caught[0].message).split(". ")[0], "Set CTRLCOMPILE_CACHE_DIR")
    found = cached(folder)
    size = sum(path.stat().st_size for path in found)
    return Check("kernel cache", "works", f"{folder}: {len(found)} kernels, {size / 1e6:.1f} MB")


def cached(folder: Path) -> list[Path]:
    """What a cache folder keeps: C++ libraries (their source beside them, in `.cpp`), generated Triton files, and
    the tiles that were tuned for them."""
    return sorted(path for end in ("so", "py", "json") for path in folder.glob(f"*_{'[0-9a-f]' * 16}.{end}"))
