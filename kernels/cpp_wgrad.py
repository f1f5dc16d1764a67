"""C++ for the weight gradient: for each listed block and tap, a product over all rows.

The plan of one call: rows are taken in tiles that fit the caches (`cpp_window`; a linear has one tap, and its pixels
are its rows), the two panels of a block the second-level one; a tile of both inputs is packed by columns of blocks;
then every listed block multiplies its two panels, once for each tap. Its sums are kept in float32 from tile to tile, in
a buffer of their own; the last tile rounds and writes them, together with the block's two signals. Probed blocks take
the same way without being written; all other blocks are written zero.
"""

import torch

from . import cpp_vectors, cpp_window
from .isa import Isa, panels


def source(isa: Isa, block: tuple[int, int], x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """C++ for blocks of `block` (sides along the weight's rows and columns)."""
    strips = panels(block[1], isa)
    calls = "\n".join(f"  strip<v{s.lanes}, {s.vectors}, {s.first}>(g, x, at, tap, size, sums);" for s in strips)
    group = min(strip.rows for strip in strips)
    copies = "\n".join(
        f"    for (int64_t p = first; p < last; ++p)\n"
        f"      copy<{s.width}>(from[p] < 0 ? nullptr : x + from[p] + {s.first}, k - b * IN - {s.first}, "
        f"to + {s.first} * size + p * {s.width});"
        for s in strips
    )
    return (
        f"// Block-sparse weight gradient: {block[0]} x {block[1]} blocks (output x input columns), "
        f"{x_dtype} x {weight_dtype}, {isa.name}.\n"
        "// Generated; kept beside the library for whoever wants to read it.\n"
        + cpp_vectors.prelude(isa)
        + cpp_window.GEOMETRY
        + f"""
typedef {cpp_vectors.SCALARS[str(x_dtype)]} x_t;
typedef {cpp_vectors.SCALARS[str(weight_dtype)]} w_t;
constexpr int OUT = {block[0]}, IN = {block[1]};
constexpr int GROUPS = {-(-block[0] // group)};  // of the block's rows, whose sums stay in registers
"""
        + _BODY.replace("$CALLS", calls).replace("$COPIES", copies)
    )


_BODY = """
struct Entry { int32_t row, column, written; };  // a block to compute; written: active, else probed

struct Size { int64_t rows, pixels; };  // of the largest tile: a panel of g, of x has as many rows

// Calls f(size, first row) for each group of the block's rows, with the size as a type; they differ by one at most.
template <class F> INLINE void for_groups(F f) {
  constexpr int SMALL = OUT / GROUPS, LARGER = OUT % GROUPS;
  int at = 0;
  for (int i = 0; i < LARGER; ++i, at += SMALL + 1) f(std::integral_constant<int, SMALL + 1>(), at);
  for (int i = LARGER; i < GROUPS; ++i, at += SMALL) f(std::integral_constant<int, SMALL>(), at);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// WIDTH columns of one row as float32; zero from `size` on, and where there is no row.
template <int WIDTH> INLINE void copy(const x_t* from, int64_t size, float* to) {
  typedef typename std::conditional<(WIDTH < Narrow::lanes), v4, Narrow>::type V;
  if (!from) {
    std::memset(to, 0, WIDTH * sizeof(float));
  } else if (size >= WIDTH) {
    UNROLL for (int i = 0; i < WIDTH; i += V::lanes) {
      const int at = std::min(i, WIDTH - V::lanes);  // the last vector overlaps the one before
      store<V>(to + at, load<V>(from + at));
    }
  } else {
    for (int i = 0; i < WIDTH; ++i) to[i] = i < size ? to_float(from[i]) : 0.0f;
  }
}

// Rows or pixels [first, last) of a tile, for the blocks of columns that are used. A few at a time and block by block:
// reads then follow as many streams as there are rows, and writes are one.

// Rows of g to [block][group of columns][row][column of the group].
void pack_g(const x_t* g, const int64_t* from, int64_t n, const char* used, int64_t first, int64_t last, int64_t size,
            float* to) {
  for (int64_t b = 0; b * OUT < n; ++b, g += OUT, to += size * OUT) {
    if (!used[b]) continue;
    for_groups([&](auto group, int at) {
      constexpr int SIZE = decltype(group)::value;
      for (int64_t m = first; m < last; ++m)
        copy<SIZE>(g + from[m] + at, n - b * OUT - at, to + at * size + m * SIZE);
    });
  }
}

// Pixels of x to [block][strip][pixel][column].
void pack_x(const x_t* x, const int64_t* from, int64_t k, const char* used, int64_t first, int64_t last, int64_t size,
            float* to) {
  for (int64_t b = 0; b * IN < k; ++b, x += IN, to += size * IN) {
    if (!used[b]) continue;
$COPIES
  }
}

// ---- the inner kernel ----------------------------------------------------------------------------------------------

// sums[ROWS rows of the block][a strip] += g^T x over `rows` rows, each with the pixel that it reads.
template <class V, int VECTORS, int ROWS>
__attribute__((noinline)) void kernel(const float* g, const float* x, const int32_t* at, int64_t rows, float* sums) {
  constexpr int WIDTH = VECTORS * V::lanes;
  typename V::f acc[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = load<V>(sums + i * IN + v * V::lanes);
  // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
  UNROLL_TWICE for (int64_t m = 0; m < rows; ++m, g += ROWS) {
    const float* pixel = x + (int64_t)at[m] * WIDTH;
    typename V::f b[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<V>(pixel + v * V::lanes);
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] += g[i] * b[v];
  }
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) store<V>(sums + i * IN + v * V::lanes, acc[i][v]);
}

// A strip of the block's columns, from column AT on.
template <class V, int VECTORS, int AT>
void strip(const float* g, const float* x, const Tile& tile, int64_t tap, const Size& size, float* sums) {
  const float* pixels = x + AT * size.pixels + tap * VECTORS * V::lanes;
  const Rows& rows = tile.phase[0];
  for_groups([&](auto group, int at) {
    constexpr int SIZE = decltype(group)::value;
    kernel<V, VECTORS, SIZE>(g + at * size.rows, pixels, rows.at, rows.count, sums + at * IN + AT);
  });
}

// Adds the product of a panel of g and the pixels `tap` away of a panel of x to the block's sums.
void product(const float* g, const float* x, const Tile& at, int64_t tap, const Size& size, float* sums) {
$CALLS
}

// ---- what becomes of the sums --------------------------------------------------------------------------------------

struct Weight {
  const w_t* values;
  int64_t n, k, taps, stride[3];  // along output columns, input columns, taps
  w_t* gradient;  // [n, k, taps]
};

// Writes one tap of an active block's gradient; both of its parts of the block's signals come from the sums before they
// are rounded.
void finish(const Entry& e, int64_t tap, const float* sums, const Weight& w, float* times_weight, float* squared) {
  const int64_t r = (int64_t)e.row * OUT, c = (int64_t)e.column * IN;
  const int height = std::min<int64_t>(OUT, w.n - r), width = std::min<int64_t>(IN, w.k - c);
  const bool together = w.taps == 1 && w.stride[1] == 1;
  Narrow::f products = {}, squares = {};
  float product_tail = 0, square_tail = 0;
  for (int i = 0; i < height; ++i, sums += IN) {
    const w_t* values = w.values + (r + i) * w.stride[0] + c * w.stride[1] + tap * w.stride[2];
    w_t* out = w.gradient + ((r + i) * w.k + c) * w.taps + tap;
    int j = 0;
    for (; together && j + Narrow::lanes <= width; j += Narrow::lanes) {
      const Narrow::f g = load<Narrow>(sums + j);
      squares += g * g;
      if (e.written) {
        products += g * load<Narrow>(values + j);
        store<Narrow>(out + j, g);
      }
    }
    for (; j < width; ++j) {
      square_tail += sums[j] * sums[j];
      if (e.written) {
        product_tail += sums[j] * to_float(values[j * w.stride[1]]);
        round_to(out + j * w.taps, sums[j]);
      }
    }
  }
  *squared = sum<Narrow>(squares) + square_tail;
  *times_weight = sum<Narrow>(products) + product_tail;
}

// Zeroes the blocks of block row r that the list leaves out, and all signals.
void clear_row(const int32_t* list, int length, int64_t r, int64_t columns, const Weight& w, float* signals,
               int64_t blocks) {
  const int64_t height = std::min<int64_t>(OUT, w.n - r * OUT), row_size = w.k * w.taps;
  for (int64_t c = 0; c < columns; ++c) signals[r * columns + c] = signals[blocks + r * columns + c] = 0;
  for (int64_t i = r * OUT; i < r * OUT + height; ++i) {
    w_t* row = w.gradient + i * row_size;
    int64_t done = 0;
    for (int j = 0; j < length; ++j) {
      const int64_t c = (int64_t)list[j] * IN * w.taps;
      std::memset(row + done, 0, (c - done) * sizeof(w_t));
      done = std::min(c + IN * w.taps, row_size);
    }
    std::memset(row + done, 0, (row_size - done) * sizeof(w_t));
  }
}

// ---- the plan ------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t height, width, blocks;  // of the weight's grid
  Tiles tiles;
  int64_t g_floats, x_floats, sums_floats, table_bytes;
  Plan(const Geometry& g, int64_t groups, int64_t n, int64_t k, int64_t probes, int64_t tile_bytes,
       int64_t panel_bytes)
      : height((n + OUT - 1) / OUT),
        width((k + IN - 1) / IN),
        blocks(height * width),
        tiles(g, 128, 512, 8, [&](const Tiles& t) {
          return 4 * (t.rows * n + t.pixels * groups * k) <= tile_bytes &&
                 4 * (t.rows * OUT + t.pixels * IN) <= panel_bytes;
        }) {
    g_floats = height * OUT * tiles.rows;
    x_floats = groups * width * IN * tiles.pixels;
    sums_floats = tiles.count > 1 ? (blocks + probes) * g.taps * OUT * IN : 0;
    table_bytes = Tile::bytes(tiles);
  }
};

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(const Geometry* g, int64_t groups, int64_t n, int64_t k, int64_t probes,
                                 int64_t tile_bytes, int64_t panel_bytes) {
  const Plan p(*g, groups, n, k, probes, tile_bytes, panel_bytes);
  const int64_t floats = p.g_floats + p.x_floats + p.sums_floats + 2 * (p.blocks + probes) * g->taps;
  return p.table_bytes + 4 * floats + (p.blocks + probes) * (int64_t)sizeof(Entry) + p.height + groups * p.width;
}

// x and g as `geometry` has x and y, in one phase; weight and gradient [n, k, taps], of whose rows each group has as
// many, and k inputs of its own; signals [2, blocks].
extern "C" void run(const Geometry* geometry, const x_t* g, const x_t* x, const w_t* weight, int64_t w_out,
                    int64_t w_in, int64_t w_tap, const int32_t* offsets, const int32_t* indices, const int32_t* probes,
                    int64_t probe_count, w_t* gradient, float* signals, int64_t groups, int64_t n, int64_t k,
                    int64_t tile_bytes, int64_t panel_bytes, int threads, char* scratch) {
  const Plan p(*geometry, groups, n, k, probe_count, tile_bytes, panel_bytes);
  const int64_t taps = geometry->taps;
  const Weight w = {weight, n, k, taps, {w_out, w_in, w_tap}, gradient};
  const Size size = {p.tiles.rows, p.tiles.pixels};
  Tile tile(p.tiles, scratch);
  float* const packed_g = (float*)(scratch + p.table_bytes);
  float* const packed_x = packed_g + p.g_floats;
  float* const kept = packed_x + p.x_floats;
  float* const parts = kept + p.sums_floats;  // of the signals: two for each tap of each entry
  Entry* const entries = (Entry*)(parts + 2 * (p.blocks + probe_count) * taps);
  char* const used_rows = (char*)(entries + p.blocks + probe_count);
  char* const used_columns = used_rows + p.height;
  std::memset(used_rows, 0, p.height + groups * p.width);
  int64_t count = 0;
  auto panel_of_x = [&](int64_t r, int64_t c) { return r * groups / p.height * p.width + c; };
  auto add = [&](int64_t r, int64_t c, bool written) {
    entries[count++] = {(int32_t)r, (int32_t)c, written};
    used_rows[r] = used_columns[panel_of_x(r, c)] = 1;
  };
  for (int64_t r = 0; r < p.height; ++r)
    for (int j = offsets[r]; j < offsets[r + 1]; ++j) add(r, indices[j], true);
  for (int64_t i = 0; i < probe_count; ++i)
    if (probes[i] >= 0) add(probes[i] / p.width, probes[i] % p.width, false);
  const int64_t grain = count < 4 * threads ? 1 : taps == 1 ? 2 : taps;  // all taps of a block write the same lines

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4)
    for (int64_t r = 0; r < p.height; ++r)
      clear_row(indices + offsets[r], offsets[r + 1] - offsets[r], r, p.width, w, signals, p.blocks);

    for (int64_t q = 0; q < p.tiles.count; ++q) {
#pragma omp single
      tile.set(p.tiles, q);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t m = 0; m < tile.phase->count; m += 8)
        pack_g(g, tile.phase->to, n, used_rows, m, std::min(m + 8, tile.phase->count), size.rows, packed_g);
#pragma omp for schedule(dynamic, 1)
      for (int64_t m = 0; m < tile.pixels; m += 8)
        for (int64_t group = 0; group < groups; ++group)
          pack_x(x + group * k, tile.from, k, used_columns + group * p.width, m, std::min(m + 8, tile.pixels),
                 size.pixels, packed_x + group * p.width * IN * size.pixels);
#pragma omp for schedule(dynamic, grain)
      for (int64_t i = 0; i < count * taps; ++i) {
        const Entry e = entries[i / taps];
        const int64_t t = i % taps;
        alignas(64) float local[OUT * IN];
        float* const sums = p.tiles.count > 1 ? kept + i * OUT * IN : local;
        if (q == 0) std::memset(sums, 0, sizeof local);
        product(packed_g + e.row * size.rows * OUT, packed_x + panel_of_x(e.row, e.column) * size.pixels * IN, tile,
                tile.tap_at[t], size, sums);
        if (q + 1 == p.tiles.count) finish(e, t, sums, w, parts + 2 * i, parts + 2 * i + 1);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (int64_t)entries[i].row * p.width + entries[i].column;
      for (int64_t t = 0; t < taps; ++t) {
        signals[at] += parts[2 * (i * taps + t)];
        signals[p.blocks + at] += parts[2 * (i * taps + t) + 1];
      }
    }
  }
}
"""
