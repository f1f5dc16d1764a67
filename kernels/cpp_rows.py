"""C++ for the products whose output rows run over a list of blocks: the forward pass and the input gradient.

Both compute `y[row, block o] = sum over listed i and taps t of x[pixel(row, t), block i] @ w[o, i, t]`; a linear has
one tap, and its pixels are its rows (`cpp_window`). The forward pass lists the block columns of each block row, the
input gradient the block rows of each block column. The sums of a few rows by a strip of a block's columns stay in
registers over the whole list.

The plan of one call: pack the listed blocks of the weight, in the order in which they will be read; then tiles of rows,
each with inputs small enough for the second-level cache, run over all lists and phases, and over what sums over nothing
at the end, at once. Inputs are packed, too, but those of a linear in whole blocks, of the type that is multiplied,
which are read where they lie. A thread takes a tile for itself as long as there are tiles, then helps with what is left
of the others, so that neither few rows nor unequal lists leave one idle.
"""

import torch

from . import cpp_factors, cpp_vectors, cpp_window
from .cpp_rows_lines import LINES, SEGMENT, segments
from .cpp_rows_packing import PACKING, REORDER
from .isa import Isa, panels
from .reference import BACKWARD, DIFFERENTIATED


def source(
    isa: Isa, outputs: int, inputs: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, activation: str
) -> str:
    """C++ for blocks of `outputs` x `inputs` (sides along the output's and the input's columns).

    `activation` is one of `reference.ACTIVATIONS`, or what `reference.backward` makes of one of `DIFFERENTIATED`: then
    sums are gradients of that activation's outputs, and multiplied by its slope at the z that is given; what they add
    up to over all rows comes out, too.
    """
    last = cpp_vectors.activation("none" if activation.endswith(BACKWARD) else activation)
    if activation.endswith(BACKWARD):
        last += cpp_vectors.slope(activation.removesuffix(BACKWARD))
    strips = panels(outputs, isa)
    calls = "\n".join(
        f"        strip<v{s.lanes}, {s.vectors}, {s.rows}, {segments(s, isa)}>"
        f"(c, list, phase, {s.first}, inputs_at, tile, total);"
        for s in strips
    )
    reorder = REORDER if cpp_factors.takes_pairs(isa, x_dtype) and weight_dtype == x_dtype else ""
    packs = "\n".join(f"    pack_strip<{s.width}>(c, list, phase, {s.first}, room);" for s in strips)
    what = f"{outputs} x {inputs} blocks (output x input columns), {x_dtype} x {weight_dtype}, activation {activation}"
    return (
        cpp_vectors.prelude(f"Block-sparse rows of outputs: {what}", isa)
        + cpp_factors.source(isa, x_dtype)
        + last
        + cpp_window.GEOMETRY
        + f"""
typedef {cpp_vectors.SCALARS[str(x_dtype)]} x_t;
typedef {cpp_vectors.SCALARS[str(weight_dtype)]} w_t;
constexpr int OUT = {outputs}, IN = {inputs}, GRAIN = {strips[0].rows};
constexpr bool KEEPS_Z = {_cpp(activation in DIFFERENTIATED)}, TAKES_Z = {_cpp(activation.endswith(BACKWARD))};
"""
        + PACKING.replace("$REORDER", reorder).replace("$PACKS", packs)
        + _BODY.replace("$CALLS", calls).replace("$LINES", LINES.replace("$SEGMENT", str(SEGMENT)))
    )


def _cpp(value: bool) -> str:
    return str(value).lower()


_BODY = """
// ---- the inner kernel ----------------------------------------------------------------------------------------------

template <class V> typename V::f slope(typename V::f z);  // of the activation before this layer

// Multiplied by the slope at z where that is given.
template <class V> INLINE typename V::f with_slope(typename V::f sum, const x_t* z) {
  if constexpr (TAKES_Z) return sum * slope<V>(load<V>(z));
  return sum;
}

// Stores z where it is wanted, and y, of `width` columns; adds up gradients of z into `total`.
template <class V, int VECTORS, int ROWS>
INLINE void finish(const Call& c, const int64_t* to, int64_t column, int64_t width,
                   typename V::f (&acc)[ROWS][VECTORS], float* total) {
  constexpr int WIDTH = VECTORS * V::lanes;
  if (width >= WIDTH) {
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        const int64_t at = to[i] + column + v * V::lanes;
        if (KEEPS_Z) store<V>(c.z + at, acc[i][v]);
        acc[i][v] = with_slope<V>(acc[i][v], c.z + at);
        store<V>(c.y + at, activate<V>(acc[i][v]));
      }
  } else {
    UNROLL for (int i = 0; i < ROWS; ++i) {
      x_t y[WIDTH], z[WIDTH] = {};
      x_t* const given = c.z + to[i] + column;
      if (TAKES_Z) std::memcpy(z, given, width * sizeof(x_t));
      UNROLL for (int v = 0; v < VECTORS; ++v) {
        if (KEEPS_Z) store<V>(z + v * V::lanes, acc[i][v]);
        acc[i][v] = with_slope<V>(acc[i][v], z + v * V::lanes);
        store<V>(y + v * V::lanes, activate<V>(acc[i][v]));
      }
      std::memcpy(c.y + to[i] + column, y, width * sizeof(x_t));
      if (KEEPS_Z) std::memcpy(given, z, width * sizeof(x_t));
    }
  }
  if (TAKES_Z)
    UNROLL for (int v = 0; v < VECTORS; ++v) {
      typename V::f sum = acc[0][v];
      UNROLL for (int i = 1; i < ROWS; ++i) sum += acc[i][v];
      store<V>(total + v * V::lanes, load<V>(total + v * V::lanes) + sum);
    }
}

// Asks the cache for what `finish` will store or take of a row.
template <int WIDTH> INLINE void ask_for_outputs(const Call& c, int64_t at) {
  UNROLL for (int v = 0; v < WIDTH; v += 64 / sizeof(x_t)) {
    __builtin_prefetch(c.y + at + v, 1);
    if (KEEPS_Z || TAKES_Z) __builtin_prefetch(c.z + at + v, KEEPS_Z);
  }
}

template <class V, int VECTORS, int ROWS>
__attribute__((noinline)) void kernel(const Call& c, const List& list, const Phase& phase, int strip,
                                      const packed_t* x, const Rows& rows, const int64_t* tap_at, int64_t row,
                                      float* total) {
  constexpr int WIDTH = VECTORS * V::lanes;
  const int64_t* const to = rows.to + row;
  const int64_t column = list.column + strip;
  typename V::f acc[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = load<V>(list.bias + strip + v * V::lanes);
  const packed_t* pixel[ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) pixel[i] = x + rows.at[row + i] + list.input;
  const int64_t length = list.length, taps = phase.taps, all = length * taps;
  const int32_t* entry = c.indices + list.begin;
  const packed_t* w = c.packed_strip(list, phase, strip);
  int64_t j = 0, t = 0, from = all ? (int64_t)entry[0] * IN + tap_at[0] : 0;
  int fetched = 0;  // rows of the output that the cache has been asked for
  const int fetch = all >= ROWS ? 1 : all ? (ROWS + (int)all - 1) / (int)all : 0;
  for (int64_t steps = all; steps > 0; --steps) {
    if (++t == taps) t = 0, ++j;
    const int64_t next = (int64_t)entry[j < length ? j : 0] * IN + tap_at[t];
    if (t == 0)  // of a block's first tap alone: many pixels of the others are there then, and all in the next cache
      UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int k = 0; k < IN; k += 64 / sizeof(packed_t)) __builtin_prefetch(pixel[i] + next + k);
    // What is stored at the end is in the cache by then. A few rows at a time: a core waits for few lines at once, and
    // the inputs come the same way.
    for (const int last = std::min(ROWS, fetched + fetch); fetched < last; ++fetched)
      ask_for_outputs<WIDTH>(c, to[fetched] + column);
    // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
    UNROLL_TWICE for (int k = 0; k < IN; k += DEPTH, w += DEPTH * WIDTH) {
      factors<V> b[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load_factors<V>(w + v * DEPTH * V::lanes);
      UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int v = 0; v < VECTORS; ++v)
          acc[i][v] = multiply_add<V>(acc[i][v], broadcast<V>(pixel[i] + from + k), b[v]);
    }
    from = next;
  }
  finish<V, VECTORS, ROWS>(c, to, column, list.width - strip, acc, total + strip);
}

template <class V, int VECTORS, int ROWS>
void kernel_of(int64_t count, const Call& c, const List& list, const Phase& phase, int strip, const packed_t* x,
               const Rows& rows, const int64_t* tap_at, int64_t row, float* total) {
  if (count == ROWS)
    kernel<V, VECTORS, ROWS>(c, list, phase, strip, x, rows, tap_at, row, total);
  else if constexpr (ROWS > 1)
    kernel_of<V, VECTORS, ROWS - 1>(count, c, list, phase, strip, x, rows, tap_at, row, total);
}

$LINES
// One strip of an output block for the rows of a tile in one phase, in groups of nearly equal size.
template <class V, int VECTORS, int ROWS, int SEGMENTS>
void strip(const Call& c, const List& list, int64_t f, int at, const packed_t* x, const Tile& tile, float* total) {
  if (at >= list.width) return;
  const Phase& phase = c.g.phase()[f];
  const Rows& rows = tile.phase[f];
  const int64_t* const tap_at = tile.tap_at + phase.first_tap;
  if constexpr (SEGMENTS > 0)
    if (strip_by_lines<V, SEGMENTS>(c, list, phase, at, x, rows, tap_at, total)) return;
  const int64_t groups = (rows.count + ROWS - 1) / ROWS;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = part(rows.count, groups, g), end = part(rows.count, groups, g + 1);
    kernel_of<V, VECTORS, ROWS>(end - begin, c, list, phase, at, x, rows, tap_at, begin, total);
  }
}

// ---- output blocks that sum over nothing ---------------------------------------------------------------------------

// What every row of a block has that sums over nothing: its bias, and what the activation makes of it. A gradient that
// is zero stays so, whatever the slope.
struct alignas(64) Constant { x_t y[OUT], z[OUT]; };

void set_constant(const List& list, Constant& constant) {
  for (int o = 0; o < OUT; o += Narrow::lanes) {
    const Narrow::f bias = load<Narrow>(list.bias + o);
    store<Narrow>(constant.z + o, bias);
    store<Narrow>(constant.y + o, activate<Narrow>(bias));
  }
}

// Row by row, so that writes go through memory in order; past the caches where they have no room for it.
template <bool STREAM>
void fill(const Call& c, const List* lists, const Constant* constants, int64_t count, const Tile& tile) {
  for (int64_t f = 0; f < c.g.phases; ++f)
    for (int64_t row = 0; row < tile.phase[f].count; ++row)
      for (int64_t l = 0; l < count; ++l) {
        const int64_t at = tile.phase[f].to[row] + lists[l].column;
        if (STREAM && lists[l].width == OUT) {
          stream<sizeof constants[l].y>(constants[l].y, c.y + at);
          if (KEEPS_Z) stream<sizeof constants[l].z>(constants[l].z, c.z + at);
        } else if (lists[l].width == OUT) {
          std::memcpy(c.y + at, constants[l].y, sizeof constants[l].y);
          if (KEEPS_Z) std::memcpy(c.z + at, constants[l].z, sizeof constants[l].z);
        } else {
          std::memcpy(c.y + at, constants[l].y, lists[l].width * sizeof(x_t));
          if (KEEPS_Z) std::memcpy(c.z + at, constants[l].z, lists[l].width * sizeof(x_t));
        }
      }
  if (STREAM) streamed();
}

// ---- sums over all rows --------------------------------------------------------------------------------------------

// Those of each tile, one after the other, so that they come out the same at each run. What sums over nothing is zero.
void add_up(const List& list, const float* totals, int64_t tiles, int64_t step, int64_t phases, float* sums) {
  double sum[OUT] = {};
  for (int64_t i = 0; i < tiles; ++i, totals += step)
    for (int64_t at = 0; at < phases * OUT; ++at) sum[at % OUT] += totals[at];
  for (int64_t o = 0; o < list.width; ++o) sums[list.column + o] = sum[o];
}

// ---- the plan ------------------------------------------------------------------------------------------------------

bool lie_in_order(const Geometry& g, int64_t w_tap) {
  bool in_order = g.phases == 1 && (w_tap == 1 || g.taps == 1);
  for (int64_t t = 0; t < g.taps; ++t) in_order &= g.tap()[t].index == t;
  return in_order;
}

// Whether inputs are read where they lie: rows of a linear, as they are multiplied, in whole blocks, of which fewer lie
// in the same sets of the first-level cache at a time than it has ways.
bool need_no_packing(const Geometry& g, int64_t groups, int64_t inputs, int ways) {
  bool linear = g.images * g.out[0] * g.out[1] * g.phases * g.taps * groups == 1;
  for (int d = 0; d < 3; ++d) linear &= g.in[d] == g.out[d] && g.first[d] == 0 && g.step[d] == 1;
  const bool spread = g.x_stride[3] * sizeof(x_t) % 4096 != 0 || (g.x_stride[3] != 0 && GRAIN < ways);
  return linear && std::is_same<x_t, packed_t>::value && inputs % IN == 0 && spread;
}

struct Plan {
  static constexpr int64_t LINE = 64 / sizeof(packed_t);  // entries of a cache line
  bool packs;
  int64_t columns, lists, pixel_stride;
  Tiles tiles;
  int64_t tile_bytes, table_bytes, packed_bytes, room_bytes, total_bytes;
  Plan(const Geometry& g, int64_t groups, int64_t outputs, int64_t inputs, int64_t most, int ways)
      : packs(!need_no_packing(g, groups, inputs, ways)),
        columns((inputs + IN - 1) / IN),
        lists(groups * ((outputs + OUT - 1) / OUT)),
        pixel_stride(((groups * columns * IN + LINE - 1) / LINE | 1) * LINE),  // an odd number of cache lines
        tiles(g, 24, 192, GRAIN, [&](const Tiles& t) { return bytes(t.pixels * pixel_stride) <= most; }) {
    tile_bytes = packs ? bytes(tiles.pixels * pixel_stride) : 0;
    table_bytes = Tile::bytes(tiles);
    packed_bytes = bytes(lists * columns * g.taps * OUT * IN);
    room_bytes = DEPTH == 1 ? 0 : sizeof(float) * g.taps * OUT * IN;
    total_bytes = TAKES_Z ? sizeof(float) * tiles.count * g.phases * lists * OUT : 0;
  }

  static int64_t bytes(int64_t packed) { return sizeof(packed_t) * packed; }
};

// The lists in the order in which they are taken: each output block has one, or, where `shared`, the blocks at the same
// place in every group have one that is in order of the groups.
void set_lists(const Call& c, int64_t outputs, bool shared, const float* bias, const int32_t* offsets,
               const int32_t* order, List* lists, float* whole_bias) {
  const int64_t blocks = (outputs + OUT - 1) / OUT, columns = (c.inputs + IN - 1) / IN;
  for (int64_t turn = 0; turn < c.groups * blocks; ++turn, whole_bias += OUT) {
    const int64_t r = order[shared ? turn / c.groups : turn], group = shared ? turn % c.groups : r / blocks;
    const int64_t at = r % blocks * OUT, column = group * outputs + at, width = std::min<int64_t>(OUT, outputs - at);
    const int32_t *begin = c.indices + offsets[r], *end = c.indices + offsets[r + 1];
    if (shared) {
      begin = std::lower_bound(begin, end, group * columns);
      end = std::lower_bound(begin, end, (group + 1) * columns);
    }
    lists[turn] = {begin - c.indices, end - begin, column, width, shared ? 0 : group * columns * IN,
                   (shared ? at : column) * c.w_out, whole_bias};
    for (int64_t o = 0; o < OUT; ++o) whole_bias[o] = bias && o < width ? bias[column + o] : 0;
  }
}

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(const Geometry* g, int64_t groups, int64_t outputs, int64_t inputs,
                                 int64_t tile_bytes, int ways, int threads) {
  const Plan p(*g, groups, outputs, inputs, tile_bytes, ways);
  return threads * p.table_bytes + p.lists * (int64_t)(sizeof(List) + sizeof(Constant)) +
         groups * p.columns * (int64_t)(sizeof(Run) + sizeof(int32_t)) + p.packed_bytes +
         threads * (p.tile_bytes + p.room_bytes) + p.total_bytes + 4 * (p.lists * OUT + p.tiles.count + 1);
}

// x and y as `geometry` has them, z like y, sums [groups * outputs]. Outputs and inputs are those of a group. The
// weight is [groups * outputs, inputs, taps] with a list for each of its block rows, or
// [outputs, groups * inputs, taps], each group with its own inputs, where `shared`.
extern "C" void run(const Geometry* geometry, const x_t* x, const w_t* weight, int64_t w_out, int64_t w_in,
                    int64_t w_tap, const float* bias, const int32_t* offsets, const int32_t* indices,
                    const int32_t* order, x_t* y, x_t* z, float* sums, int64_t groups, int64_t outputs, int64_t inputs,
                    int shared, int64_t tile_bytes, int ways, int threads, char* scratch) {
  const Plan p(*geometry, groups, outputs, inputs, tile_bytes, ways);
  List* const lists = (List*)(scratch + threads * p.table_bytes);
  Constant* const constants = (Constant*)(lists + p.lists);
  Run* const runs = (Run*)(constants + p.lists);
  char* const packed = (char*)(runs + groups * p.columns);
  char* const tile_buffers = packed + p.packed_bytes;
  char* const rooms = tile_buffers + threads * p.tile_bytes;
  float* const whole_bias = (float*)(rooms + threads * p.room_bytes);
  float* const totals = whole_bias + p.lists * OUT;  // [tile][turn][OUT]
  int32_t* const next_turn = (int32_t*)((char*)totals + p.total_bytes);
  int32_t* const next_tile = next_turn + p.tiles.count;
  int32_t* const named = next_tile + 1;
  Call c = {*geometry, x, weight, w_out, w_in, w_tap, indices, y, z, groups, inputs, shared ? groups * inputs : inputs,
            lie_in_order(*geometry, w_tap), runs, 0, (packed_t*)packed, p.pixel_stride};
  set_lists(c, outputs, shared, bias, offsets, order, lists, whole_bias);
  std::fill(next_turn, next_tile + 1, 0);
  int64_t live = p.lists;  // the longest lists come first, those that are empty last
  for (; live > 0 && lists[live - 1].length == 0; --live) set_constant(lists[live - 1], constants[live - 1]);
  if (p.packs) c.runs = set_runs(c, lists, live, named, runs);
  const int64_t rows = p.tiles.count * p.tiles.rows * geometry->phases;
  const bool large = rows * groups * outputs * (int64_t)sizeof(x_t) > 2 * tile_bytes;
  const int64_t listed = live * geometry->phases, turns = listed + (live < p.lists);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < live; ++i)
      pack_list(c, lists[i], (float*)(rooms + omp_get_thread_num() * p.room_bytes));

    int64_t held = -1;  // the tile that this thread's buffer and tables hold
    packed_t* const tile_x = (packed_t*)(tile_buffers + omp_get_thread_num() * p.tile_bytes);
    const packed_t* inputs_at = tile_x;
    Tile tile(p.tiles, scratch + omp_get_thread_num() * p.table_bytes);
    auto work_on = [&](int64_t i) {
      for (;;) {
        const int64_t turn = __atomic_fetch_add(&next_turn[i], 1, __ATOMIC_RELAXED);
        if (turn >= turns) return;
        if (held != i && p.packs) {
          tile.set(p.tiles, i, p.pixel_stride);
          pack_x(c, tile, tile_x);
        } else if (held != i) {
          tile.set(p.tiles, i, geometry->x_stride[3]);
          inputs_at = (const packed_t*)(c.x + tile.from[0]);
        }
        held = i;
        if (turn == listed) {
          (large ? fill<true> : fill<false>)(c, lists + live, constants + live, p.lists - live, tile);
          continue;
        }
        const List& list = lists[turn / geometry->phases];
        const int64_t phase = turn % geometry->phases;
        float* const total = TAKES_Z ? totals + (i * listed + turn) * OUT : nullptr;
        if (TAKES_Z) std::fill_n(total, OUT, 0);
$CALLS
      }
    };
    for (;;) {
      const int64_t i = __atomic_fetch_add(next_tile, 1, __ATOMIC_RELAXED);
      if (i >= p.tiles.count) break;
      work_on(i);
    }
    for (int64_t i = 0; i < p.tiles.count; ++i) work_on(i);
    if (TAKES_Z) {
#pragma omp barrier
#pragma omp for
      for (int64_t l = 0; l < p.lists; ++l)
        add_up(lists[l], totals + l * geometry->phases * OUT, l < live ? p.tiles.count : 0, listed * OUT,
               geometry->phases, sums);
    }
  }
}
"""
