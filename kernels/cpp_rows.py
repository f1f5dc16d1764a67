"""C++ for the products whose output rows run over a list of blocks: the forward pass and the input gradient.

Both compute `y[:, block o] = sum over listed i of x[:, block i] @ w[o, i]`. The forward pass lists the block columns
of each block row and packs weight blocks transposed; the input gradient lists the block rows of each block column and
packs them as they lie. The sums of a few rows of x by a strip of a block's columns stay in registers over the whole
list.

The plan of one call: pack the listed blocks of the weight, in the order in which they will be read; then tiles of rows
of x, each small enough for the second-level cache, run over all lists. A thread takes a tile for itself as long as
there are tiles, then helps with what is left of the others, so that neither few rows nor unequal lists leave one idle.
"""

import torch

from . import cpp_vectors
from .isa import Isa, panels


def source(
    isa: Isa,
    outputs: int,
    inputs: int,
    transposed: bool,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    activation: str,
) -> str:
    """C++ for blocks of `outputs` x `inputs` (sides along the output's and the input's columns).

    `transposed`: the weight is stored with outputs as rows (forward), else with outputs as columns (input gradient).
    """
    strips = panels(outputs, isa)
    calls = "\n".join(
        f"    strip<v{s.lanes}, {s.vectors}, {s.rows}>(c, r, {s.first}, tile_x, first, last);" for s in strips
    )
    packs = "\n".join(
        f"      pack_strip<{s.width}>(c, r, {s.first}, to + (int64_t){s.first} * length * IN);" for s in strips
    )
    role = "forward" if transposed else "input gradient"
    return (
        f"// Block-sparse linear, {role}: {outputs} x {inputs} blocks (output x input columns), "
        f"{x_dtype} x {weight_dtype}, activation {activation}, {isa.name}.\n"
        "// Generated; kept beside the library for whoever wants to read it.\n"
        + cpp_vectors.prelude(isa)
        + cpp_vectors.activation(activation)
        + f"""
typedef {cpp_vectors.SCALARS[str(x_dtype)]} x_t;
typedef {cpp_vectors.SCALARS[str(weight_dtype)]} w_t;
constexpr int OUT = {outputs}, IN = {inputs};
constexpr bool TRANSPOSED = {str(transposed).lower()};
constexpr bool KEEPS_Z = {str(activation.startswith("gelu")).lower()};
"""
        + _BODY.replace("$CALLS", calls).replace("$PACKS", packs)
    )


_BODY = """
struct Call {
  const x_t* x;
  int64_t x_stride;
  const w_t* weight;
  int64_t weight_stride;
  const float* bias;  // up to whole blocks
  const int32_t* offsets;  // the list of output block r is indices[offsets[r] .. offsets[r + 1]]
  const int32_t* indices;
  x_t *y, *z;
  int64_t rows, outputs, inputs;
  float* packed;       // the listed blocks, strip by strip, [input][column of the strip]
  int64_t tile_stride;  // of the tiles of x, in floats
};

// ---- packing -------------------------------------------------------------------------------------------------------

// Rows [first, last) of x as float32, zero up to a whole block, at a stride that spreads them over the cache's sets.
void pack_x(const Call& c, int64_t first, int64_t last, float* to) {
  for (int64_t m = first; m < last; ++m, to += c.tile_stride) {
    const x_t* from = c.x + m * c.x_stride;
    int64_t k = 0;
    for (; k + Narrow::lanes <= c.inputs; k += Narrow::lanes) store<Narrow>(to + k, load<Narrow>(from + k));
    for (; k < c.inputs; ++k) to[k] = to_float(from[k]);
    for (; k % IN; ++k) to[k] = 0;
  }
}

// Columns [strip, strip + WIDTH) of the blocks of output block r; zero where the weight ends.
template <int WIDTH> void pack_strip(const Call& c, int r, int strip, float* to) {
  const int64_t o = (int64_t)r * OUT + strip;
  for (int j = c.offsets[r]; j < c.offsets[r + 1]; ++j, to += WIDTH * IN) {
    const int64_t i = (int64_t)c.indices[j] * IN;
    const w_t* from = c.weight + (TRANSPOSED ? o * c.weight_stride + i : i * c.weight_stride + o);
    if (o + WIDTH <= c.outputs && i + IN <= c.inputs) {
      if (TRANSPOSED) {
        for (int b = 0; b < WIDTH; b += Narrow::lanes)
          for (int a = 0; a < IN; a += Narrow::lanes)
            transpose<WIDTH>(from + b * c.weight_stride + a, c.weight_stride, to + a * WIDTH + b);
      } else {
        for (int a = 0; a < IN; ++a)
          for (int b = 0; b < WIDTH; b += Narrow::lanes)
            store<Narrow>(to + a * WIDTH + b, load<Narrow>(from + a * c.weight_stride + b));
      }
    } else {
      for (int a = 0; a < IN; ++a)
        for (int b = 0; b < WIDTH; ++b) {
          const bool inside = o + b < c.outputs && i + a < c.inputs;
          to[a * WIDTH + b] =
              inside ? to_float(from[TRANSPOSED ? b * c.weight_stride + a : a * c.weight_stride + b]) : 0.0f;
        }
    }
  }
}

void pack_row(const Call& c, int r) {
  const int64_t length = c.offsets[r + 1] - c.offsets[r];
  float* to = c.packed + (int64_t)c.offsets[r] * OUT * IN;
$PACKS
}

// ---- the inner kernel ----------------------------------------------------------------------------------------------

// Stores z where it is wanted, and y.
template <class V, int VECTORS, int ROWS>
INLINE void finish(const Call& c, int64_t row, int64_t column, typename V::f (&acc)[ROWS][VECTORS]) {
  constexpr int WIDTH = VECTORS * V::lanes;
  const int64_t width = std::min<int64_t>(WIDTH, c.outputs - column);
  x_t* y = c.y + row * c.outputs + column;
  x_t* z = c.z + row * c.outputs + column;
  if (width == WIDTH) {
    UNROLL for (int i = 0; i < ROWS; ++i, y += c.outputs, z += c.outputs)
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        if (KEEPS_Z) store<V>(z + v * V::lanes, acc[i][v]);
        store<V>(y + v * V::lanes, activate<V>(acc[i][v]));
      }
  } else {
    UNROLL for (int i = 0; i < ROWS; ++i, y += c.outputs, z += c.outputs) {
      x_t whole[2][WIDTH];
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        store<V>(whole[0] + v * V::lanes, activate<V>(acc[i][v]));
        store<V>(whole[1] + v * V::lanes, acc[i][v]);
      }
      std::memcpy(y, whole[0], width * sizeof(x_t));
      if (KEEPS_Z) std::memcpy(z, whole[1], width * sizeof(x_t));
    }
  }
}

template <class V, int VECTORS, int ROWS>
__attribute__((noinline)) void kernel(const Call& c, int r, int strip, const float* x, int64_t row) {
  const int64_t column = (int64_t)r * OUT + strip;
  typename V::f acc[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = load<V>(c.bias + column + v * V::lanes);
  const int length = c.offsets[r + 1] - c.offsets[r];
  const int32_t* list = c.indices + c.offsets[r];
  const float* w = c.packed + (int64_t)c.offsets[r] * OUT * IN + (int64_t)strip * length * IN;
  const int64_t stride = c.tile_stride;
  for (int j = 0; j < length; ++j) {
    const float* next = x + (int64_t)list[j + 1 < length ? j + 1 : 0] * IN;
    for (int i = 0; i < ROWS; ++i, next += stride)
      UNROLL for (int k = 0; k < IN; k += 16) __builtin_prefetch(next + k);
    const float* from = x + (int64_t)list[j] * IN;
    // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
    UNROLL_TWICE for (int k = 0; k < IN; ++k, w += VECTORS * V::lanes) {
      typename V::f b[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<V>(w + v * V::lanes);
      UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] += from[i * stride + k] * b[v];
    }
  }
  finish<V, VECTORS, ROWS>(c, row, column, acc);
}

template <class V, int VECTORS, int ROWS>
void kernel_of(int64_t rows, const Call& c, int r, int strip, const float* x, int64_t row) {
  if (rows == ROWS)
    kernel<V, VECTORS, ROWS>(c, r, strip, x, row);
  else if constexpr (ROWS > 1)
    kernel_of<V, VECTORS, ROWS - 1>(rows, c, r, strip, x, row);
}

// One strip of output block r for rows [first, last), in groups of nearly equal size.
template <class V, int VECTORS, int ROWS>
void strip(const Call& c, int r, int at, const float* x, int64_t first, int64_t last) {
  if ((int64_t)r * OUT + at >= c.outputs) return;
  const int64_t rows = last - first, groups = (rows + ROWS - 1) / ROWS;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = part(rows, groups, g), end = part(rows, groups, g + 1);
    kernel_of<V, VECTORS, ROWS>(end - begin, c, r, at, x + begin * c.tile_stride, first + begin);
  }
}

// ---- the plan ------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t blocks, columns, tiles, tile_stride, tile_floats, packed_floats, counters;
  Plan(int64_t rows, int64_t outputs, int64_t inputs, int64_t tile_rows) {
    blocks = (outputs + OUT - 1) / OUT;
    columns = (inputs + IN - 1) / IN;
    tiles = (rows + tile_rows - 1) / tile_rows;
    tile_stride = ((columns * IN + 15) / 16 | 1) * 16;  // an odd number of cache lines
    tile_floats = tile_rows * tile_stride;
    packed_floats = blocks * columns * OUT * IN;
    counters = tiles + 1;
  }
};

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(int64_t rows, int64_t outputs, int64_t inputs, int64_t tile_rows, int threads) {
  const Plan p(rows, outputs, inputs, tile_rows);
  return 4 * (p.packed_floats + threads * p.tile_floats + p.blocks * OUT + p.counters);
}

// x [rows, inputs], y and z [rows, outputs].
extern "C" void run(const x_t* x, int64_t x_stride, const w_t* weight, int64_t weight_stride, const float* bias,
                    const int32_t* offsets, const int32_t* indices, const int32_t* order, x_t* y, x_t* z,
                    int64_t rows, int64_t outputs, int64_t inputs, int64_t tile_rows, int threads, float* scratch) {
  const Plan p(rows, outputs, inputs, tile_rows);
  float* const tile_buffers = scratch + p.packed_floats;
  float* const whole_bias = tile_buffers + threads * p.tile_floats;
  int32_t* const next_block = (int32_t*)(whole_bias + p.blocks * OUT);
  int32_t* const next_tile = next_block + p.tiles;
  const Call c = {x, x_stride, weight, weight_stride, whole_bias, offsets, indices, y, z, rows, outputs, inputs,
                  scratch, p.tile_stride};
  for (int64_t o = 0; o < p.blocks * OUT; ++o) whole_bias[o] = bias && o < outputs ? bias[o] : 0;
  std::fill(next_block, next_tile + 1, 0);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < p.blocks; ++r) pack_row(c, r);

    int64_t held = -1;  // the tile that this thread's buffer holds
    float* const tile_x = tile_buffers + omp_get_thread_num() * p.tile_floats;
    auto work_on = [&](int64_t tile) {
      const int64_t first = part(rows, p.tiles, tile), last = part(rows, p.tiles, tile + 1);
      for (;;) {
        const int turn = __atomic_fetch_add(&next_block[tile], 1, __ATOMIC_RELAXED);
        if (turn >= p.blocks) return;
        if (held != tile) pack_x(c, first, last, tile_x);
        held = tile;
        const int r = order[turn];
$CALLS
      }
    };
    for (;;) {
      const int64_t tile = __atomic_fetch_add(next_tile, 1, __ATOMIC_RELAXED);
      if (tile >= p.tiles) break;
      work_on(tile);
    }
    for (int64_t tile = 0; tile < p.tiles; ++tile) work_on(tile);
  }
}
"""
