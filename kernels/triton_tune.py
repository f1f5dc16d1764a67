"""Chooses a kernel's tile by the clock, once per device and shape, and remembers it on disk.

In the same go it measures the dense product of the same role, which tells from which density on it is faster: the
`crossover`. The first call with a shape compiles and times up to six tiles, ten to thirty seconds of a user's time,
so that the lists of candidates are kept short; numbers of rows are tuned by powers of 2. Where nothing can be timed,
while a CUDA graph is captured, without a GPU or with `CTRLCOMPILE_TUNE=0`, and for products too small to matter, the
best guess serves.

What was found lies in one small file per case in the kernel cache. It is written at once, so that any number of
processes may tune at a time; a file that cannot be read, or names no candidate, counts as none.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

from . import build, triton_build, triton_clock, triton_device, triton_rows, triton_wgrad
from .build import KernelBuildError
from .triton_clock import Clock, Tile
from .triton_rows import Rows, RowsTile
from .triton_wgrad import Wgrad, WgradTile

log = logging.getLogger(__name__)

_DENSITY = 0.4  # of the random mask that tiles are compared on
_LOW, _HIGH = 0.25, 1.0  # of those that the crossover is computed from
_WORTH_TUNING = 2**27  # FLOPs of the dense product: a smaller one takes less time than launching it


@dataclass(frozen=True)
class Case:
    """What a choice is made for; `m` is a power of 2.

    Of a convolution, `m` pixels, and `size` is the spatial size of its input in powers of 2.
    """

    kernel: Rows | Wgrad
    m: int
    outputs: int
    inputs: int
    aligned: bool
    device: torch.device
    size: tuple[int, ...] = ()

    @functools.cached_property
    def candidates(self) -> Sequence[Tile]:
        """Tiles to choose from, best guess first."""
        shape = (self.m, self.outputs, self.inputs, triton_device.of(self.device), self.aligned)
        if isinstance(self.kernel, Rows):
            return triton_rows.candidates(self.kernel, *shape)
        return triton_wgrad.candidates(self.kernel, *shape)

    @property
    def name(self) -> str:
        """What is tuned, in words; the choice is kept under them."""
        import triton

        shape = f"m {self.m} outputs {self.outputs} inputs {self.inputs}"
        place = f"{triton_device.of(self.device).name}, triton {triton.__version__}, torch {torch.__version__}"
        partial = " partial" if isinstance(self.kernel, Rows) and self.kernel.partial else ""
        images = f" over {self.kernel.window} of {self.size}" if self.size else ""
        return f"{self.kernel.name}{partial} {shape}{images}{' aligned' if self.aligned else ''} on {place}"


@dataclass(frozen=True)
class Choice:
    """The fastest tile, and the density above which the dense product is faster: 1 where it never is."""

    tile: Tile
    crossover: float


Size = tuple[int, ...]


@overload
def choose(
    kernel: Rows, m: int, outputs: int, inputs: int, aligned: bool, device: torch.device, size: Size = ()
) -> RowsTile: ...


@overload
def choose(
    kernel: Wgrad, m: int, outputs: int, inputs: int, aligned: bool, device: torch.device, size: Size = ()
) -> WgradTile: ...


def choose(
    kernel: Rows | Wgrad, m: int, outputs: int, inputs: int, aligned: bool, device: torch.device, size: Size = ()
) -> Tile:
    """The tile for a call with `m` rows; of a convolution, whose input has this spatial `size`, `m` pixels.

    Raises KernelBuildError when no candidate runs.
    """
    return _choice(_case(kernel, m, outputs, inputs, aligned, device, size)).tile


def crossover(kernel: Rows | Wgrad, m: int, outputs: int, inputs: int, device: torch.device, size: Size = ()) -> float:
    """The density, 0 to 1, above which the framework's dense product is faster than the kernel.

    1 where nothing was timed. For contiguous tensors. Raises KernelBuildError when no candidate runs.
    """
    aligned = not size and all(width * kernel.dtype.itemsize % 16 == 0 for width in (outputs, inputs))
    return _choice(_case(kernel, m, outputs, inputs, aligned, device, size)).crossover


def decide(tiles: Sequence[Tile], clock: Clock) -> Choice:
    """The fastest of `tiles` by `clock`; one that does not compile or run is passed over.

    Raises KernelBuildError when none does.
    """
    seconds: dict[Tile, float] = {}
    for tile in tiles:
        try:
            seconds[tile] = clock(tile, _DENSITY)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.warning("tile %s does not run: %s", tile.name, error)
    if not seconds:
        raise KernelBuildError(
            "no tile of a Triton kernel runs",
            f"tried {', '.join(tile.name for tile in tiles) or 'none'}",
            "Log at level WARNING says why each failed",
        )
    best = min(seconds, key=lambda tile: seconds[tile])
    return Choice(best, _crossover(clock(best, _LOW), clock(best, _HIGH), clock(None, 1.0)))


def _crossover(low: float, high: float, dense: float) -> float:
    """Where the line through our two times meets the dense one's."""
    slope = (high - low) / (_HIGH - _LOW)
    if slope <= 0:
        return 1.0 if high <= dense else 0.0
    return min(max(_LOW + (dense - low) / slope, 0.0), 1.0)


@functools.cache
def _case(
    kernel: Rows | Wgrad, m: int, outputs: int, inputs: int, aligned: bool, device: torch.device, size: Size = ()
) -> Case:
    """One case for all that a tile does not depend on."""
    if isinstance(kernel, Rows):
        kernel = dataclasses.replace(kernel, activation="none", bias=False)
    return Case(kernel, _power_of_2(m), outputs, inputs, aligned, device, tuple(map(_power_of_2, size)))


def _power_of_2(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


_known: dict[Case, Choice] = {}


def _choice(case: Case) -> Choice:
    known = _known.get(case)
    if known is not None:
        return known
    candidates = case.candidates
    if not candidates:
        raise KernelBuildError(
            f"no tile of {case.kernel.name} fits {triton_device.of(case.device).name}",
            "it has too little shared memory",
            "Choose smaller blocks",
        )
    if not _may_time(case):
        return Choice(candidates[0], 1.0)
    choice = _read(case, candidates)
    if choice is None:
        try:
            choice = decide(candidates, _device_clock(case))
        except torch.OutOfMemoryError:
            log.warning("%s: too little memory to tune in; the best guess serves", case.name)
            _known[case] = Choice(candidates[0], 1.0)
            return _known[case]
        _write(case, choice)
        log.info("%s: tile %s, dense above density %.2f", case.name, choice.tile.name, choice.crossover)
    _known[case] = choice
    return choice


def _may_time(case: Case) -> bool:
    if case.device.type != "cuda" or os.environ.get("CTRLCOMPILE_TUNE") == "0":
        return False
    small = 2 * case.m * case.outputs * case.inputs * math.prod(case.kernel.taps) < _WORTH_TUNING
    return not small and not torch.cuda.is_current_stream_capturing()


def _device_clock(case: Case) -> Clock:
    return triton_clock.clock_on(case.device, case.kernel, case.m, case.outputs, case.inputs, case.size)


def _path(case: Case) -> str:
    return f"tuned_{case.kernel.name}_{hashlib.sha256(case.name.encode()).hexdigest()[:16]}.json"


def _read(case: Case, candidates: Sequence[Tile]) -> Choice | None:
    try:
        found = json.loads((build.cache_folder() / _path(case)).read_text())
        crossover = float(found["crossover"])
        for tile in candidates:
            if found["case"] == case.name and found["tile"] == dataclasses.asdict(tile) and 0 <= crossover <= 1:
                return Choice(tile, crossover)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(case: Case, choice: Choice) -> None:
    content = {"case": case.name, "tile": dataclasses.asdict(choice.tile), "crossover": choice.crossover}
    try:
        triton_build.write(build.cache_folder() / _path(case), json.dumps(content, indent=1) + "\n")
    except OSError as error:
        log.warning("%s: the tuned tile could not be kept: %s", case.name, error)
