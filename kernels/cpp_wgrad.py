"""C++ for the weight gradient: for each listed block and tap, a product over all rows.

The plan of one call: the products of all listed blocks stand in one line, cut into ranges as equal as can be, one for
each thread; where blocks are few, the rows are cut into slices, too. A thread takes its rows in tiles (`cpp_window`; a
linear has one tap, and its pixels are its rows) so small that the two panels of a block, its columns of both inputs,
fit the first-level cache. Blocks stand row by row or column by column: the panel of a row passes, those of a strip of
columns are kept in the second-level cache, or the other way round. What the next block's panels are packed from lies in
as many places as the tile has rows, where the hardware does not look ahead: at each of its steps the inner kernel asks
the cache for a line of it, and packs one that was asked for before. Panels and sums are the thread's own, so that no
thread waits for another. Sums are float32 until all rows are in; then they are rounded and written, together with the
block's two signals. Probed blocks take the same way without being written; all other blocks are written zero. A large
gradient is written past the caches, where that is possible: it is not read before the backward pass is over.
"""

import torch

from . import cpp_factors, cpp_vectors, cpp_window
from .cpp_wgrad_packing import PANELS
from .cpp_wgrad_results import RESULTS
from .isa import Isa, panels


def source(isa: Isa, block: tuple[int, int], x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """C++ for blocks of `block` (sides along the weight's rows and columns)."""
    strips = panels(block[1], isa)
    calls = "\n".join(
        f"  strip<v{s.lanes}, {s.vectors}, {s.first}>(g, x, tap_at, taps, rows, sums, next);" for s in strips
    )
    group = min(strip.rows for strip in strips)
    together = 3 if isa.registers == 32 else 1  # taps of a strip one vector wide
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
constexpr int TOGETHER = {together}, GROUPS_TOGETHER = {-(-block[0] * together // 24)};  // of so many taps' sums
"""
        + PANELS
        + _BODY.replace("$CALLS", calls).replace("$RESULTS", RESULTS)
    )


_BODY = """
struct Entry { int32_t row, column, written; };  // a block to compute; written: active, else probed

// Calls f(size, first row) for each of so many groups of the block's rows, with the size as a type; sizes differ by one
// at most.
template <int GROUPS, class F> INLINE void for_groups(F f) {
  constexpr int SMALL = OUT / GROUPS, LARGER = OUT % GROUPS;
  int at = 0;
  for (int i = 0; i < LARGER; ++i, at += SMALL + 1) f(std::integral_constant<int, SMALL + 1>(), at);
  for (int i = LARGER; i < GROUPS; ++i, at += SMALL) f(std::integral_constant<int, SMALL>(), at);
}

// ---- the inner kernel ----------------------------------------------------------------------------------------------

// sums[TAPS taps][ROWS rows of the block][a strip] += g^T x over `rows` rows, each with the pixels that it reads, and
// WORK of a panel to come.
template <class V, int VECTORS, int TAPS, int ROWS, Work WORK>
__attribute__((noinline)) void kernel(const packed_t* g, const packed_t* x, const int64_t* tap_at, const int64_t* at,
                                      int64_t rows, float* sums, Chunk chunk) {
  typename V::f acc[ROWS][TAPS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int t = 0; t < TAPS; ++t)
      UNROLL for (int v = 0; v < VECTORS; ++v)
        acc[i][t][v] = load<V>(sums + (t * OUT + i) * IN + v * V::lanes);
  const packed_t* of_tap[TAPS];
  UNROLL for (int t = 0; t < TAPS; ++t) of_tap[t] = x + tap_at[t];
  auto add = [&](const packed_t* g, int64_t pixel, auto next) __attribute__((always_inline)) {
    factors<V> b[TAPS][VECTORS];
    UNROLL for (int t = 0; t < TAPS; ++t) load_columns<V>(of_tap[t] + pixel, next(t), b[t]);
    UNROLL for (int i = 0; i < ROWS; ++i) {
      const factors<V> a = broadcast<V>(g + i * DEPTH);
      UNROLL for (int t = 0; t < TAPS; ++t)
        UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][t][v] = multiply_add<V>(acc[i][t][v], a, b[t][v]);
    }
  };
  // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
  int64_t m = 0;
  UNROLL_TWICE for (; m + DEPTH <= rows; m += DEPTH, g += DEPTH * OUT) {
    chunk.step<WORK>(m);
    add(g, at[m], [&](int t) { return of_tap[t] + at[m + DEPTH - 1]; });
  }
  static const packed_t zeros[IN] = {};
  if (m < rows) add(g, at[m], [&](int) { return zeros; });
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int t = 0; t < TAPS; ++t)
      UNROLL for (int v = 0; v < VECTORS; ++v) store<V>(sums + (t * OUT + i) * IN + v * V::lanes, acc[i][t][v]);
}

template <class V, int VECTORS, int TAPS, int GROUPS>
void some_taps(const packed_t* g, const packed_t* x, const int64_t* tap_at, const Rows& rows, float* sums,
               Next& next) {
  for_groups<GROUPS>([&](auto group, int at) {
    constexpr int ROWS = decltype(group)::value;
    Chunk chunk;
    const auto add = [&](auto work) {
      kernel<V, VECTORS, TAPS, ROWS, decltype(work)::value>(g + at * DEPTH, x, tap_at, rows.at, rows.count,
                                                            sums + at * IN, chunk);
    };
    switch (next.take(rows.count, chunk)) {
      case NOTHING: return add(does<NOTHING>());
      case ASK: return add(does<ASK>());
      case PACK_G: return add(does<PACK_G>());
      case PACK_X: return add(does<DEPTH == 1 && OUT == IN ? PACK_G : PACK_X>());
    }
  });
}

// A strip of the block's columns, from column AT on. One tap after another needs a load for each multiply-add where the
// strip is one vector wide; several at a time share those of g.
template <class V, int VECTORS, int AT>
void strip(const packed_t* g, const packed_t* x, const int64_t* tap_at, int64_t taps, const Rows& rows, float* sums,
           Next& next) {
  int64_t t = 0;
  if constexpr (VECTORS == 1 && TOGETHER > 1)
    for (; t + TOGETHER <= taps; t += TOGETHER)
      some_taps<V, 1, TOGETHER, GROUPS_TOGETHER>(g, x + AT, tap_at + t, rows, sums + t * OUT * IN + AT, next);
  for (; t < taps; ++t) some_taps<V, VECTORS, 1, GROUPS>(g, x + AT, tap_at + t, rows, sums + t * OUT * IN + AT, next);
}

// Adds the products of a panel of g and the pixels of a panel of x, for so many taps of a block, to its sums.
void products(const packed_t* g, const packed_t* x, const int64_t* tap_at, int64_t taps, const Rows& rows, float* sums,
              Next& next) {
$CALLS
}
$RESULTS
// ---- the plan ------------------------------------------------------------------------------------------------------

constexpr int64_t BLOCK_BYTES = 4 * OUT * IN;
constexpr int64_t PACE = 3 * DEPTH;  // multiply-adds that take as long as packing a byte, about

// Of the orders and cuts the one that takes the least time, as far as products and packed bytes tell.
struct Plan {
  int64_t groups, height, width, taps;  // of the weight: rows of all groups, columns of one, in blocks
  int64_t entries;                      // listed and probed, at most
  Tiles tiles;
  int64_t g_size, x_size;  // of panels, in entries
  bool by_rows = true;     // rows pass, within strips of columns; else columns, within strips of rows
  int64_t kept = 1;        // blocks across a strip
  int64_t ranges = 1, slices = 1;

  Plan(const Geometry& g, int64_t groups, int64_t n, int64_t k, int64_t entries, int64_t first_bytes,
       int64_t second_bytes, int threads)
      : groups(groups),
        height((n + OUT - 1) / OUT),
        width((k + IN - 1) / IN),
        taps(g.taps),
        entries(entries),
        tiles(g, 128, 512, 8, [&](const Tiles& t) { return bytes(t.rows * OUT + t.pixels * IN) <= first_bytes; }),
        g_size(in_lines((tiles.rows + DEPTH - 1) / DEPTH * DEPTH * OUT)),
        x_size(in_lines(tiles.pixels * IN)) {
    double least = -1;
    for (const bool rows : {true, false}) {
      if (!rows && groups > 1) continue;  // each group has other columns
      const int64_t across = rows ? width : height;
      for (int64_t side = across, smaller; side > 0; side = smaller) {
        smaller = side > 1 ? (side + 1) / 2 : 0;
        if (smaller && side * bytes(rows ? x_size : g_size) > second_bytes) continue;
        const int64_t most = std::min<int64_t>(threads, tiles.count);
        for (int64_t s = 1, more = 1; more; s = more) {
          more = s < most ? std::min(2 * s, most) : 0;
          const int64_t r = std::max<int64_t>(1, std::min(threads / s, entries * taps));
          const double taken = time(rows, side, r, s, threads);
          if (least >= 0 && taken >= least) continue;
          least = taken;
          by_rows = rows, kept = side, ranges = r, slices = s;
        }
      }
    }
  }

  // Of the thread that has most to do, in packed bytes.
  double time(bool rows, int64_t side, int64_t r, int64_t s, int64_t threads) const {
    const int64_t passing = rows ? height : width, across = rows ? width : height, strips = (across + side - 1) / side;
    const int64_t pass = std::min(passing * strips, entries);
    const int64_t keep = std::min(across * std::max(groups, r / strips), entries);
    const double packed = pass * bytes(rows ? g_size : x_size) + keep * bytes(rows ? x_size : g_size);
    const double multiplied = (entries * taps + r - 1) / r * (OUT * IN * tiles.rows / PACE);
    const double joined = s > 1 ? (s + 1.0) * entries * taps * BLOCK_BYTES / std::min(threads, entries) : 0;
    return (tiles.count + s - 1) / s * (multiplied + packed / r) + joined;
  }

  int64_t g_slots() const { return by_rows ? 1 : kept; }
  int64_t x_slots() const { return by_rows ? kept : 1; }

  // Whether a stands before b.
  bool in_order(const Entry& a, const Entry& b) const {
    const int64_t passes[] = {by_rows ? a.row : a.column, by_rows ? b.row : b.column};
    const int64_t stays[] = {by_rows ? a.column : a.row, by_rows ? b.column : b.row};
    const int64_t strips[] = {stays[0] / kept, stays[1] / kept};
    if (strips[0] != strips[1]) return strips[0] < strips[1];
    return passes[0] != passes[1] ? passes[0] < passes[1] : stays[0] < stays[1];
  }

  static int64_t bytes(int64_t packed) { return sizeof(packed_t) * packed; }
  static int64_t in_lines(int64_t packed) { return (packed + 31) / 32 * 32; }
};

// Where in the scratch things lie.
struct Memory {
  int64_t bytes = 0;
  int64_t tiles, tables, entries, parts, sums, own, panels;  // own: bytes of panels of each thread

  Memory(const Plan& p, int threads)
      : tiles(take(p.tiles.count * (int64_t)sizeof(Tile))),
        tables(take(p.tiles.count * Tile::bytes(p.tiles))),
        entries(take(p.entries * (int64_t)sizeof(Entry))),
        parts(take(p.entries * p.taps * 2 * (int64_t)sizeof(float))),
        sums(take(p.slices * p.entries * p.taps * BLOCK_BYTES)),
        own(rounded(bytes_of_g(p) + PanelsOfX::bytes(p.x_size, p.x_slots()))),
        panels(take(threads * own)) {}

  static int64_t bytes_of_g(const Plan& p) { return PanelsOfG::bytes(p.g_size, p.g_slots()); }

  static int64_t rounded(int64_t size) { return (size + 63) / 64 * 64; }

  int64_t take(int64_t size) {
    bytes += rounded(size);
    return bytes - rounded(size);
  }
};

// What is the same for all tasks.
struct Call {
  const Plan& p;
  const x_t *g, *x;
  int64_t n, k;
  Weight weight;
  const Entry* entries;
  int64_t count;  // of entries
  const Tile* tiles;
  float* sums;   // [slice][entry][tap][OUT][IN]
  float* parts;  // [entry][tap][2], of the signals
  bool whole = p.tiles.g.inside();

  Source g_of(const Entry& e, int64_t tile) const {
    const Rows& rows = *tiles[tile].phase;
    return {tile, e.row, g + e.row * OUT, std::min<int64_t>(OUT, n - e.row * OUT), rows.to, rows.count, true};
  }

  Source x_of(const Entry& e, int64_t tile) const {
    const int64_t group = e.row / (p.height / p.groups), first = e.column * IN, block = group * p.width + e.column;
    const Tile& of = tiles[tile];
    return {tile, block, x + group * k + first, std::min<int64_t>(IN, k - first), of.from, of.pixels, whole};
  }
};

// Makes a range of the products for a slice of the rows, in memory of the thread's own.
void work(const Call& c, int64_t task, char* memory) {
  const Plan& p = c.p;
  const int64_t taps = p.taps, range = task / p.slices, slice = task % p.slices;
  const int64_t begin = part(c.count * taps, p.ranges, range), end = part(c.count * taps, p.ranges, range + 1);
  const int64_t first = part(p.tiles.count, p.slices, slice), last = part(p.tiles.count, p.slices, slice + 1);
  PanelsOfG packed_g(p.g_size, p.g_slots(), memory);
  PanelsOfX packed_x(p.x_size, p.x_slots(), memory + Memory::bytes_of_g(p));
  for (int64_t q = first; q < last; ++q) {
    const Tile& tile = c.tiles[q];
    const Rows& rows = *tile.phase;
    for (int64_t i = begin, count; i < end; i += count) {
      const int64_t tap = i % taps;
      count = std::min(taps - tap, end - i);  // of the block's products
      const Entry& e = c.entries[i / taps];
      const packed_t* const g = packed_g.get(c.g_of(e, q));
      const packed_t* const x = packed_x.get(c.x_of(e, q));
      const bool again = i + count == end;  // the next block is the next tile's first
      if (q + again < last) {
        const Entry& then = c.entries[(again ? begin : i + count) / taps];
        packed_g.expect(c.g_of(then, q + again));
        packed_x.expect(c.x_of(then, q + again));
      }
      Next next = {packed_g, packed_x};
      float* const sums = c.sums + (slice * c.count * taps + i) * OUT * IN;
      if (q == first) std::memset(sums, 0, count * BLOCK_BYTES);
      const bool finished = p.slices == 1 && q + 1 == last;
      if (finished) expect(e, c.weight);
      products(g, x, tile.tap_at + tap, count, rows, sums, next);
      if (finished) finish(e, tap, count, sums, c.weight, c.parts + 2 * i);
    }
  }
}

// Adds up what the slices have for block i, in their order.
void join(const Call& c, int64_t i) {
  const int64_t taps = c.p.taps, size = taps * OUT * IN;
  float* const sums = c.sums + i * size;
  for (int64_t s = 1; s < c.p.slices; ++s)
    for (int64_t j = 0; j < size; ++j) sums[j] += sums[s * c.count * size + j];
  finish(c.entries[i], 0, taps, sums, c.weight, c.parts + 2 * i * taps);
}

struct Lists { const int32_t *offsets, *indices; };

// Puts what is active, and what is probed, in the plan's order; returns how many there are.
int64_t set_entries(const Plan& p, const Lists& rows, const Lists& columns, const int32_t* probes, int64_t probe_count,
                    Entry* entries) {
  const Lists& lists = p.by_rows ? rows : columns;
  const int64_t passing = p.by_rows ? p.height : p.width, across = p.by_rows ? p.width : p.height;
  Entry* end = entries;
  for (int64_t strip = 0; strip < across; strip += p.kept)
    for (int64_t i = 0; i < passing; ++i) {
      const int32_t *const last = lists.indices + lists.offsets[i + 1];
      const int32_t* j = std::lower_bound(lists.indices + lists.offsets[i], last, strip);
      for (; j < last && *j < strip + p.kept; ++j)
        *end++ = p.by_rows ? Entry{(int32_t)i, *j, true} : Entry{*j, (int32_t)i, true};
    }
  Entry* const probed = end;
  for (int64_t i = 0; i < probe_count; ++i)
    if (probes[i] >= 0) *end++ = {(int32_t)(probes[i] / p.width), (int32_t)(probes[i] % p.width), false};
  const auto in_order = [&](const Entry& a, const Entry& b) { return p.in_order(a, b); };
  std::sort(probed, end, in_order);
  std::inplace_merge(entries, probed, end, in_order);
  return end - entries;
}

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(const Geometry* g, int64_t groups, int64_t n, int64_t k, int64_t entries,
                                 int64_t first_bytes, int64_t second_bytes, int threads) {
  const Plan p(*g, groups, n, k, entries, first_bytes, second_bytes, threads);
  return Memory(p, threads).bytes;
}

// x and g as `geometry` has x and y, in one phase; weight and gradient [n, k, taps], of whose rows each group has as
// many, and k inputs of its own; signals [2, blocks]. At most `entries` blocks are listed, by rows and by columns, and
// probed; the panels of a block shall take no more than `first_bytes`, those of a strip no more than `second_bytes`.
extern "C" void run(const Geometry* geometry, const x_t* g, const x_t* x, const w_t* weight, int64_t w_out,
                    int64_t w_in, int64_t w_tap, const int32_t* offsets, const int32_t* indices,
                    const int32_t* column_offsets, const int32_t* column_indices, const int32_t* probes,
                    int64_t probe_count, w_t* gradient, float* signals, int64_t groups, int64_t n, int64_t k,
                    int64_t entries, int64_t first_bytes, int64_t second_bytes, int threads, char* scratch) {
  const Plan p(*geometry, groups, n, k, entries, first_bytes, second_bytes, threads);
  const Memory memory(p, threads);
  const int64_t taps = p.taps, blocks = p.height * p.width;
  Tile* const tiles = (Tile*)(scratch + memory.tiles);
  Entry* const list = (Entry*)(scratch + memory.entries);
  const int64_t count = set_entries(p, {offsets, indices}, {column_offsets, column_indices}, probes, probe_count, list);
  const bool large = n * k * taps * (int64_t)sizeof(w_t) > 2 * second_bytes;
  const Call c = {p, g, x, n, k, {weight, n, k, taps, {w_out, w_in, w_tap}, gradient, large}, list, count, tiles,
                  (float*)(scratch + memory.sums), (float*)(scratch + memory.parts)};

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t r = 0; r < p.height; ++r)
      clear_row(indices + offsets[r], offsets[r + 1] - offsets[r], r, p.width, c.weight, signals, blocks);
#pragma omp for schedule(static)
    for (int64_t q = 0; q < p.tiles.count; ++q)
      (new (tiles + q) Tile(p.tiles, scratch + memory.tables + q * Tile::bytes(p.tiles)))->set(p.tiles, q, IN);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < p.ranges * p.slices; ++i)
      work(c, i, scratch + memory.panels + omp_get_thread_num() * memory.own);
    if (p.slices > 1) {  // block by block: the taps of one lie side by side in the gradient, in the same lines
#pragma omp for schedule(static)
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
    streamed();
  }
}
"""
