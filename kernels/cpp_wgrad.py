"""C++ for the weight gradient: for each listed block and tap, a product over all rows.

The plan of one call: a task is a chunk of the weight's grid, for a slice of the rows. Its thread takes the rows in
tiles (`cpp_window`; a linear has one tap, and its pixels are its rows) so small that the two panels of a block fit the
first-level cache: it packs the chunk's columns of both inputs, by blocks, and multiplies the two panels of each listed
block, once for each tap. Panels and sums are the thread's own, so that no thread waits for another, and chunks are as
large as leaves both in the second-level cache, since each packs its columns anew. Sums are float32 until all rows are
in; then they are rounded and written, together with the block's two signals. Probed blocks take the same way without
being written; all other blocks are written zero.
"""

import torch

from . import cpp_factors, cpp_vectors, cpp_window
from .cpp_wgrad_packing import PACKING
from .isa import Isa, panels


def source(isa: Isa, block: tuple[int, int], x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """C++ for blocks of `block` (sides along the weight's rows and columns)."""
    strips = panels(block[1], isa)
    calls = "\n".join(f"  strip<v{s.lanes}, {s.vectors}, {s.first}>(g, x, rows, sums);" for s in strips)
    group = min(strip.rows for strip in strips)
    pack = "pack_in_pairs" if cpp_factors.takes_pairs(isa, x_dtype) else "pack"
    what = f"{block[0]} x {block[1]} blocks (output x input columns), {x_dtype} x {weight_dtype}"
    return (
        cpp_vectors.prelude(f"Block-sparse weight gradient: {what}", isa)
        + cpp_factors.source(isa, x_dtype)
        + cpp_window.GEOMETRY
        + f"""
typedef {cpp_vectors.SCALARS[str(x_dtype)]} x_t;
typedef {cpp_vectors.SCALARS[str(weight_dtype)]} w_t;
constexpr int OUT = {block[0]}, IN = {block[1]};
constexpr int GROUPS = {-(-block[0] // group)};  // of the block's rows, whose sums stay in registers
"""
        + PACKING
        + _BODY.replace("$CALLS", calls).replace("$PACK", pack)
    )


_BODY = """
struct Entry { int32_t row, column, written; };  // a block to compute; written: active, else probed

// Calls f(size, first row) for each group of the block's rows, with the size as a type; they differ by one at most.
template <class F> INLINE void for_groups(F f) {
  constexpr int SMALL = OUT / GROUPS, LARGER = OUT % GROUPS;
  int at = 0;
  for (int i = 0; i < LARGER; ++i, at += SMALL + 1) f(std::integral_constant<int, SMALL + 1>(), at);
  for (int i = LARGER; i < GROUPS; ++i, at += SMALL) f(std::integral_constant<int, SMALL>(), at);
}

// ---- the inner kernel ----------------------------------------------------------------------------------------------

// sums[ROWS rows of the block][a strip] += g^T x over `rows` rows, each with the pixel that it reads.
template <class V, int VECTORS, int ROWS>
__attribute__((noinline)) void kernel(const packed_t* g, const packed_t* x, const int64_t* at, int64_t rows,
                                      float* sums) {
  typename V::f acc[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = load<V>(sums + i * IN + v * V::lanes);
  auto add = [&](const packed_t* g, const packed_t* pixel, const packed_t* next) __attribute__((always_inline)) {
    factors<V> b[VECTORS];
    load_columns<V>(pixel, next, b);
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = multiply_add<V>(acc[i][v], g + i * DEPTH, b[v]);
  };
  // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
  int64_t m = 0;
  UNROLL_TWICE for (; m + DEPTH <= rows; m += DEPTH, g += DEPTH * OUT) add(g, x + at[m], x + at[m + DEPTH - 1]);
  static const packed_t zeros[IN] = {};
  if (m < rows) add(g, x + at[m], zeros);
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) store<V>(sums + i * IN + v * V::lanes, acc[i][v]);
}

// A strip of the block's columns, from column AT on.
template <class V, int VECTORS, int AT>
void strip(const packed_t* g, const packed_t* x, const Rows& rows, float* sums) {
  for_groups([&](auto group, int at) {
    kernel<V, VECTORS, decltype(group)::value>(g + at * DEPTH, x + AT, rows.at, rows.count, sums + at * IN + AT);
  });
}

// Adds the product of a panel of g and the pixels of a panel of x, from that of the first row's tap on, to the block's
// sums.
void product(const packed_t* g, const packed_t* x, const Rows& rows, float* sums) {
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

constexpr int64_t BLOCK_BYTES = 4 * OUT * IN;
constexpr int64_t AT_ONCE = 32;  // rows that are packed together, an even number; fewer were slower

// The grid is cut into chunks, each group's alike, and the rows into slices, so that all threads have tasks enough; of
// the cuts that give as many, into that which moves the fewest bytes: what is packed for each chunk, and the sums,
// where they do not stay in the cache, or where slices are joined.
struct Plan {
  int64_t height, width, entries;  // of the weight's grid; how many blocks are listed and probed at most
  Tiles tiles;
  int64_t rows = 0, columns = 0;             // blocks of a chunk
  int64_t down = 0, across = 0, slices = 0;  // chunks of a group; slices of the rows
  int64_t chunks = 0, tasks = 0;
  int64_t panel_rows, g_size = 0, x_size = 0;  // of the panels, in entries

  Plan(const Geometry& g, int64_t groups, int64_t n, int64_t k, int64_t entries, int64_t first_bytes,
       int64_t second_bytes, int threads)
      : height((n + OUT - 1) / OUT),
        width((k + IN - 1) / IN),
        entries(entries),
        tiles(g, 128, 512, 8, [&](const Tiles& t) { return bytes(t.rows * OUT + t.pixels * IN) <= first_bytes; }),
        panel_rows((tiles.rows + DEPTH - 1) / DEPTH * DEPTH) {
    const int64_t wanted = threads > 1 ? 4 * threads : 1, all_sums = entries * g.taps * BLOCK_BYTES;
    const int64_t group_height = height / groups, g_bytes = bytes(panel_rows * OUT), x_bytes = bytes(tiles.pixels * IN);
    int64_t most = 0, least = 0;  // of tasks, up to those wanted; of bytes
    for (int64_t r = group_height, next_r; r > 0; r = next_r) {
      next_r = r > 1 ? (r + 1) / 2 : 0;
      for (int64_t c = width, next_c; c > 0; c = next_c) {
        next_c = c > 1 ? (c + 1) / 2 : 0;
        const int64_t d = (group_height + r - 1) / r, a = (width + c - 1) / c, cut = groups * d * a;
        const int64_t s = std::max<int64_t>(1, std::min((wanted + cut - 1) / cut, tiles.count));
        int64_t moved = tiles.count * groups * (group_height * g_bytes * a + width * x_bytes * d);
        if (r * g_bytes + c * x_bytes + all_sums / cut > second_bytes) moved += 2 * tiles.count * all_sums;
        if (s > 1) moved += 2 * s * all_sums;
        const int64_t enough = std::min(cut * s, wanted);
        if (enough > most || (enough == most && moved < least)) {
          most = enough, least = moved;
          rows = r, columns = c, down = d, across = a, slices = s;
        }
      }
    }
    chunks = groups * down * across;
    tasks = chunks * slices;
    g_size = (rows * OUT * panel_rows + 31) / 32 * 32;  // whole cache lines
    x_size = columns * IN * tiles.pixels;
  }

  static int64_t bytes(int64_t packed) { return sizeof(packed_t) * packed; }
};

// What is the same for all tasks.
struct Call {
  const Plan& p;
  const x_t *g, *x;
  int64_t n, k, groups, taps;
  Weight weight;
  const Entry* entries;  // chunk by chunk
  const int64_t* begin;  // of each chunk
  const Tile* tiles;
  float* sums;   // [slice][entry][tap][OUT][IN]
  float* parts;  // [entry][tap][2], of the signals
};

// Multiplies the entries of a chunk for a slice of the rows; `panels` has room for a tile of both inputs, and for which
// of their columns are used.
void work(const Call& c, int64_t task, packed_t* panels) {
  const Plan& p = c.p;
  const int64_t chunk = task / p.slices, slice = task % p.slices, taps = c.taps;
  const int64_t first_entry = c.begin[chunk], last_entry = c.begin[chunk + 1];
  if (first_entry == last_entry) return;
  const int64_t group = chunk / (p.down * p.across), group_rows = p.height / c.groups;
  const int64_t row = group * group_rows + chunk / p.across % p.down * p.rows, column = chunk % p.across * p.columns;
  const int64_t rows = std::min((group + 1) * group_rows - row, p.rows);
  const int64_t columns = std::min(p.width - column, p.columns);
  const x_t *const g = c.g + row * OUT, *const x = c.x + group * c.k + column * IN;
  packed_t *const packed_g = panels, *const packed_x = panels + p.g_size;
  char *const used_rows = (char*)(packed_x + p.x_size), *const used_columns = used_rows + p.rows;
  std::memset(used_rows, 0, p.rows + p.columns);
  for (int64_t i = first_entry; i < last_entry; ++i)
    used_rows[c.entries[i].row - row] = used_columns[c.entries[i].column - column] = 1;
  const int64_t first = part(p.tiles.count, p.slices, slice), last = part(p.tiles.count, p.slices, slice + 1);
  for (int64_t q = first; q < last; ++q) {
    const Tile& tile = c.tiles[q];
    for (int64_t m = 0; m < tile.phase->count; m += AT_ONCE)
      $PACK<OUT>(g, tile.phase->to, c.n - row * OUT, rows, used_rows, m, std::min(m + AT_ONCE, tile.phase->count),
                 p.panel_rows, packed_g);
    for (int64_t m = 0; m < tile.pixels; m += AT_ONCE)
      pack<IN>(x, tile.from, c.k - column * IN, columns, used_columns, m, std::min(m + AT_ONCE, tile.pixels),
               p.tiles.pixels, packed_x);
    for (int64_t i = first_entry; i < last_entry; ++i) {
      const Entry& e = c.entries[i];
      for (int64_t t = 0; t < taps; ++t) {
        float* const sums = c.sums + ((slice * p.entries + i) * taps + t) * OUT * IN;
        if (q == first) std::memset(sums, 0, BLOCK_BYTES);
        product(packed_g + (e.row - row) * p.panel_rows * OUT,
                packed_x + (e.column - column) * p.tiles.pixels * IN + tile.tap_at[t], *tile.phase, sums);
        float* const signals = c.parts + 2 * (i * taps + t);
        if (p.slices == 1 && q + 1 == last) finish(e, t, sums, c.weight, signals, signals + 1);
      }
    }
  }
}

// Adds what the slices have for an entry, in their order.
void join(const Call& c, int64_t i) {
  const int64_t taps = c.taps;
  for (int64_t t = 0; t < taps; ++t) {
    float* const sums = c.sums + (i * taps + t) * OUT * IN;
    for (int64_t s = 1; s < c.p.slices; ++s) {
      const float* const others = sums + s * c.p.entries * taps * OUT * IN;
      for (int64_t j = 0; j < OUT * IN; ++j) sums[j] += others[j];
    }
    float* const signals = c.parts + 2 * (i * taps + t);
    finish(c.entries[i], t, sums, c.weight, signals, signals + 1);
  }
}

// Sorts what is listed, and what is probed, by chunks.
void set_entries(const Plan& p, int64_t groups, const int32_t* offsets, const int32_t* indices, const int32_t* probes,
                 int64_t probe_count, Entry* entries, int64_t* begin) {
  const int64_t group_rows = p.height / groups;
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    begin[chunk] = count;
    const int64_t group = chunk / (p.down * p.across);
    const int64_t top = group * group_rows + chunk / p.across % p.down * p.rows;
    const int64_t bottom = std::min(top + p.rows, (group + 1) * group_rows);
    const int64_t left = chunk % p.across * p.columns, right = std::min(left + p.columns, p.width);
    for (int64_t r = top; r < bottom; ++r) {
      const int32_t *const end = indices + offsets[r + 1], *c = std::lower_bound(indices + offsets[r], end, left);
      for (; c < end && *c < right; ++c) entries[count++] = {(int32_t)r, *c, true};
    }
    for (int64_t i = 0; i < probe_count; ++i) {
      const int64_t r = probes[i] / p.width, c = probes[i] % p.width;
      if (probes[i] >= 0 && top <= r && r < bottom && left <= c && c < right)
        entries[count++] = {(int32_t)r, (int32_t)c, false};
    }
  }
  begin[p.chunks] = count;
}

// Where in the scratch things lie.
struct Memory {
  int64_t bytes = 0;
  int64_t tiles, tables, begin, entries, parts, sums, panel_bytes, panels;

  Memory(const Plan& p, int64_t taps, int threads)
      : tiles(take(p.tiles.count * (int64_t)sizeof(Tile))),
        tables(take(p.tiles.count * Tile::bytes(p.tiles))),
        begin(take((p.chunks + 1) * (int64_t)sizeof(int64_t))),
        entries(take(p.entries * (int64_t)sizeof(Entry))),
        parts(take(p.entries * taps * 2 * (int64_t)sizeof(float))),
        sums(take(p.slices * p.entries * taps * BLOCK_BYTES)),
        panel_bytes(rounded(p.bytes(p.g_size + p.x_size) + p.rows + p.columns)),
        panels(take(threads * panel_bytes)) {}

  static int64_t rounded(int64_t size) { return (size + 63) / 64 * 64; }

  int64_t take(int64_t size) {
    bytes += rounded(size);
    return bytes - rounded(size);
  }
};

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(const Geometry* g, int64_t groups, int64_t n, int64_t k, int64_t entries,
                                 int64_t first_bytes, int64_t second_bytes, int threads) {
  const Plan p(*g, groups, n, k, entries, first_bytes, second_bytes, threads);
  return Memory(p, g->taps, threads).bytes;
}

// x and g as `geometry` has x and y, in one phase; weight and gradient [n, k, taps], of whose rows each group has as
// many, and k inputs of its own; signals [2, blocks]. At most `entries` blocks are listed and probed; the panels of a
// block shall take no more than `first_bytes`, all that a task works on no more than `second_bytes`.
extern "C" void run(const Geometry* geometry, const x_t* g, const x_t* x, const w_t* weight, int64_t w_out,
                    int64_t w_in, int64_t w_tap, const int32_t* offsets, const int32_t* indices, const int32_t* probes,
                    int64_t probe_count, w_t* gradient, float* signals, int64_t groups, int64_t n, int64_t k,
                    int64_t entries, int64_t first_bytes, int64_t second_bytes, int threads, char* scratch) {
  const Plan p(*geometry, groups, n, k, entries, first_bytes, second_bytes, threads);
  const Memory memory(p, geometry->taps, threads);
  const int64_t taps = geometry->taps, blocks = p.height * p.width;
  Tile* const tiles = (Tile*)(scratch + memory.tiles);
  Entry* const list = (Entry*)(scratch + memory.entries);
  int64_t* const begin = (int64_t*)(scratch + memory.begin);
  const Call c = {p, g, x, n, k, groups, taps, {weight, n, k, taps, {w_out, w_in, w_tap}, gradient}, list, begin, tiles,
                  (float*)(scratch + memory.sums), (float*)(scratch + memory.parts)};
  set_entries(p, groups, offsets, indices, probes, probe_count, list, begin);
  const int64_t count = begin[p.chunks];

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t r = 0; r < p.height; ++r)
      clear_row(indices + offsets[r], offsets[r + 1] - offsets[r], r, p.width, c.weight, signals, blocks);
#pragma omp for schedule(static)
    for (int64_t q = 0; q < p.tiles.count; ++q)
      (new (tiles + q) Tile(p.tiles, scratch + memory.tables + q * Tile::bytes(p.tiles)))->set(p.tiles, q, IN);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < p.tasks; ++i)
      work(c, i, (packed_t*)(scratch + memory.panels + omp_get_thread_num() * memory.panel_bytes));
    if (p.slices > 1) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) join(c, i);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (int64_t)list[i].row * p.width + list[i].column;
      for (int64_t t = 0; t < taps; ++t) {
        signals[at] += c.parts[2 * (i * taps + t)];
        signals[blocks + at] += c.parts[2 * (i * taps + t) + 1];
      }
    }
  }
}
"""
