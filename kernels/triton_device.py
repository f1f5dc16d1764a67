"""What a Triton kernel's tile must fit: the limits and rates of one GPU.

Rates are rounded figures of the best part of each generation. They only rank tiles before the tuner times them, so
their ratios matter and their last digits do not.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch


@dataclass(frozen=True)
class Device:
    """One GPU, or one made up for a test: sizes in bytes, registers of 32 bits, rates of the whole device."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # of one thread block
    registers: int = 65536  # of one multiprocessor
    half_flops: float = 800e12  # dense products of half types, as matrix libraries reach them
    second_level: float = 5.5e12  # bytes read from the second-level cache

    @property
    def warp_group_products(self) -> bool:
        """Whether four warps together feed the tensor cores from shared memory (`wgmma`, `tcgen05`)."""
        return self.capability >= (9, 0) and self.capability[0] in (9, 10)

    @property
    def descriptors(self) -> bool:
        """Whether tiles can be loaded through tensor descriptors (TMA)."""
        return self.capability >= (9, 0)


A100 = Device("NVIDIA A100", (8, 0), 108, 163 << 10, half_flops=270e12, second_level=4.0e12)
H100 = Device("NVIDIA H100", (9, 0), 132, 227 << 10)
B200 = Device("NVIDIA B200", (10, 0), 148, 227 << 10, half_flops=1600e12, second_level=9.0e12)


@functools.cache
def of(device: torch.device) -> Device:
    """The GPU behind `device`; the CPU, where Triton's interpreter runs, counts as an H100."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    base = B200 if capability >= (10, 0) else H100 if capability >= (9, 0) else A100
    share = found.multi_processor_count / base.multiprocessors
    shared = getattr(found, "shared_memory_per_block_optin", base.shared_memory if capability[1] == 0 else 99 << 10)
    return Device(
        found.name,
        capability,
        found.multi_processor_count,
        shared,
        getattr(found, "regs_per_multiprocessor", 65536),
        base.half_flops * share,
        base.second_level * share,
    )


class Tile(Protocol):
    """A tile of any kernel family."""

    @property
    def descriptors(self) -> bool: ...


AnyTile = TypeVar("AnyTile", bound=Tile)


def shortlist(ranked: Sequence[AnyTile], descriptors: bool) -> list[AnyTile]:
    """The best six of `ranked`, best first; where tensor descriptors can be used, three with them and three without."""
    pointers = [tile for tile in ranked if not tile.descriptors]
    if not descriptors or len(pointers) == len(ranked):
        return pointers[:6]
    best = [tile for tile in ranked if tile.descriptors][:3] + pointers[:3]
    return sorted(best, key=ranked.index)
