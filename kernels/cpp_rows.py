"""C++ for the products whose output rows run over a list of blocks: the forward pass and the input gradient.

Both compute `y[row, block o] = sum over listed i and taps t of x[pixel(row, t), block i] @ w[o, i, t]`; a linear has
one tap, and its pixels are its rows (`cpp_window`). The forward pass lists the block columns of each block row, the
input gradient the block rows of each block column. The sums of a few rows by a strip of a block's columns stay in
registers over the whole list.

The plan of one call: pack the listed blocks of the weight, in the order in which they will be read; then tiles of rows,
each with inputs small enough for the second-level cache, run over all lists. A thread takes a tile for itself as long
as there are tiles, then helps with what is left of the others, so that neither few rows nor unequal lists leave one
idle.
"""

import torch

from . import cpp_vectors, cpp_window
from .isa import Isa, panels


def source(
    isa: Isa, outputs: int, inputs: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, activation: str
) -> str:
    """C++ for blocks of `outputs` x `inputs` (sides along the output's and the input's columns)."""
    strips = panels(outputs, isa)
    calls = "\n".join(
        f"        strip<v{s.lanes}, {s.vectors}, {s.rows}>(c, r, {s.first}, tile_x, tile);" for s in strips
    )
    packs = "\n".join(
        f"  pack_strip<{s.width}>(c, r, {s.first}, to + (int64_t){s.first} * length * c.taps * IN);" for s in strips
    )
    return (
        f"// Block-sparse rows of outputs: {outputs} x {inputs} blocks (output x input columns), "
        f"{x_dtype} x {weight_dtype}, activation {activation}, {isa.name}.\n"
        "// Generated; kept beside the library for whoever wants to read it.\n"
        + cpp_vectors.prelude(isa)
        + cpp_vectors.activation(activation)
        + cpp_window.GEOMETRY
        + f"""
typedef {cpp_vectors.SCALARS[str(x_dtype)]} x_t;
typedef {cpp_vectors.SCALARS[str(weight_dtype)]} w_t;
constexpr int OUT = {outputs}, IN = {inputs}, GRAIN = {strips[0].rows};
constexpr bool KEEPS_Z = {str(activation.startswith("gelu")).lower()};
"""
        + _BODY.replace("$CALLS", calls).replace("$PACKS", packs)
    )


_BODY = """
struct Call {
  const x_t* x;
  const w_t* weight;
  int64_t w_out, w_in, w_tap;  // strides of the weight along output columns, input columns, taps
  const float* bias;  // up to whole blocks
  const int32_t* offsets;  // the list of output block r is indices[offsets[r] .. offsets[r + 1]]
  const int32_t* indices;
  x_t *y, *z;
  int64_t outputs, inputs, taps;
  const Tap* tap;
  bool one_run;  // inputs and taps of an output column lie side by side
  float* packed;  // the listed blocks, strip by strip, [tap][input][column of the strip]
  int64_t pixel_stride;  // of packed pixels, in floats
};

// ---- packing -------------------------------------------------------------------------------------------------------

// The pixels of a tile as float32, zero up to a whole block, at a stride that spreads them over the cache's sets.
void pack_x(const Call& c, const Tile& tile, float* to) {
  for (int64_t p = 0; p < tile.pixels; ++p, to += c.pixel_stride) {
    int64_t k = 0;
    if (tile.from[p] >= 0) {
      const x_t* from = c.x + tile.from[p];
      for (; k + Narrow::lanes <= c.inputs; k += Narrow::lanes) store<Narrow>(to + k, load<Narrow>(from + k));
      for (; k < c.inputs; ++k) to[k] = to_float(from[k]);
    }
    const int64_t end = (c.inputs + IN - 1) / IN * IN;
    if (k < end) std::memset(to + k, 0, (end - k) * sizeof(float));
  }
}

// Columns [strip, strip + WIDTH) of the blocks of output block r; zero where the weight ends.
template <int WIDTH> void pack_strip(const Call& c, int r, int strip, float* to) {
  const int64_t o = (int64_t)r * OUT + strip;
  for (int j = c.offsets[r]; j < c.offsets[r + 1]; ++j, to += c.taps * WIDTH * IN) {
    const int64_t i = (int64_t)c.indices[j] * IN;
    const w_t* from = c.weight + o * c.w_out + i * c.w_in;
    const bool whole = o + WIDTH <= c.outputs && i + IN <= c.inputs;
    if (whole && c.one_run) {
      const int64_t taps = c.taps;
      for (int b = 0; b < WIDTH; b += Narrow::lanes) {
        int64_t a = 0, t = 0;  // of the next entry of the run
        for (int64_t at = 0; at < taps * IN; at += Narrow::lanes) {
          Narrow::f row[Narrow::lanes];
          load_transposed(from + b * c.w_out + at, c.w_out, row);
          UNROLL for (int l = 0; l < Narrow::lanes; ++l) {
            store<Narrow>(to + (t * IN + a) * WIDTH + b, row[l]);
            if (++t == taps) t = 0, ++a;
          }
        }
      }
    } else if (whole && c.w_out == 1) {
      for (int64_t t = 0; t < c.taps; ++t)
        for (int a = 0; a < IN; ++a)
          for (int b = 0; b < WIDTH; b += Narrow::lanes)
            store<Narrow>(to + (t * IN + a) * WIDTH + b,
                          load<Narrow>(from + c.tap[t].index * c.w_tap + a * c.w_in + b));
    } else {
      const int width = std::min<int64_t>(WIDTH, c.outputs - o), depth = std::min<int64_t>(IN, c.inputs - i);
      if (!whole) std::memset(to, 0, c.taps * WIDTH * IN * sizeof(float));
      for (int a = 0; a < depth; ++a)
        for (int b = 0; b < width; ++b)
          for (int64_t t = 0; t < c.taps; ++t)
            to[(t * IN + a) * WIDTH + b] = to_float(from[c.tap[t].index * c.w_tap + a * c.w_in + b * c.w_out]);
    }
  }
}

void pack_row(const Call& c, int r) {
  const int64_t length = c.offsets[r + 1] - c.offsets[r];
  float* to = c.packed + (int64_t)c.offsets[r] * c.taps * OUT * IN;
$PACKS
}

// ---- the inner kernel ----------------------------------------------------------------------------------------------

// Stores z where it is wanted, and y.
template <class V, int VECTORS, int ROWS>
INLINE void finish(const Call& c, const int64_t* to, int64_t column, typename V::f (&acc)[ROWS][VECTORS]) {
  constexpr int WIDTH = VECTORS * V::lanes;
  const int64_t width = std::min<int64_t>(WIDTH, c.outputs - column);
  if (width == WIDTH) {
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        const int64_t at = to[i] + column + v * V::lanes;
        if (KEEPS_Z) store<V>(c.z + at, acc[i][v]);
        store<V>(c.y + at, activate<V>(acc[i][v]));
      }
  } else {
    UNROLL for (int i = 0; i < ROWS; ++i) {
      x_t whole[2][WIDTH];
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        store<V>(whole[0] + v * V::lanes, activate<V>(acc[i][v]));
        store<V>(whole[1] + v * V::lanes, acc[i][v]);
      }
      std::memcpy(c.y + to[i] + column, whole[0], width * sizeof(x_t));
      if (KEEPS_Z) std::memcpy(c.z + to[i] + column, whole[1], width * sizeof(x_t));
    }
  }
}

template <class V, int VECTORS, int ROWS>
__attribute__((noinline)) void kernel(const Call& c, int r, int strip, const float* x, const Tile& tile, int64_t row) {
  const int64_t column = (int64_t)r * OUT + strip;
  typename V::f acc[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = load<V>(c.bias + column + v * V::lanes);
  const float* pixel[ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) pixel[i] = x + tile.at[row + i] * c.pixel_stride;
  const int length = c.offsets[r + 1] - c.offsets[r];
  const int32_t* list = c.indices + c.offsets[r];
  const float* w = c.packed + ((int64_t)c.offsets[r] * OUT + (int64_t)strip * length) * c.taps * IN;
  int64_t j = 0, t = 0, from = length ? (int64_t)list[0] * IN + tile.tap_at[0] * c.pixel_stride : 0;
  for (int64_t steps = length * c.taps; steps > 0; --steps) {
    if (++t == c.taps) t = 0, ++j;
    const int64_t next = (int64_t)list[j < length ? j : 0] * IN + tile.tap_at[t] * c.pixel_stride;
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int k = 0; k < IN; k += 16) __builtin_prefetch(pixel[i] + next + k);
    // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
    UNROLL_TWICE for (int k = 0; k < IN; ++k, w += VECTORS * V::lanes) {
      typename V::f b[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<V>(w + v * V::lanes);
      UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] += pixel[i][from + k] * b[v];
    }
    from = next;
  }
  finish<V, VECTORS, ROWS>(c, tile.to + row, column, acc);
}

template <class V, int VECTORS, int ROWS>
void kernel_of(int64_t rows, const Call& c, int r, int strip, const float* x, const Tile& tile, int64_t row) {
  if (rows == ROWS)
    kernel<V, VECTORS, ROWS>(c, r, strip, x, tile, row);
  else if constexpr (ROWS > 1)
    kernel_of<V, VECTORS, ROWS - 1>(rows, c, r, strip, x, tile, row);
}

// One strip of output block r for the rows of a tile, in groups of nearly equal size.
template <class V, int VECTORS, int ROWS>
void strip(const Call& c, int r, int at, const float* x, const Tile& tile) {
  if ((int64_t)r * OUT + at >= c.outputs) return;
  const int64_t groups = (tile.rows + ROWS - 1) / ROWS;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = part(tile.rows, groups, g), end = part(tile.rows, groups, g + 1);
    kernel_of<V, VECTORS, ROWS>(end - begin, c, r, at, x, tile, begin);
  }
}

// ---- the plan ------------------------------------------------------------------------------------------------------

bool lie_in_one_run(const Geometry& g, int64_t w_in, int64_t w_tap) {
  bool in_order = true;
  for (int64_t t = 0; t < g.taps; ++t) in_order &= g.tap[t].index == t;
  return in_order && w_in == g.taps && (w_tap == 1 || g.taps == 1);
}

struct Plan {
  int64_t blocks, columns, pixel_stride;
  Tiles tiles;
  int64_t tile_floats, table_bytes, packed_floats;
  Plan(const Geometry& g, int64_t outputs, int64_t inputs, int64_t tile_bytes)
      : blocks((outputs + OUT - 1) / OUT),
        columns((inputs + IN - 1) / IN),
        pixel_stride(((columns * IN + 15) / 16 | 1) * 16),  // an odd number of cache lines
        tiles(g, tile_bytes, [&](const Tiles& t) { return 4 * t.pixels * pixel_stride; }, 24, 192, GRAIN) {
    tile_floats = tiles.pixels * pixel_stride;
    table_bytes = Tile::bytes(tiles);
    packed_floats = blocks * columns * g.taps * OUT * IN;
  }
};

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(const Geometry* g, int64_t outputs, int64_t inputs, int64_t tile_bytes, int threads) {
  const Plan p(*g, outputs, inputs, tile_bytes);
  return threads * p.table_bytes + 4 * (p.packed_floats + threads * p.tile_floats + p.blocks * OUT + p.tiles.count + 1);
}

// x and y as `geometry` has them, z like y, weight [outputs, inputs, taps].
extern "C" void run(const Geometry* geometry, const x_t* x, const w_t* weight, int64_t w_out, int64_t w_in,
                    int64_t w_tap, const float* bias, const int32_t* offsets, const int32_t* indices,
                    const int32_t* order, x_t* y, x_t* z, int64_t outputs, int64_t inputs, int64_t tile_bytes,
                    int threads, char* scratch) {
  const Plan p(*geometry, outputs, inputs, tile_bytes);
  float* const packed = (float*)(scratch + threads * p.table_bytes);
  float* const tile_buffers = packed + p.packed_floats;
  float* const whole_bias = tile_buffers + threads * p.tile_floats;
  int32_t* const next_block = (int32_t*)(whole_bias + p.blocks * OUT);
  int32_t* const next_tile = next_block + p.tiles.count;
  const Call c = {x, weight, w_out, w_in, w_tap, whole_bias, offsets, indices, y, z, outputs, inputs,
                  geometry->taps, geometry->tap, lie_in_one_run(*geometry, w_in, w_tap), packed, p.pixel_stride};
  for (int64_t o = 0; o < p.blocks * OUT; ++o) whole_bias[o] = bias && o < outputs ? bias[o] : 0;
  std::fill(next_block, next_tile + 1, 0);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < p.blocks; ++r) pack_row(c, r);

    int64_t held = -1;  // the tile that this thread's buffer and tables hold
    float* const tile_x = tile_buffers + omp_get_thread_num() * p.tile_floats;
    Tile tile(p.tiles, scratch + omp_get_thread_num() * p.table_bytes);
    auto work_on = [&](int64_t i) {
      for (;;) {
        const int turn = __atomic_fetch_add(&next_block[i], 1, __ATOMIC_RELAXED);
        if (turn >= p.blocks) return;
        if (held != i) {
          tile.set(p.tiles, i);
          pack_x(c, tile, tile_x);
        }
        held = i;
        const int r = order[turn];
$CALLS
      }
    };
    for (;;) {
      const int64_t i = __atomic_fetch_add(next_tile, 1, __ATOMIC_RELAXED);
      if (i >= p.tiles.count) break;
      work_on(i);
    }
    for (int64_t i = 0; i < p.tiles.count; ++i) work_on(i);
  }
}
"""
