"""The text of the Triton kernels whose output rows run over a list of blocks: what they do is said in `triton_rows`."""

import math
import re
import textwrap
from collections.abc import Sequence

import torch

from .triton_rows import DTYPES, Rows, RowsTile


def parameters(kernel: Rows, tile: RowsTile) -> list[str]:
    """Names of what the kernel takes, in order; a tile with descriptors takes those of `x` and `weight`."""
    given = [
        "x",
        "weight",
        *["bias"] * kernel.bias,
        "offsets",
        "indices",
        "order",
        "y",
        *["z"] * kernel.has_z,
    ]
    given += kernel.walk.parameters if kernel.walk else ["m"]
    return given + ["outputs", "inputs"] + ["x_stride", "weight_stride"] * (not tile.descriptors)


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
        "TAPS": (math.prod(kernel.taps), "of the window"),
        "SCAN": (128, "entries of a list that are looked at together"),
    }
    packed = tile.step > chunk
    bases, loads = ("", _descriptor_loads(kernel)) if tile.descriptors else _pointer_loads(kernel, packed)
    per_block = f"({kernel.walk.count} * PARTS)" if kernel.walk else "PARTS"
    first, following, stride = _PACKED if packed else _SINGLE
    body = f"""{_BLOCKS_BEFORE * _shares_lists(kernel)}

{decorator(kernel.walk.parameters if kernel.walk else ["m"])}
def rows_product(
{textwrap.fill(", ".join(parameters(kernel, tile)), 112, initial_indent="    ", subsequent_indent="    ")}
):
{_lines(_tile_and_list(kernel, per_block))}{bases}{first.replace("$PER_BLOCK", per_block)}
    acc = tl.full(({"COLUMNS, ROWS" if tile.swap else "ROWS, COLUMNS"}), 0.0, tl.float32)
    for chunk in range(0, chunks{stride}):
{loads}
        acc = {_product(kernel, tile)}
        # The next column, now: the loads of later iterations are then free to start early.
{following.replace("$PER_BLOCK", per_block)}
{_epilogue(kernel, tile)}"""
    named = "".join(
        f"{name} = tl.constexpr({value})  # {what}\n"
        for name, (value, what) in constants.items()
        if re.search(rf"\b{name}\b", body)
    )
    role = "forward" if kernel.transposed else "input gradient"
    what = f"convolution, {role}" if kernel.walk else f"linear, {role}"
    return f'''"""Block-sparse {what}, {DTYPES[kernel.dtype]}, activation {kernel.activation}.

Blocks of {kernel.outputs} x {kernel.inputs} (columns of the output x of the input).
{kernel.walk.description if kernel.walk else ""}\
Made for {tile.warps} warps and {tile.stages} stages. Generated; kept for whoever wants to read it.
"""

import triton
import triton.language as tl

{named}{body}'''


def decorator(varying: Sequence[str]) -> str:
    """Of a kernel that is compiled once for all values of these parameters."""
    names = ", ".join(f'"{name}"' for name in varying)
    line = f"@triton.jit(do_not_specialize=[{names}])"
    if len(line) <= 120:
        return line
    names = textwrap.fill(names, 112, initial_indent="        ", subsequent_indent="        ")
    return f"@triton.jit(\n    do_not_specialize=[\n{names},\n    ]\n)"


def _shares_lists(kernel: Rows) -> bool:
    """Whether all groups of a convolution have the columns of the weight, and so their lists, in common."""
    return not kernel.transposed and kernel.window.groups > 1


def _tile_and_list(kernel: Rows, per_block: str) -> list[str]:
    """Which rows and columns of the output a program has, and which part of which list is theirs."""
    walk, shares = kernel.walk, _shares_lists(kernel)
    lines = ["# Which tile: groups of row tiles; within a group, output blocks from the longest list to the shortest."]
    if walk:
        lines = [*walk.begin(), *["x_stride = tl.cast(x_stride, tl.int64)"] * kernel.wide, *lines]
    lines += ["program = tl.program_id(0)", "blocks = (outputs + BLOCK_OUT - 1) // BLOCK_OUT" + " * groups" * shares]
    if walk and walk.phased:
        lines += ["if program >= blocks * ((m + ROWS - 1) // ROWS):", "    return"]
    lines += [
        "first_tile = program // (GROUP * blocks) * GROUP",
        "size = tl.minimum((m + ROWS - 1) // ROWS - first_tile, GROUP)",
        "place = program % (GROUP * blocks)",
    ]
    if shares:
        lines += ["r = tl.load(order + place // size // groups)", "group = place // size % groups"]
    else:
        lines += ["r = tl.load(order + place // size)"]
    lines += [
        "row = (first_tile + place % size) * ROWS",
        "rows = tl.arange(0, ROWS)",
        "columns = r * BLOCK_OUT + tl.arange(0, COLUMNS)",
        "start = tl.load(offsets + r)",
    ]
    if shares:
        lines += [
            "length = tl.load(offsets + r + 1) - start",
            "indices += start",
            "# Of the list, the group's part.",
            "start = blocks_before(indices, length, group * (inputs // BLOCK_IN // groups))",
            "end = blocks_before(indices, length, (group + 1) * (inputs // BLOCK_IN // groups))",
            f"chunks = (end - start) * {per_block}",
        ]
    else:
        lines += [f"chunks = (tl.load(offsets + r + 1) - start) * {per_block}"]
    lines += ["indices += start"]
    if kernel.transposed and kernel.window.groups > 1:
        lines += ["x += r // (blocks // groups) * inputs"]
    return lines + (walk.divisors() if walk else [])


_BLOCKS_BEFORE = """

@triton.jit
def blocks_before(indices, length, block):
    # How many of a list's blocks come before this one.
    count = 0
    lane = tl.arange(0, SCAN)
    for at in range(0, length, SCAN):
        listed = tl.load(indices + at + lane, mask=at + lane < length, other=2**30)
        count += tl.sum((listed < block).to(tl.int32), 0)
    return count
"""

_SINGLE = (
    "    column = tl.load(indices, mask=chunks > 0, other=0) * BLOCK_IN",
    """\
        following = chunk + 1
        column = tl.load(indices + following // $PER_BLOCK, mask=following < chunks, other=0) * BLOCK_IN
        column += following % PARTS * CHUNK""",
    "",
)

# Several blocks in one iteration: the columns of each lane, or `inputs` and beyond where the list has ended.
_PACKED = (
    """\
    lane = tl.arange(0, STEP)
    mine = lane // CHUNK
    column = tl.load(indices + mine // $PER_BLOCK, mask=mine < chunks, other=inputs) * BLOCK_IN
    column += mine % PARTS * CHUNK + lane % CHUNK""",
    """\
        following = chunk + STEP // CHUNK + mine
        column = tl.load(indices + following // $PER_BLOCK, mask=following < chunks, other=inputs) * BLOCK_IN
        column += following % PARTS * CHUNK + lane % CHUNK""",
    ", STEP // CHUNK",
)


def _descriptor_loads(kernel: Rows) -> str:
    place = "r * BLOCK_OUT, column" if kernel.transposed else "column, r * BLOCK_OUT"
    return f"        x_part = x.load([row, column])\n        w_part = weight.load([{place}])"


def _pointer_loads(kernel: Rows, packed: bool) -> tuple[str, str]:
    """What is computed before the loop, and the loads in it. Offsets inside a tile fit 32 bits, those of tiles may not.

    Rows past the end read the last one, since what they add is not stored. Columns past the end of the input are masked
    in both operands: they would be summed. Of a convolution, so are taps past its edges, in one of them.
    """
    walk = kernel.walk
    if walk:
        before = walk.starts()
        loop = walk.tap("(chunk + mine) // PARTS" if packed else "chunk // PARTS")
        loop += walk.seen(packed)
        x_mask = [f"({walk.mask})" + "[:, None]" * (not packed)] * bool(walk.mask)
    else:
        before = ["x += row.to(tl.int64) * x_stride", "x_rows = tl.minimum(rows, m - 1 - row) * x_stride"]
        loop, x_mask = [], []
    w_mask = []
    if packed or kernel.partial:
        loop += [f"near = {'column' if packed else 'column + lane'} < inputs"]
        x_mask += ["near[None, :]"]
        w_mask += ["near[None, :]" if kernel.transposed else "near[:, None]"]
    if not packed:
        before += ["lane = tl.arange(0, CHUNK)", "x_tile = x_rows[:, None] + lane[None, :]"]
    if kernel.transposed:
        before += [
            "weight += (r * BLOCK_OUT).to(tl.int64) * weight_stride",
            "w_rows = tl.minimum(tl.arange(0, COLUMNS), outputs - 1 - r * BLOCK_OUT) * weight_stride",
        ]
    else:
        w_mask.append("(columns < outputs)[None, :]")
    # Where in a row of x and of the weight the columns are that an iteration takes.
    x_column = "move * x_stride + column" if walk else "column"
    w_column = "tap * inputs + column" if walk and kernel.transposed else "column"
    w_place = " + tap * outputs" if walk and not kernel.transposed else ""
    if packed:
        x = f"x + (x_rows[:, None] + {_vector(x_column)})"
        if kernel.transposed:
            weight = f"weight + (w_rows[:, None] + {_vector(w_column)})"
        else:
            loop.append(f"w_rows = column.to(tl.int64) * weight_stride{w_place}")
            weight = "weight + (w_rows[:, None] + columns[None, :])"
    else:
        x = f"x + {_scalar(x_column)} + x_tile"
        if kernel.transposed:
            before.append("w_tile = w_rows[:, None] + lane[None, :]")
            weight = f"weight + {_scalar(w_column)} + w_tile"
        else:
            before.append("w_tile = (lane * weight_stride)[:, None] + columns[None, :]")
            weight = f"weight + column.to(tl.int64) * weight_stride{w_place} + w_tile"
    loop += [f"{name}_mask = {' & '.join(mask)}" for name, mask in (("x", x_mask), ("w", w_mask)) if mask]
    loop.append(f"x_part = tl.load({x}{', mask=x_mask, other=0.0' if x_mask else ''})")
    loop.append(f"w_part = tl.load({weight}{', mask=w_mask, other=0.0' if w_mask else ''})")
    return _lines(before), "\n".join(f"        {line}" for line in loop)


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _scalar(sum_: str) -> str:
    return f"({sum_})" if " " in sum_ else sum_


def _vector(sum_: str) -> str:
    return f"{_scalar(sum_)}[None, :]"


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
    return _lines(lines + _store(kernel, tile))


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
        *_entries(kernel),
    ]
    if kernel.takes_z:
        lines += ["z_part = tl.load(z + base + entries, mask=inside).to(tl.float32)"]
    if kernel.keeps_z:
        lines += ["tl.store(z + base + entries, acc.to(z.dtype.element_ty), mask=inside)"]
    lines += _ACTIVATIONS[kernel.activation]
    return [*lines, "tl.store(y + base + entries, acc.to(y.dtype.element_ty), mask=inside)"]


def _entries(kernel: Rows) -> list[str]:
    """Where in y the tile's entries go."""
    walk, shares = kernel.walk, _shares_lists(kernel)
    stride = "outputs * groups" if shares else "outputs"
    if walk and walk.phased:
        stride = f"tl.cast({stride}, tl.int64)" if kernel.wide else _scalar(stride)
        places = [*walk.places(), f"entries = (place * {stride})[:, None] + columns[None, :]"]
        return [*places, f"base = {'group * outputs' if shares else 0}"]
    base = f"base = row.to(tl.int64) * {_scalar(stride)}" + " + group * outputs" * shares
    return [f"entries = rows[:, None] * {_scalar(stride)} + columns[None, :]", base]


_ACTIVATIONS = {
    "none": [],
    "relu": ["acc = tl.where(acc < 0, 0.0, acc)"],
    "gelu": ["acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))"],
    # 0.5 z (1 + tanh u) with u = sqrt(2 / pi) (z + 0.044715 z^3), as z / (1 + exp(-2 u)), which loses no digits.
    "gelu_tanh": ["acc = acc / (1 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))"],
    # cdf(z) + z pdf(z) of the normal distribution.
    "gelu_backward": [
        "cdf = 0.5 * (1 + tl.erf(z_part * 0.7071067811865476))",
        "acc *= cdf + z_part * 0.3989422804014327 * tl.exp(-0.5 * z_part * z_part)",
    ],
    # s + z s (1 - s) 2 du/dz with s = (1 + tanh u) / 2. Beyond 8 there is only 0 or 1, but powers may be infinite.
    "gelu_tanh_backward": [
        "near = tl.where(z_part > 8, 8.0, tl.where(z_part < -8, -8.0, z_part))",  # a NaN stays one
        "e = tl.exp(-near * (1.5957691216057308 + 0.0713548162726 * near * near))",
        "s = 1 / (1 + e)",
        "acc *= s + near * (1.5957691216057308 + 0.2140644488178 * near * near) * (e * s) * s",
    ],
}
