"""The instruction sets that a kernel can be generated for, and how each fills its registers.

All are generated from one text with vector types of the compiler (`__attribute__((vector_size))`); an instruction set
only says how wide a vector is, how many registers there are, and what the compiler is told.
"""

import functools
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, eq=False)  # a key of caches that are read at each call
class Isa:
    """`lanes` float32 values a vector, `registers` vectors, `flags` for the compiler.

    `pairs`: bfloat16 is multiplied as it is, two products being added to a float32 sum by one instruction.
    """

    name: str
    lanes: int
    registers: int
    flags: tuple[str, ...]
    pairs: bool = False


AVX512 = Isa("avx512", 16, 32, ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"))
AVX512_BF16 = Isa("avx512_bf16", 16, 32, (*AVX512.flags, "-mavx512bf16"), pairs=True)
AVX2 = Isa("avx2", 8, 16, ("-mavx2", "-mfma"))
PORTABLE = Isa("portable", 4, 16, ())
ALL = {isa.name: isa for isa in (AVX512_BF16, AVX512, AVX2, PORTABLE)}


def current(dtype: torch.dtype = torch.float32) -> Isa:
    """The best one of this CPU, as torch sees it, for inputs of this type, or the one that `CTRLCOMPILE_ISA` names.

    AVX512_BF16 is that for bfloat16 alone: others get AVX512 in its place, which older compilers know, too. Raises
    ValueError when the variable names none.
    """
    named = _named(os.environ.get("CTRLCOMPILE_ISA"))
    return AVX512 if named is AVX512_BF16 and dtype != torch.bfloat16 else named


@functools.cache
def _named(name: str | None) -> Isa:
    if not name:
        widest = AVX512_BF16 if torch.cpu._is_avx512_bf16_supported() else AVX512
        return {"AVX512": widest, "AVX2": AVX2}.get(torch.backends.cpu.get_cpu_capability(), PORTABLE)
    if name not in ALL:
        raise ValueError(f"CTRLCOMPILE_ISA={name!r} is no instruction set; allowed are {', '.join(ALL)}")
    return ALL[name]


def has_amx() -> bool:
    """Whether the CPU has a matrix unit for bfloat16, which dense products use and the kernels here do not."""
    return bool(torch.cpu._is_amx_tile_supported())


class Panel(NamedTuple):
    """A strip of a block's columns whose sums stay in registers: `rows` x (`vectors` * `lanes`) of them at a time."""

    first: int  # column of the block that it starts at
    lanes: int
    vectors: int
    rows: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.vectors * self.lanes


def panels(width: int, isa: Isa) -> list[Panel]:
    """Covers `width` columns, a multiple of 8, with strips that keep the multiply-add units busy.

    The sums of a strip have to hide the latency of a multiply-add (8 of them or more do), and a step needs a load for
    each vector and a broadcast load for each row, which share two load ports: both want strips as large as the
    registers allow.
    """
    units, half = divmod(width, isa.lanes)
    strips: list[Panel] = []
    if units:
        count = -(-units // 4) if isa.registers == 32 else max(1, units // 2)
        first = 0
        for i in range(count):
            vectors = units // count + (i < units % count)
            strips.append(Panel(first, isa.lanes, vectors, _ROWS[isa.registers][vectors]))
            first += vectors * isa.lanes
    if half:
        strips.append(Panel(width - half, half, 1, _ROWS[isa.registers][1]))
    return strips


# registers -> vectors -> rows; no more than 11, since each row also keeps a pointer to its input in a register
_ROWS = {16: {1: 11, 2: 6, 3: 4}, 32: {1: 11, 2: 11, 3: 8, 4: 6}}
