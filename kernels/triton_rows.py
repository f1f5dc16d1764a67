"""Triton for the products whose output rows run over a list of blocks: the forward pass and the input gradient.

Both compute `y[:, block o] = sum over listed i of x[:, block i] @ w[o, i]`, as the C++ beside this does. One program
has a tile of `rows` rows of x by one output block, and sums over the block's whole list in registers.

- The column at which the next listed block begins is carried through the loop. Triton's pipeliner then runs the loads
  `stages - 1` iterations ahead; an index that is loaded where it is used would halve that, and one that is carried over
  two iterations would turn it off.
- Blocks narrower than `step` are gathered, several of one list in an iteration; wider ones are taken in parts.
- Programs start with the longest list, in groups of row tiles whose rows of x stay in the second-level cache. The last
  ones to start have little to do, so that rows of unequal length leave no multiprocessor waiting; a persistent loop
  would have to guess that balance.
- Of a convolution a list is walked once per tap, with rows of x that begin elsewhere: `triton_window`.
- With `swap`, blocks of 64 outputs are the tensor core's rows and rows of x its columns, of which it takes up to 256 at
  once: a fuller instruction, and for few rows of x a fitting one.
"""

import math
from dataclasses import dataclass, replace

import torch

from .reference import BACKWARD, DIFFERENTIATED
from .triton_device import Device, shortlist
from .triton_window import STILL, Walk
from .window import Window

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_SIZES = [(16, 4), (32, 4), (64, 4), (128, 4), (128, 8), (256, 4), (256, 8)]  # rows of x, warps
_EXPECTED_DENSITY = 0.4  # for the model that ranks tiles


@dataclass(frozen=True)
class Rows:
    """What one kernel computes; everything that its text depends on but the tile."""

    outputs: int  # side of a block along the output's columns
    inputs: int  # side of a block along the input's columns
    transposed: bool  # the weight is stored with outputs as rows (forward), else as columns (input gradient)
    dtype: torch.dtype
    activation: str = "none"
    bias: bool = False
    partial: bool = False  # the last input block is cut off by the weight's edge
    precision: str = "ieee"  # of products of float32: ieee or tf32
    taps: tuple[int, ...] = ()  # of a convolution, for each spatial dimension
    window: Window = STILL
    wide: bool = False  # places in x or y do not fit 32 bits: of a convolution, whose tiles have no base

    @property
    def columns(self) -> int:
        """Columns of a tile: the block's outputs, filled up to a power of 2."""
        return 1 << (self.outputs - 1).bit_length()

    @property
    def part(self) -> int:
        """The largest power of 2 that divides a block's inputs: lists are walked in parts of this width."""
        return self.inputs & -self.inputs

    @property
    def keeps_z(self) -> bool:
        """Whether z is stored beside y: for the activations whose derivative is not known from y."""
        return self.activation in DIFFERENTIATED

    @property
    def has_z(self) -> bool:
        """Whether it is given a z, to write or to read."""
        return self.keeps_z or self.takes_z

    @property
    def takes_z(self) -> bool:
        """Whether sums are multiplied by the slope of another layer's activation at its z."""
        return self.activation.endswith(BACKWARD)

    @property
    def walk(self) -> Walk | None:
        """How a convolution's taps are walked."""
        return Walk(self.taps, self.window, self.transposed) if self.taps else None

    def summed(self, inputs: int) -> float:
        """How many products an entry of the output is the sum of, for x with so many columns and a dense weight."""
        phases = self.walk.phases if self.walk else 1
        return inputs * math.prod(self.taps) / self.window.groups / phases

    @property
    def name(self) -> str:
        """Begins the file name."""
        kind = self.walk.name if self.walk else "linear"
        role = f"forward_{self.activation}" if self.transposed else "dgrad"
        role += f"_{self.activation}" * self.takes_z
        types = DTYPES[self.dtype] + ("_tf32" if self.precision == "tf32" else "")
        side = (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)
        return f"{kind}_{role}_{side[0]}x{side[1]}_{types}"


@dataclass(frozen=True)
class RowsTile:
    """How one program computes its part of the output."""

    rows: int  # of x
    step: int  # columns of x in one iteration
    warps: int
    stages: int
    swap: bool = False
    descriptors: bool = False
    group: int = 8  # row tiles that share the second-level cache

    @property
    def name(self) -> str:
        kind = ("s" if self.swap else "") + ("d" if self.descriptors else "")
        return f"{self.rows}x{self.step}{kind}_{self.warps}w{self.stages}"


def candidates(
    kernel: Rows, m: int, outputs: int, inputs: int, device: Device, descriptors: bool = False
) -> list[RowsTile]:
    """Tiles that fit the device, best guess first, at most six, for x `[m, inputs]` and an output `[m, outputs]`.

    `descriptors`: whether base addresses and row strides of x and weight are multiples of 16 bytes. Both ways of
    loading then stay in the race: which one wins is for a clock to say.
    """
    fitting = [tile for tile in _tiles(kernel, device) if fits(kernel, tile, device)]
    fitting.sort(key=lambda tile: _seconds(kernel, tile, m, outputs, inputs, device))
    return shortlist(fitting, descriptors)


def fits(kernel: Rows, tile: RowsTile, device: Device) -> bool:
    """Whether the device holds the tile: its buffers in shared memory and its sums in registers."""
    # Hopper's products add to registers and need few others; sums in tensor memory come to registers all at once.
    most = 128 if device.capability[0] == 9 and kernel.dtype != torch.float32 else 64
    sums = tile.rows * kernel.columns / (32 * tile.warps)  # registers of a thread
    return sums <= most and _resident(kernel, tile, device) > 0


def shared_bytes(kernel: Rows, tile: RowsTile) -> int:
    """Upper bound of the shared memory that a program takes."""
    size = kernel.dtype.itemsize
    buffers = tile.stages * (tile.rows + kernel.columns) * tile.step * size
    return max(buffers + tile.step * 4 + 64 * tile.stages, tile.rows * (kernel.columns + 8) * 4)


def _tiles(kernel: Rows, device: Device) -> list[RowsTile]:
    """Every tile worth a thought for the block and the type, whether it fits or not."""
    if kernel.dtype == torch.float32:
        step, sizes = (16, _SIZES[:4]) if kernel.precision == "ieee" else (32, _SIZES)
        return [RowsTile(rows, step, warps, 3) for rows, warps in sizes]
    steps = [(64, False)] if kernel.part >= 64 else [(64, False), (128, False)]
    if device.descriptors and kernel.part >= 32 and not kernel.walk:
        steps.insert(0, (min(kernel.part, 64), True))
    tiles = []
    for rows, warps in _SIZES:
        for step, descriptors in steps:
            for swap in _ways_round(kernel, rows, device):
                tile = RowsTile(rows, step, warps, 4 if device.warp_group_products else 3, swap, descriptors)
                tiles.append(tile)
                shallow = replace(tile, stages=tile.stages - 1)
                if tile.stages > 3 and _resident(kernel, shallow, device) > _resident(kernel, tile, device):
                    tiles.append(shallow)
    return tiles


def _ways_round(kernel: Rows, rows: int, device: Device) -> list[bool]:
    """Values of `swap`: the tensor cores of a warp group take 64 rows or none."""
    if not device.warp_group_products or kernel.columns < 64:
        return [False]
    if rows < 64:
        return [True]
    return [True, False] if kernel.columns == 64 and rows > 64 else [False]


def _resident(kernel: Rows, tile: RowsTile, device: Device) -> int:
    """Programs that one multiprocessor holds at a time; 0 where not even one fits."""
    registers = 50 + tile.rows * kernel.columns // (32 * tile.warps)
    by_memory = (device.shared_memory + 1024) // (shared_bytes(kernel, tile) + 1024)
    return min(by_memory, device.registers // (32 * tile.warps * min(registers, 255)), 8)


def _seconds(kernel: Rows, tile: RowsTile, m: int, outputs: int, inputs: int, device: Device) -> float:
    """What the tile would take if nothing but products, the second-level cache and waiting cost anything."""
    programs = -(-outputs // kernel.outputs) * -(-m // tile.rows)
    active = min(_resident(kernel, tile, device), -(-programs // device.multiprocessors))
    side, across = (kernel.columns, tile.rows) if tile.swap else (tile.rows, kernel.columns)
    if device.warp_group_products:
        # Cycles for 64 rows x `across` x 16: of the tensor cores `across / 2`, of shared memory 16 + `across` / 4.
        waste = max(1, 64 / side) * max(1, (16 + min(across, 256) / 4) / (min(across, 256) / 2))
    else:
        waste = max(1, 32 / side) * max(1, 64 / across)
    rate = device.half_flops * (1 if kernel.dtype != torch.float32 else 0.4 if kernel.precision == "tf32" else 0.06)
    products = 2 * tile.rows * kernel.columns * tile.step * waste * device.multiprocessors / rate
    loaded = (tile.rows + kernel.columns) * tile.step * kernel.dtype.itemsize
    loads = loaded * device.multiprocessors / device.second_level
    step = max(active * products, active * loads, products + (0.10e-6 if tile.descriptors else 0.13e-6))
    waves = programs / (device.multiprocessors * active)
    # Programs are short and many, so that the last wave is seldom a whole one: half of its rounding up.
    rounds = max(1.0, (waves + math.ceil(waves)) / 2)
    return rounds * (step * _EXPECTED_DENSITY * kernel.summed(inputs) / tile.step + 3e-6)
