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
- With `swap`, blocks of 64 outputs are the tensor core's rows and rows of x its columns, of which it takes up to 256 at
  once: a fuller instruction, and for few rows of x a fitting one.
"""

import math
import re
from dataclasses import dataclass, replace

import torch

from .triton_device import Device, shortlist

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
        return self.activation.startswith("gelu")

    @property
    def name(self) -> str:
        """Begins the file name."""
        role = f"forward_{self.activation}" if self.transposed else "dgrad"
        types = DTYPES[self.dtype] + ("_tf32" if self.precision == "tf32" else "")
        side = (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)
        return f"linear_{role}_{side[0]}x{side[1]}_{types}"


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
    if device.descriptors and kernel.part >= 32:
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
    return rounds * (step * _EXPECTED_DENSITY * inputs / tile.step + 3e-6)


def parameters(kernel: Rows, tile: RowsTile) -> list[str]:
    """Names of what the kernel takes, in order; a tile with descriptors takes those of `x` and `weight`."""
    given = ["x", "weight", *["bias"] * kernel.bias, "offsets", "indices", "order", "y", *["z"] * kernel.keeps_z]
    return given + ["m", "outputs", "inputs"] + ["x_stride", "weight_stride"] * (not tile.descriptors)


def source(kernel: Rows, tile: RowsTile) -> str:
    """The text of a module with the kernel, `rows_product`, which runs on `blocks * ceil(m / rows)` programs.

    Raises ValueError for a tile with descriptors that would have to gather.
    """
    chunk = min(tile.step, kernel.part)
    if tile.descriptors and tile.step > chunk:
        raise ValueError(f"a descriptor loads at most {kernel.part} columns of such a block, not {tile.step}")
    constants = {
        "BLOCK_OUT": (kernel.outputs, "output columns of a block"),
        "BLOCK_IN": (kernel.inputs, "input columns of a block"),
        "ROWS": (tile.rows, "rows of x in a tile"),
        "COLUMNS": (kernel.columns, "output columns in a tile"),
        "STEP": (tile.step, "input columns in one iteration"),
        "CHUNK": (chunk, "input columns that lie side by side"),
        "PARTS": (kernel.inputs // chunk, "chunks in a block"),
        "GROUP": (tile.group, "row tiles that share the second-level cache"),
    }
    bases, loads = ("", _descriptor_loads(kernel)) if tile.descriptors else _pointer_loads(kernel, tile.step > chunk)
    first, following, stride = _PACKED if tile.step > chunk else _SINGLE
    body = f"""

@triton.jit(do_not_specialize=["m"])
def rows_product({", ".join(parameters(kernel, tile))}):
    # Which tile: groups of row tiles; within a group, output blocks from the longest list to the shortest.
    program = tl.program_id(0)
    blocks = (outputs + BLOCK_OUT - 1) // BLOCK_OUT
    first_tile = program // (GROUP * blocks) * GROUP
    size = tl.minimum((m + ROWS - 1) // ROWS - first_tile, GROUP)
    place = program % (GROUP * blocks)
    r = tl.load(order + place // size)
    row = (first_tile + place % size) * ROWS
    rows = tl.arange(0, ROWS)
    columns = r * BLOCK_OUT + tl.arange(0, COLUMNS)
    start = tl.load(offsets + r)
    chunks = (tl.load(offsets + r + 1) - start) * PARTS
    indices += start
{bases}{first}
    acc = tl.full(({"COLUMNS, ROWS" if tile.swap else "ROWS, COLUMNS"}), 0.0, tl.float32)
    for chunk in range(0, chunks{stride}):
{loads}
        acc = {_product(kernel, tile)}
        # The next column, now: the loads of later iterations are then free to start early.
{following}
{_epilogue(kernel, tile)}"""
    named = "".join(
        f"{name} = tl.constexpr({value})  # {what}\n"
        for name, (value, what) in constants.items()
        if re.search(rf"\b{name}\b", body)
    )
    role = "forward" if kernel.transposed else "input gradient"
    return f'''"""Block-sparse linear, {role}, {DTYPES[kernel.dtype]}, activation {kernel.activation}.

Blocks of {kernel.outputs} x {kernel.inputs} (columns of the output x of the input).
Made for {tile.warps} warps and {tile.stages} stages. Generated; kept for whoever wants to read it.
"""

import triton
import triton.language as tl

{named}{body}'''


_SINGLE = (
    "    column = tl.load(indices, mask=chunks > 0, other=0) * BLOCK_IN",
    """\
        following = chunk + 1
        column = tl.load(indices + following // PARTS, mask=following < chunks, other=0) * BLOCK_IN
        column += following % PARTS * CHUNK""",
    "",
)

# Several blocks in one iteration: the columns of each lane, or `inputs` and beyond where the list has ended.
_PACKED = (
    """\
    lane = tl.arange(0, STEP)
    mine = lane // CHUNK
    column = tl.load(indices + mine // PARTS, mask=mine < chunks, other=inputs) * BLOCK_IN
    column += mine % PARTS * CHUNK + lane % CHUNK""",
    """\
        following = chunk + STEP // CHUNK + mine
        column = tl.load(indices + following // PARTS, mask=following < chunks, other=inputs) * BLOCK_IN
        column += following % PARTS * CHUNK + lane % CHUNK""",
    ", STEP // CHUNK",
)


def _descriptor_loads(kernel: Rows) -> str:
    place = "r * BLOCK_OUT, column" if kernel.transposed else "column, r * BLOCK_OUT"
    return f"        x_part = x.load([row, column])\n        w_part = weight.load([{place}])"


def _pointer_loads(kernel: Rows, packed: bool) -> tuple[str, str]:
    """What is computed before the loop, and the loads in it. Offsets inside a tile fit 32 bits, those of tiles may not.

    Rows past the end read the last one, since what they add is not stored. Columns past the end of the input are masked
    in both operands: they would be summed.
    """
    before = ["x += row.to(tl.int64) * x_stride", "x_rows = tl.minimum(rows, m - 1 - row) * x_stride"]
    loop = []
    if packed or kernel.partial:
        loop = [f"near = {'column' if packed else 'column + lane'} < inputs"]
    x_mask = ["near[None, :]"] * len(loop)
    w_mask = ["near[None, :]" if kernel.transposed else "near[:, None]"] * len(loop)
    if not packed:
        before += ["lane = tl.arange(0, CHUNK)", "x_tile = x_rows[:, None] + lane[None, :]"]
    if kernel.transposed:
        before += [
            "weight += (r * BLOCK_OUT).to(tl.int64) * weight_stride",
            "w_rows = tl.minimum(tl.arange(0, COLUMNS), outputs - 1 - r * BLOCK_OUT) * weight_stride",
        ]
    else:
        w_mask.append("(columns < outputs)[None, :]")
    if packed:
        x = "x + (x_rows[:, None] + column[None, :])"
        if kernel.transposed:
            weight = "weight + (w_rows[:, None] + column[None, :])"
        else:
            loop.append("w_rows = column.to(tl.int64) * weight_stride")
            weight = "weight + (w_rows[:, None] + columns[None, :])"
    else:
        x = "x + column + x_tile"
        if kernel.transposed:
            before.append("w_tile = w_rows[:, None] + lane[None, :]")
            weight = "weight + column + w_tile"
        else:
            before.append("w_tile = (lane * weight_stride)[:, None] + columns[None, :]")
            weight = "weight + column.to(tl.int64) * weight_stride + w_tile"
    loop += [f"{name}_mask = {' & '.join(mask)}" for name, mask in (("x", x_mask), ("w", w_mask)) if mask]
    loop.append(f"x_part = tl.load({x}{', mask=x_mask, other=0.0' if x_mask else ''})")
    loop.append(f"w_part = tl.load({weight}{', mask=w_mask, other=0.0' if w_mask else ''})")
    return "".join(f"    {line}\n" for line in before), "\n".join(f"        {line}" for line in loop)


def _product(kernel: Rows, tile: RowsTile) -> str:
    precision = f', input_precision="{kernel.precision}"' if kernel.dtype == torch.float32 else ""
    if tile.swap:
        weight = "w_part" if kernel.transposed else "tl.trans(w_part)"
        return f"tl.dot({weight}, tl.trans(x_part), acc{precision})"
    weight = "tl.trans(w_part)" if kernel.transposed else "w_part"
    return f"tl.dot(x_part, {weight}, acc{precision})"


def _epilogue(kernel: Rows, tile: RowsTile) -> str:
    """Bias, activation and stores; of many sums per thread, half by half, which takes half the registers."""
    halves = tile.rows * kernel.columns > 64 * 32 * tile.warps
    lines = []
    if halves:
        shape, half = ("COLUMNS, 2, ROWS // 2", "rows") if tile.swap else ("ROWS, 2, COLUMNS // 2", "columns")
        lines += [f"acc, last = tl.split(tl.permute(tl.reshape(acc, ({shape})), (0, 2, 1)))"]
        lines += [f"{half} = {_HALF[half].format('')}", *_store(kernel, tile)]
        lines += ["acc = last", f"{half} = {_HALF[half].format(half.upper() + ' // 2 + ')}"]
    lines += _store(kernel, tile)
    return "".join(f"    {line}\n" for line in lines)


_HALF = {
    "rows": "{}tl.arange(0, ROWS // 2)",
    "columns": "r * BLOCK_OUT + {}tl.arange(0, COLUMNS // 2)",
}


def _store(kernel: Rows, tile: RowsTile) -> list[str]:
    lines = ["acc = tl.trans(acc)"] * tile.swap
    if kernel.bias:
        lines += ["acc += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]"]
    lines += [
        "inside = (rows < m - row)[:, None] & (columns < tl.minimum(outputs, (r + 1) * BLOCK_OUT))[None, :]",
        "entries = rows[:, None] * outputs + columns[None, :]",
        "base = row.to(tl.int64) * outputs",
    ]
    if kernel.keeps_z:
        lines += ["tl.store(z + base + entries, acc.to(z.dtype.element_ty), mask=inside)"]
    lines += _ACTIVATIONS[kernel.activation]
    return [*lines, "tl.store(y + base + entries, acc.to(y.dtype.element_ty), mask=inside)"]


_ACTIVATIONS = {
    "none": [],
    "relu": ["acc = tl.where(acc < 0, 0.0, acc)"],
    "gelu": ["acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))"],
    # 0.5 z (1 + tanh u) with u = sqrt(2 / pi) (z + 0.044715 z^3), as z / (1 + exp(-2 u)), which loses no digits.
    "gelu_tanh": ["acc = acc / (1 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))"],
}
