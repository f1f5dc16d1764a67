"""What does not depend on the tile in the text of the weight gradient's Triton kernels; `triton_wgrad` joins it."""

HELPERS = """
@triton.jit
def block_of(indices, slot, length, probed_block, block_columns):
    # The listed block of a slot, or the probed one in the first; else `block_columns`, which lies outside.
    block = tl.load(indices + slot, mask=slot < length, other=block_columns)
    return tl.where(slot == 0, tl.minimum(block, probed_block), block)


@triton.jit
def masked_block(indices, length, rank):
    # The masked block with `rank` masked ones before it: before it lie the listed ones with no more than that.
    block = rank
    lane = tl.arange(0, SCAN)
    for at in range(0, length, SCAN):
        place = at + lane
        listed = tl.load(indices + place, mask=place < length, other=2**30)
        block += tl.sum((listed - place <= rank).to(tl.int32), 0)
    return block


@triton.jit
def probes_of(probes, probed, block):
    # How many of the probes are of this block.
    hits = 0
    lane = tl.arange(0, SCAN)
    for at in range(0, probed, SCAN):
        probe = tl.load(probes + at + lane, mask=at + lane < probed, other=-1)
        hits += tl.sum((probe == block).to(tl.int32), 0)
    return hits

"""

ZERO = """
    # Zeros for the masked ones among them.
    blocks = (outputs + BLOCK_OUT - 1) // BLOCK_OUT * block_columns
    last = tl.where(is_probe, 0, tl.minimum(first + GROUP, block_columns * TAPS))
    for slot in range(tl.maximum(first, length * TAPS), last):
        masked = slot - length * TAPS
        block = masked_block(indices, length, masked // TAPS)
        tap = masked % TAPS
        column = block * BLOCK_IN + tl.arange(0, IN)
        mask = inside[:, None] & (column < tl.minimum(inputs, (block + 1) * BLOCK_IN))[None, :]
        zero = tl.full((OUT, IN), 0.0, grad_weight.dtype.element_ty)
        tl.store(grad_weight + (output_at[:, None] + (column * TAPS + tap)[None, :]), zero, mask=mask)
        at = r * block_columns + block
        of_tap = signals + tap * 2 * blocks
        tl.store(of_tap + at, 0.0)
        # The squares of a probed block are its probe's to write.
        tl.store(of_tap + blocks + at, 0.0, mask=probes_of(probes, probed, at) == 0)
"""

WHOLE = """\
    row_first = 0
    row_last = m
"""

SPLIT = """\
    rows_each = (m + ROWS * splits - 1) // (ROWS * splits) * ROWS
    row_first = tl.program_id(1) * rows_each
    row_last = tl.minimum(m, row_first + rows_each)
"""

STORE_SPLIT = """\
    mask = inside[:, None] & near[None, :]
    place = tl.program_id(1).to(tl.int64) * outputs * inputs * TAPS
    tl.store(partials + place + (output_at[:, None] + (tap * inputs + column)[None, :]), acc, mask=mask)
"""

STORE_HELPER = """

@triton.jit
def store(acc, column, near, output, inside, kept, weight, grad_weight, width, weight_stride):
    # Stores the gradient's columns, and returns the sums of each one's products with the weight and of its squares.
    mask = inside[:, None] & near[None, :]
    acc = tl.where(mask, acc, 0.0)
    squares = tl.sum(acc * acc, 0)
    # Of a probe, nothing is kept but the squares.
    mask = mask & kept
    weight_at = output.to(tl.int64) * weight_stride
    w = tl.load(weight + (weight_at[:, None] + column[None, :]), mask=mask, other=0.0)
    products = tl.sum(w.to(tl.float32) * acc, 0)
    output_at = output.to(tl.int64) * width
    tl.store(grad_weight + (output_at[:, None] + column[None, :]), acc.to(grad_weight.dtype.element_ty), mask=mask)
    return products, squares

"""

STORE = """\
    products, squares = store(
        acc, column * TAPS + tap, near, output, inside, kept, weight, grad_weight, inputs * TAPS, weight_stride
    )
"""

SIGNALS_OF_GROUP = """\
    slot = first + tl.arange(0, GROUP)
    block = block_of(indices, slot // TAPS, length, probed_block, block_columns)
    at = slot % TAPS * 2 * blocks + r * block_columns + block
    listed = block < block_columns
    tl.store(signals + at, tl.sum(tl.reshape(products, (GROUP, IN)), 1), mask=listed & kept)
    tl.store(signals + blocks + at, tl.sum(tl.reshape(squares, (GROUP, IN)), 1), mask=listed)
"""

ADD_SIGNALS = """\
    product += tl.sum(tl.reshape(products, (1, WIDTH)), 1)
    square += tl.sum(tl.reshape(squares, (1, WIDTH)), 1)
"""

SIGNALS_OF_BLOCK = """\
    at = r * block_columns + column_{0} // BLOCK_IN + tl.arange(0, 1)
    tl.store(signals + at, product, mask=(column_{0} < inputs) & kept)
    tl.store(signals + blocks + at, square, mask=column_{0} < inputs)
"""

FINISH = """

@triton.jit(do_not_specialize=["probed", "splits"])
def finish(
    $PARAMETERS
):
    # One tap of one block of a row: adds what the splits left, rounds it once, and tells what it was.
    block_columns = (inputs + BLOCK_IN - 1) // BLOCK_IN
    blocks = (outputs + BLOCK_OUT - 1) // BLOCK_OUT * block_columns
    r = tl.program_id(0) // block_columns
    slot = tl.program_id(0) % block_columns
    tap = $TAP
    start = tl.load(offsets + r)
    length = tl.load(offsets + r + 1) - start
    active = slot < length
    block = tl.load(indices + start + slot, mask=active, other=0)
    if slot >= length:
        block = masked_block(indices + start, length, slot - length)
    at = r * block_columns + block
    measured = active | (probes_of(probes, probed, at) > 0)
    output = r * BLOCK_OUT + tl.arange(0, OUT)
    column = block * BLOCK_IN + tl.arange(0, IN)
    inside = output < tl.minimum(outputs, (r + 1) * BLOCK_OUT)
    mask = inside[:, None] & (column < tl.minimum(inputs, (block + 1) * BLOCK_IN))[None, :]
    output_at = (output.to(tl.int64) * inputs * TAPS)[:, None]
    entries = output_at + (tap * inputs + column)[None, :]
    stride = tl.cast(outputs, tl.int64) * inputs * TAPS
    acc = tl.full((OUT, IN), 0.0, tl.float32)
    for _ in range(0, tl.where(measured, splits, 0)):
        acc += tl.load(partials + entries, mask=mask, other=0.0)
        partials += stride
    weight_at = output.to(tl.int64) * weight_stride
    place = (column * TAPS + tap)[None, :]
    w = tl.load(weight + (weight_at[:, None] + place), mask=mask & active, other=0.0)
    kept = tl.where(active, acc, 0.0)
    tl.store(grad_weight + (output_at + place), kept.to(grad_weight.dtype.element_ty), mask=mask)
    signals += tap * 2 * blocks
    tl.store(signals + at, tl.sum(tl.sum(w.to(tl.float32) * acc, 0), 0))
    tl.store(signals + blocks + at, tl.sum(tl.sum(acc * acc, 0), 0))
"""
