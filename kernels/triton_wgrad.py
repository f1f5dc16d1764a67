"""Triton for the weight gradient of active blocks, `g[r, c] = grad_z[:, block r].T @ x[:, block c]`, and what it tells.

A block row's columns are taken in slots: first the listed blocks, then the masked ones; of a convolution, each block
once per tap, which is a product with other rows of x (`triton_window`). One program has `group` consecutive slots.
Listed blocks it multiplies together, so that grad_z's strip is read once for all of them; masked ones it fills with
zeros. So every entry is written once, no memory is cleared beforehand, and at any density the programs share both kinds
of work without a list of masked blocks. Probed blocks have programs of their own.

Where there are too few blocks to fill the device, the rows of x are split among several programs per block, which
leave their sums in scratch memory; a second kernel, `finish`, adds them in a fixed order. Nothing is added atomically:
results repeat to the last bit.
"""

import math
import re
import textwrap
from dataclasses import dataclass, replace

import torch

from .triton_device import Device, shortlist
from .triton_rows import DTYPES
from .triton_rows_text import decorator
from .triton_wgrad_text import (
    ADD_SIGNALS,
    FINISH,
    HELPERS,
    SIGNALS_OF_BLOCK,
    SIGNALS_OF_GROUP,
    SPLIT,
    STORE,
    STORE_HELPER,
    STORE_SPLIT,
    WHOLE,
    ZERO,
)
from .triton_window import STILL, Walk
from .window import Window

FINISH_PARAMETERS = (
    "partials", "weight", "offsets", "indices", "probes", "grad_weight", "signals", "outputs", "inputs", "probed",
    "splits", "weight_stride",
)  # fmt: skip
_EXPECTED_DENSITY = 0.4  # for the model that ranks tiles
_SPLITS = (1, 2, 4, 8, 16)
_SPLITS_OF_PIXELS = (*_SPLITS, 32, 64)  # many of them, for few channels


@dataclass(frozen=True)
class Wgrad:
    """What one kernel computes; everything that its text depends on but the tile."""

    outputs: int  # side of a block along the output's columns
    inputs: int  # side of a block along the input's columns
    dtype: torch.dtype
    precision: str = "ieee"  # of products of float32: ieee or tf32
    taps: tuple[int, ...] = ()  # of a convolution, for each spatial dimension
    window: Window = STILL
    wide: bool = False  # places in x do not fit 32 bits: of a convolution, whose tiles have no base

    @property
    def walk(self) -> Walk | None:
        """How a convolution's taps are walked."""
        return Walk(self.taps, self.window) if self.taps else None

    def slots(self, inputs: int) -> int:
        """How many slots a block row has, of a weight with so many input columns."""
        return -(-inputs // self.inputs) * math.prod(self.taps)

    @property
    def name(self) -> str:
        """Begins the file name."""
        types = DTYPES[self.dtype] + ("_tf32" if self.precision == "tf32" else "")
        return f"{self.walk.name if self.walk else 'linear'}_wgrad_{self.outputs}x{self.inputs}_{types}"

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of a block in registers: filled up to powers of 2."""
        return 1 << (self.outputs - 1).bit_length(), 1 << (self.inputs - 1).bit_length()

    @property
    def swapped(self) -> bool:
        """Whether columns of x are the tensor core's rows, of which it takes 64 at a time: there are enough of them."""
        return self.outputs <= 32


@dataclass(frozen=True)
class WgradTile:
    """How one program computes its blocks."""

    rows: int  # of x and grad_z in one iteration
    group: int  # blocks of one row
    warps: int
    stages: int
    descriptors: bool = False
    splits: int = 1  # programs that share the rows of x; more than one: sums go through scratch memory

    @property
    def name(self) -> str:
        """Ends the file name."""
        kind = ("d" if self.descriptors else "") + ("p" if self.splits > 1 else "")
        return f"{self.rows}x{self.group}{kind}_{self.warps}w{self.stages}"


def candidates(
    kernel: Wgrad, m: int, outputs: int, inputs: int, device: Device, descriptors: bool = False
) -> list[WgradTile]:
    """Tiles that fit the device, best guess first, at most six, for grad_z `[m, outputs]` and x `[m, inputs]`.

    `descriptors`: whether base addresses and row strides of x and grad_z are multiples of 16 bytes. Both ways of
    loading then stay in the race: which one wins is for a clock to say.
    """
    fitting = [tile for tile in _tiles(kernel, m, inputs, device) if fits(kernel, tile, device)]
    fitting.sort(key=lambda tile: _seconds(kernel, tile, m, outputs, inputs, device))
    return shortlist(fitting, descriptors)


def fits(kernel: Wgrad, tile: WgradTile, device: Device) -> bool:
    """Whether the device holds the tile: its buffers in shared memory and its sums in registers."""
    out, into = kernel.sides
    if kernel.swapped and not device.warp_group_products and into * tile.group > 32 * tile.warps:
        return False  # columns of x are read into registers besides
    if out * into > _stored_at_once(kernel, tile):  # a block's gradient is, which takes registers besides
        return False
    # Hopper's products add to registers and need few others; sums in tensor memory come to registers all at once.
    most = 128 if device.capability[0] == 9 and kernel.dtype != torch.float32 else 64  # of a thread
    most = min(most * 32 * tile.warps, 2 * _stored_at_once(kernel, tile))
    return out * into * tile.group <= most and _resident(kernel, tile, device) > 0


def _stored_at_once(kernel: Wgrad, tile: WgradTile) -> int:
    """How many sums a program may store in one go; those of a convolution lie apart, and take an address each."""
    return (32 if kernel.walk and tile.splits == 1 else 64) * 32 * tile.warps


def shared_bytes(kernel: Wgrad, tile: WgradTile) -> int:
    """Upper bound of the shared memory that a program takes."""
    out, into = kernel.sides
    buffers = tile.stages * tile.rows * (out + into * tile.group) * kernel.dtype.itemsize
    return max(buffers + 128 * tile.stages, out * (into * tile.group + 8) * 4)


def _tiles(kernel: Wgrad, m: int, inputs: int, device: Device) -> list[WgradTile]:
    """Every tile worth a thought for the block and the type, whether it fits or not."""
    into = kernel.sides[1]
    half = kernel.dtype != torch.float32
    slots = kernel.slots(inputs // kernel.window.groups)
    tiles = []
    for width in (64, 128, 256) if half else (32, 64):
        group = min(max(1, width // into), 1 << (slots - 1).bit_length())
        for warps in (4, 8):
            rows, stages = (64, 4 if device.warp_group_products else 3) if half else (16, 3)
            tile = WgradTile(rows, group, warps, stages)
            # One descriptor loads the columns of one block, and each block has sums of its own.
            with_descriptors = half and device.descriptors and into >= 64 and group <= 4 and not kernel.walk
            for way in (True, False) if with_descriptors else (False,):
                for splits in _SPLITS if not kernel.walk else _SPLITS_OF_PIXELS:
                    # Sums of wide blocks of a convolution are too many to store unless they are split.
                    if splits == 1 or m >= 256 * splits or (kernel.walk and splits == 2):
                        tiles.append(replace(tile, descriptors=way, splits=splits))
    return list(dict.fromkeys(tiles))


def _resident(kernel: Wgrad, tile: WgradTile, device: Device) -> int:
    """Programs that one multiprocessor holds at a time; 0 where not even one fits."""
    out, into = kernel.sides
    registers = min(64 + out * into * tile.group // (32 * tile.warps), 255)
    by_memory = (device.shared_memory + 1024) // (shared_bytes(kernel, tile) + 1024)
    return min(by_memory, device.registers // (32 * tile.warps * registers), 8)


def _seconds(kernel: Wgrad, tile: WgradTile, m: int, outputs: int, inputs: int, device: Device) -> float:
    """What the tile would take if nothing but products, the second-level cache and waiting cost anything."""
    out, into = kernel.sides
    inputs //= kernel.window.groups
    rows, slots = -(-outputs // kernel.outputs), kernel.slots(inputs)
    programs = rows * -(-math.ceil(_EXPECTED_DENSITY * slots) // tile.group) * tile.splits
    active = min(_resident(kernel, tile, device), -(-programs // device.multiprocessors))
    across = into if tile.descriptors else into * tile.group
    side, across = (across, out) if kernel.swapped else (out, across)
    if device.warp_group_products:
        waste = max(1, 64 / side) * max(1, (16 + min(across, 256) / 4) / (min(across, 256) / 2))
    else:
        waste = max(1, 32 / side) * max(1, 64 / across)
    rate = device.half_flops * (1 if kernel.dtype != torch.float32 else 0.4 if kernel.precision == "tf32" else 0.06)
    products = 2 * out * into * tile.group * tile.rows * waste * device.multiprocessors / rate
    loaded = tile.rows * (out + into * tile.group) * kernel.dtype.itemsize
    loads = loaded * device.multiprocessors / device.second_level
    step = max(active * products, active * loads, products + (0.10e-6 if tile.descriptors else 0.13e-6))
    waves = programs / (device.multiprocessors * active)
    steps = -(-m // (tile.rows * tile.splits))
    # Programs are short and many, so that the last wave is seldom a whole one: half of its rounding up.
    rounds = max(1.0, (waves + math.ceil(waves)) / 2)
    entries = outputs * inputs * math.prod(kernel.taps)
    scratch = (tile.splits > 1) * (6e-6 + 2 * 4 * tile.splits * _EXPECTED_DENSITY * entries / 2e12)
    return rounds * (step * steps + 4e-6) + scratch


def parameters(kernel: Wgrad, tile: WgradTile) -> list[str]:
    """Names of what the kernel takes, in order; a tile with descriptors takes those of `grad_z` and `x`."""
    given = ["grad_z", "x", "offsets", "indices", "probes"]
    given += ["partials"] if tile.splits > 1 else ["weight", "grad_weight", "signals"]
    given += kernel.walk.parameters if kernel.walk else ["m"]
    given += ["outputs", "inputs", "probed"] + ["splits"] * (tile.splits > 1)
    given += ["grad_z_stride", "x_stride"] * (not tile.descriptors)
    return given + ["weight_stride"] * (tile.splits == 1)


def source(kernel: Wgrad, tile: WgradTile) -> str:
    """The text of a module with the kernel, `weight_gradient`, and, for split rows, `finish`.

    It runs on `programs` by `splits`, `finish` on one program per block by one per tap.
    """
    out, into = kernel.sides
    constants = {
        "BLOCK_OUT": (kernel.outputs, "output columns of a block"),
        "BLOCK_IN": (kernel.inputs, "input columns of a block"),
        "OUT": (out, "the same, filled up to powers of 2"),
        "IN": (into, "the same, filled up to powers of 2"),
        "GROUP": (tile.group, "blocks of a program"),
        "HALF": (tile.group // 2, "blocks whose gradients are stored together"),
        "ROWS": (tile.rows, "rows of x and grad_z in one iteration"),
        "SCAN": (128, "entries of a list that are looked at together"),
        "TAPS": (math.prod(kernel.taps), "of a convolution's window, each of them a slot; 1 for a linear"),
        "PER_PROBE": (-(-math.prod(kernel.taps) // tile.group), "programs of a probe"),
    }
    split, walk = tile.splits > 1, kernel.walk
    counts = [*(walk.parameters if walk else ["m"]), "probed", *["splits"] * split]
    body = f"""
{decorator(counts)}
def weight_gradient(
{textwrap.fill(", ".join(parameters(kernel, tile)), 112, initial_indent="    ", subsequent_indent="    ")}
):
{_images(kernel)}    # Which slots: those of a probe, or a group of a block row's.
    block_columns = (inputs + BLOCK_IN - 1) // BLOCK_IN
    per_row = (block_columns * TAPS + GROUP - 1) // GROUP
    program = tl.program_id(0)
    kept = program >= probed * PER_PROBE
    is_probe = program < probed * PER_PROBE
    probe = tl.load(probes + program // PER_PROBE, mask=is_probe, other=0)
    if probe < 0:
        return
    r = tl.where(is_probe, probe // block_columns, (program - probed * PER_PROBE) // per_row)
    first = tl.where(is_probe, program % PER_PROBE, (program - probed * PER_PROBE) % per_row) * GROUP
    start = tl.load(offsets + r)
    length = tl.where(is_probe, 0, tl.load(offsets + r + 1) - start)
    indices += start
    output = r * BLOCK_OUT + tl.arange(0, OUT)
    inside = output < tl.minimum(outputs, (r + 1) * BLOCK_OUT)
    output_at = output.to(tl.int64) * inputs * TAPS
{"" if split else ZERO}
    # The products of the listed ones.
    if first >= tl.where(is_probe, 1, length) * TAPS:
        return
    probed_block = tl.where(is_probe, probe % block_columns, block_columns)
{SPLIT if split else WHOLE}"""
    body += _descriptor_sums(kernel, tile) if tile.descriptors else _pointer_sums(kernel, split)
    body += _store_blocks(kernel, tile) if tile.descriptors else _store_group(kernel, tile)
    finish = FINISH.replace("$PARAMETERS", ", ".join(FINISH_PARAMETERS))
    finish = finish.replace("$TAP", "tl.program_id(1)" if walk else "0")
    body = HELPERS + ("" if split else STORE_HELPER) + body + (finish if split else "")
    named = "".join(
        f"{name} = tl.constexpr({value})  # {what}\n"
        for name, (value, what) in constants.items()
        if re.search(rf"\b{name}\b", body)
    )
    return f'''"""Block-sparse {"convolution" if walk else "linear"}, weight gradient, {DTYPES[kernel.dtype]}.

Blocks of {kernel.outputs} x {kernel.inputs} (columns of the output x of the input).
{kernel.walk.description if kernel.walk else ""}\
Made for {tile.warps} warps and {tile.stages} stages. Generated; kept for whoever wants to read it.
"""

import triton
import triton.language as tl

{named}
{body}'''


def programs(kernel: Wgrad, tile: WgradTile, outputs: int, inputs: int, probed: int) -> int:
    """How many programs there are on the first axis, for a weight of so many columns and so many probes."""
    slots = kernel.slots(inputs)
    return probed * -(-math.prod(kernel.taps) // tile.group) + -(-outputs // kernel.outputs) * -(-slots // tile.group)


def _images(kernel: Wgrad) -> str:
    lines = kernel.walk.begin() if kernel.walk else []
    lines += ["x_stride = tl.cast(x_stride, tl.int64)"] * kernel.wide
    return "".join(f"    {line}\n" for line in lines)


def _pointer_sums(kernel: Wgrad, split: bool) -> str:
    """All blocks of the program in one product, their columns gathered."""
    walk = kernel.walk
    lines = ["rows = tl.arange(0, ROWS)", "z_tile = (rows * grad_z_stride)[:, None] + output[None, :]"]
    lines += ["grad_z += row_first.to(tl.int64) * grad_z_stride"] * split
    x_mask = ["left", "near[None, :]"]
    if walk:
        lines += [*walk.tap("slot"), "x_column = move * x_stride + column", *walk.enter("row_first", "ROWS")]
        if kernel.window.groups > 1:
            lines += ["x += r // (outputs // BLOCK_OUT // groups) * inputs"]
        from_, x, following = walk.rows(), "x + (x_rows[:, None] + x_column[None, :])", walk.advance()
        x_mask += [walk.mask] * bool(walk.mask)
        from_ += [*walk.seen(vectors=True), f"x_mask = {' & '.join(x_mask)}"]
        x_mask = ["x_mask"]
    else:
        lines += ["x_tile = (rows * x_stride)[:, None] + column[None, :]"]
        lines += ["x += row_first.to(tl.int64) * x_stride"] * split
        from_, x, following = [], "x + x_tile", ["x += ROWS * x_stride"]
    lines += [f"acc = tl.full(({'GROUP * IN, OUT' if kernel.swapped else 'OUT, GROUP * IN'}), 0.0, tl.float32)"]
    loop = [
        "left = (rows < row_last - row)[:, None]",
        *from_,
        "z_part = tl.load(grad_z + z_tile, mask=left & inside[None, :], other=0.0)",
        f"x_part = tl.load({x}, mask={' & '.join(x_mask)}, other=0.0)",
        f"acc = {_product(kernel, 'acc', 'x_part')}",
        "grad_z += ROWS * grad_z_stride",
        *following,
    ]
    before = "".join(f"    {line}\n" for line in lines)
    inside = "".join(f"        {line}\n" for line in loop)
    return f"{_columns('GROUP', kernel)}{before}    for row in range(row_first, row_last, ROWS):\n{inside}"


def _columns(width: str, kernel: Wgrad) -> str:
    """The columns of x that belong to so many slots from `first` on. Triton cannot know that those of a block are
    neighbours and begin at a multiple."""
    return f"""\
    lane = tl.arange(0, {width} * IN)
    slot = first + lane // IN
    tap = slot % TAPS
    block = block_of(indices, slot // TAPS, length, probed_block, block_columns)
    column = tl.max_contiguous(tl.multiple_of(block * BLOCK_IN + lane % IN, {kernel.inputs & -kernel.inputs}), IN)
    near = (lane % IN < BLOCK_IN) & (column < inputs)
"""


def _descriptor_sums(kernel: Wgrad, tile: WgradTile) -> str:
    """A product for each block of the program."""
    columns = "".join(
        f"    column_{share} = tl.load(indices + first + {share}, mask=first + {share} < length, other=block_columns)"
        " * BLOCK_IN\n"
        for share in range(tile.group)
    )
    shape = "IN, OUT" if kernel.swapped else "OUT, IN"
    sums = "".join(f"    acc_{share} = tl.full(({shape}), 0.0, tl.float32)\n" for share in range(tile.group))
    products = "".join(
        f"        acc_{share} = {_product(kernel, f'acc_{share}', f'x.load([row, column_{share}])')}\n"
        for share in range(tile.group)
    )
    return f"""\
{columns}    column_0 = tl.where(is_probe, probed_block * BLOCK_IN, column_0)
{sums}    for row in range(row_first, row_last, ROWS):
        z_part = grad_z.load([row, r * BLOCK_OUT])
{products}"""


def _store_group(kernel: Wgrad, tile: WgradTile) -> str:
    """Stores and signals of all blocks; of many sums per thread, half by half, which takes half the registers."""
    out, into = kernel.sides
    halves = out * into * tile.group > _stored_at_once(kernel, tile)
    store = STORE_SPLIT if tile.splits > 1 else STORE + SIGNALS_OF_GROUP.replace("GROUP", "HALF" if halves else "GROUP")
    if not halves:
        return "    acc = tl.trans(acc)\n" * kernel.swapped + store
    columns = _columns("HALF", kernel)
    split = "    acc, last = tl.split(tl.permute(tl.reshape(acc, (OUT, 2, HALF * IN)), (0, 2, 1)))\n"
    return f"{split}{columns}{store}    acc = last\n    first += HALF\n{columns}{store}"


def _store_blocks(kernel: Wgrad, tile: WgradTile) -> str:
    """Stores and signals, block by block; of many sums per thread, half by half."""
    out, into = kernel.sides
    halves = out * into > 32 * 32 * tile.warps
    split = tile.splits > 1
    text = ""
    for share in range(tile.group):
        text += f"    acc = tl.trans(acc_{share})\n" if kernel.swapped else f"    acc = acc_{share}\n"
        if halves:
            text += "    acc, last = tl.split(tl.permute(tl.reshape(acc, (OUT, 2, IN // 2)), (0, 2, 1)))\n"
        text += (
            ""
            if split
            else "    product = tl.full((1,), 0.0, tl.float32)\n    square = tl.full((1,), 0.0, tl.float32)\n"
        )
        for half in range(1 + halves):
            lane = ("tl.arange(0, IN // 2)", "IN // 2 + tl.arange(0, IN // 2)")[half] if halves else "tl.arange(0, IN)"
            text += "    acc = last\n" if half else ""
            text += f"    lane = {lane}\n    column = column_{share} + lane\n    tap = 0\n"
            text += "    near = (lane < BLOCK_IN) & (column < inputs)\n"
            text += STORE_SPLIT if split else STORE + ADD_SIGNALS.replace("WIDTH", "IN // 2" if halves else "IN")
        text += "" if split else SIGNALS_OF_BLOCK.format(share)
    return text


def _product(kernel: Wgrad, acc: str, x_part: str) -> str:
    precision = f', input_precision="{kernel.precision}"' if kernel.dtype == torch.float32 else ""
    operands = f"tl.trans({x_part}), z_part" if kernel.swapped else f"tl.trans(z_part), {x_part}"
    return f"tl.dot({operands}, {acc}{precision})"
