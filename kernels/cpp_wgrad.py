"""C++ for the weight gradient: for each listed block, a product over all rows of x and of the output's gradient.

The plan of one call: rows are taken in chunks that fit the caches; a chunk of both inputs is packed by columns of
blocks; then every listed block multiplies its two panels. Its sums are kept in float32 from chunk to chunk, in a buffer
of their own; the last chunk rounds and writes them, together with the block's two signals. Probed blocks take the same
way without being written; all other blocks are written zero.
"""

import torch

from . import cpp_vectors
from .isa import Isa, panels


def source(isa: Isa, block: tuple[int, int], x_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """C++ for blocks of `block` (sides along the weight's rows and columns)."""
    strips = panels(block[1], isa)
    calls = "\n".join(f"  strip<v{s.lanes}, {s.vectors}, {s.first}>(g, x, rows, chunk, sums);" for s in strips)
    group = min(strip.rows for strip in strips)
    copies = "\n".join(
        f"    for (int64_t m = first; m < last; ++m)\n"
        f"      copy<{s.width}>(from + m * stride + {s.first}, k - b * IN - {s.first}, "
        f"to + {s.first} * chunk + m * {s.width});"
        for s in strips
    )
    return (
        f"// Block-sparse linear, weight gradient: {block[0]} x {block[1]} blocks (output x input columns), "
        f"{x_dtype} x {weight_dtype}, {isa.name}.\n"
        "// Generated; kept beside the library for whoever wants to read it.\n"
        + cpp_vectors.prelude(isa)
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

// Calls f(size, first row) for each group of the block's rows, with the size as a type; they differ by one at most.
template <class F> INLINE void for_groups(F f) {
  constexpr int SMALL = OUT / GROUPS, LARGER = OUT % GROUPS;
  int at = 0;
  for (int i = 0; i < LARGER; ++i, at += SMALL + 1) f(std::integral_constant<int, SMALL + 1>(), at);
  for (int i = LARGER; i < GROUPS; ++i, at += SMALL) f(std::integral_constant<int, SMALL>(), at);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// WIDTH columns of one row as float32; zero from `size` on.
template <int WIDTH> INLINE void copy(const x_t* from, int64_t size, float* to) {
  typedef typename std::conditional<(WIDTH < Narrow::lanes), v4, Narrow>::type V;
  if (size >= WIDTH) {
    UNROLL for (int i = 0; i < WIDTH; i += V::lanes) {
      const int at = std::min(i, WIDTH - V::lanes);  // the last vector overlaps the one before
      store<V>(to + at, load<V>(from + at));
    }
  } else {
    for (int i = 0; i < WIDTH; ++i) to[i] = i < size ? to_float(from[i]) : 0.0f;
  }
}

// Rows [first, last) of a chunk, for the blocks of columns that are used; `from` and `to` begin with the chunk. A few
// rows at a time and block by block: reads then follow as many streams as there are rows, and writes are one.

// g [rows, n] to [block][group of columns][row of the chunk][column of the group].
void pack_g(const x_t* from, int64_t stride, int64_t n, const char* used, int64_t first, int64_t last, int64_t chunk,
            float* to) {
  for (int64_t b = 0; b * OUT < n; ++b, from += OUT, to += chunk * OUT) {
    if (!used[b]) continue;
    for_groups([&](auto size, int at) {
      constexpr int SIZE = decltype(size)::value;
      for (int64_t m = first; m < last; ++m)
        copy<SIZE>(from + m * stride + at, n - b * OUT - at, to + at * chunk + m * SIZE);
    });
  }
}

// x [rows, k] to [block][strip][row of the chunk][column].
void pack_x(const x_t* from, int64_t stride, int64_t k, const char* used, int64_t first, int64_t last, int64_t chunk,
            float* to) {
  for (int64_t b = 0; b * IN < k; ++b, from += IN, to += chunk * IN) {
    if (!used[b]) continue;
$COPIES
  }
}

// ---- the inner kernel ----------------------------------------------------------------------------------------------

// sums[ROWS rows of the block][a strip] += g^T x over `rows` rows.
template <class V, int VECTORS, int ROWS>
__attribute__((noinline)) void kernel(const float* g, const float* x, int64_t rows, float* sums) {
  constexpr int WIDTH = VECTORS * V::lanes;
  typename V::f acc[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] = load<V>(sums + i * IN + v * V::lanes);
  // Twice, not more: instructions whose offsets fit a byte are fetched as fast as they execute.
  UNROLL_TWICE for (int64_t m = 0; m < rows; ++m, g += ROWS, x += WIDTH) {
    typename V::f b[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<V>(x + v * V::lanes);
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int v = 0; v < VECTORS; ++v) acc[i][v] += g[i] * b[v];
  }
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int v = 0; v < VECTORS; ++v) store<V>(sums + i * IN + v * V::lanes, acc[i][v]);
}

// A strip of the block's columns, from column AT on.
template <class V, int VECTORS, int AT>
void strip(const float* g, const float* x, int64_t rows, int64_t chunk, float* sums) {
  for_groups([&](auto size, int at) {
    constexpr int SIZE = decltype(size)::value;
    kernel<V, VECTORS, SIZE>(g + at * chunk, x + AT * chunk, rows, sums + at * IN + AT);
  });
}

// Adds the product of two panels of `rows` rows to the block's sums.
void product(const float* g, const float* x, int64_t rows, int64_t chunk, float* sums) {
$CALLS
}

// ---- what becomes of the sums --------------------------------------------------------------------------------------

// Writes an active block's gradient; both signals of a block come from the sums before they are rounded.
void finish(const Entry& e, const float* sums, const w_t* weight, int64_t weight_stride, w_t* gradient, int64_t n,
            int64_t k, float* times_weight, float* squared) {
  const int64_t r = (int64_t)e.row * OUT, c = (int64_t)e.column * IN;
  const int height = std::min<int64_t>(OUT, n - r), width = std::min<int64_t>(IN, k - c);
  Narrow::f products = {}, squares = {};
  float product_tail = 0, square_tail = 0;
  for (int i = 0; i < height; ++i, sums += IN) {
    const w_t* w = weight + (r + i) * weight_stride + c;
    w_t* out = gradient + (r + i) * k + c;
    int j = 0;
    for (; j + Narrow::lanes <= width; j += Narrow::lanes) {
      const Narrow::f g = load<Narrow>(sums + j);
      squares += g * g;
      if (e.written) {
        products += g * load<Narrow>(w + j);
        store<Narrow>(out + j, g);
      }
    }
    for (; j < width; ++j) {
      square_tail += sums[j] * sums[j];
      if (e.written) {
        product_tail += sums[j] * to_float(w[j]);
        round_to(out + j, sums[j]);
      }
    }
  }
  *squared = sum<Narrow>(squares) + square_tail;
  *times_weight = sum<Narrow>(products) + product_tail;
}

// Zeroes the blocks of block row r that the list leaves out, and their signals.
void clear_row(const int32_t* list, int length, int64_t r, int64_t columns, w_t* gradient, int64_t n, int64_t k,
               float* signals, int64_t blocks) {
  const int64_t height = std::min<int64_t>(OUT, n - r * OUT);
  for (int64_t c = 0; c < columns; ++c) signals[r * columns + c] = signals[blocks + r * columns + c] = 0;
  for (int64_t i = r * OUT; i < r * OUT + height; ++i) {
    w_t* row = gradient + i * k;
    int64_t done = 0;
    for (int j = 0; j < length; ++j) {
      const int64_t c = (int64_t)list[j] * IN;
      std::memset(row + done, 0, (c - done) * sizeof(w_t));
      done = std::min(c + IN, k);
    }
    std::memset(row + done, 0, (k - done) * sizeof(w_t));
  }
}

// ---- the plan ------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t height, width, blocks, chunks, chunk, g_floats, x_floats, kept_floats;
  Plan(int64_t rows, int64_t n, int64_t k, int64_t probes, int64_t chunk_rows) {
    height = (n + OUT - 1) / OUT;
    width = (k + IN - 1) / IN;
    blocks = height * width;
    chunks = std::max<int64_t>(1, (rows + chunk_rows - 1) / chunk_rows);
    chunk = (rows + chunks - 1) / chunks;
    g_floats = height * OUT * chunk;
    x_floats = width * IN * chunk;
    kept_floats = chunks > 1 ? (blocks + probes) * OUT * IN : 0;
  }
};

}  // namespace

// Bytes of scratch that run() needs.
extern "C" int64_t scratch_bytes(int64_t rows, int64_t n, int64_t k, int64_t probes, int64_t chunk_rows) {
  const Plan p(rows, n, k, probes, chunk_rows);
  const int64_t floats = p.g_floats + p.x_floats + p.kept_floats;
  return 4 * floats + (p.blocks + probes) * (int64_t)sizeof(Entry) + p.height + p.width;
}

// g [rows, n], x [rows, k], weight and gradient [n, k], signals [2, blocks].
extern "C" void run(const x_t* g, int64_t g_stride, const x_t* x, int64_t x_stride, const w_t* weight,
                    int64_t weight_stride, const int32_t* offsets, const int32_t* indices, const int32_t* probes,
                    int64_t probe_count, w_t* gradient, float* signals, int64_t rows, int64_t n, int64_t k,
                    int64_t chunk_rows, int threads, float* scratch) {
  const Plan p(rows, n, k, probe_count, chunk_rows);
  float* const packed_g = scratch;
  float* const packed_x = packed_g + p.g_floats;
  float* const kept = packed_x + p.x_floats;
  Entry* const entries = (Entry*)(kept + p.kept_floats);
  char* const used_rows = (char*)(entries + p.blocks + probe_count);
  char* const used_columns = used_rows + p.height;
  std::memset(used_rows, 0, p.height + p.width);
  int64_t count = 0;
  auto add = [&](int64_t r, int64_t c, bool written) {
    entries[count++] = {(int32_t)r, (int32_t)c, written};
    used_rows[r] = used_columns[c] = 1;
  };
  for (int64_t r = 0; r < p.height; ++r)
    for (int j = offsets[r]; j < offsets[r + 1]; ++j) add(r, indices[j], true);
  for (int64_t i = 0; i < probe_count; ++i)
    if (probes[i] >= 0) add(probes[i] / p.width, probes[i] % p.width, false);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4)
    for (int64_t r = 0; r < p.height; ++r)
      clear_row(indices + offsets[r], offsets[r + 1] - offsets[r], r, p.width, gradient, n, k, signals, p.blocks);

    for (int64_t q = 0; q < p.chunks; ++q) {
      const int64_t first = part(rows, p.chunks, q), last = part(rows, p.chunks, q + 1), size = last - first;
#pragma omp for schedule(dynamic, 1)
      for (int64_t m = 0; m < size; m += 8) {
        const int64_t end = std::min(m + 8, size);
        pack_g(g + first * g_stride, g_stride, n, used_rows, m, end, p.chunk, packed_g);
        pack_x(x + first * x_stride, x_stride, k, used_columns, m, end, p.chunk, packed_x);
      }
#pragma omp for schedule(dynamic, 2)
      for (int64_t i = 0; i < count; ++i) {
        const Entry e = entries[i];
        alignas(64) float local[OUT * IN];
        float* const sums = p.chunks > 1 ? kept + i * OUT * IN : local;
        if (q == 0) std::memset(sums, 0, sizeof local);
        const float* gp = packed_g + e.row * p.chunk * OUT;
        const float* xp = packed_x + e.column * p.chunk * IN;
        product(gp, xp, size, p.chunk, sums);
        const int64_t at = (int64_t)e.row * p.width + e.column;
        if (q + 1 == p.chunks)
          finish(e, sums, weight, weight_stride, gradient, n, k, signals + at, signals + p.blocks + at);
      }
    }
  }
}
"""
