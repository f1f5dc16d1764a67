"""The C++ that makes a weight gradient of the sums of `cpp_wgrad`, and the signals of its blocks."""

RESULTS = """
// ---- what becomes of the sums --------------------------------------------------------------------------------------

struct Weight {
  const w_t* values;
  int64_t n, k, taps, stride[3];  // along output columns, input columns, taps
  w_t* gradient;  // [n, k, taps]
  bool large;  // the gradient: whole lines are written past the caches, and `streamed()` ends that
};

// Writes one tap of an active block's gradient; both of its parts of the block's signals come from the sums before they
// are rounded.
void finish_tap(const Entry& e, int64_t tap, const float* sums, const Weight& w, float* parts) {
  const int64_t r = (int64_t)e.row * OUT, c = (int64_t)e.column * IN;
  const int height = std::min<int64_t>(OUT, w.n - r), width = std::min<int64_t>(IN, w.k - c);
  const bool contiguous = w.taps == 1 && w.stride[1] == 1;
  w_t row[IN];
  Narrow::f products = {}, squares = {};
  float product_tail = 0, square_tail = 0;
  for (int i = 0; i < height; ++i, sums += IN) {
    const w_t* values = w.values + (r + i) * w.stride[0] + c * w.stride[1] + tap * w.stride[2];
    w_t* out = w.gradient + ((r + i) * w.k + c) * w.taps + tap;
    int j = 0;
    for (; contiguous && j + Narrow::lanes <= width; j += Narrow::lanes) {
      const Narrow::f g = load<Narrow>(sums + j);
      squares += g * g;
      if (e.written) {
        products += g * load<Narrow>(values + j);
        store<Narrow>(row + j, g);
      }
    }
    if (e.written) w.large && j == IN ? stream<sizeof row>(row, out) : (void)std::memcpy(out, row, j * sizeof(w_t));
    for (; j < width; ++j) {
      square_tail += sums[j] * sums[j];
      if (e.written) {
        product_tail += sums[j] * to_float(values[j * w.stride[1]]);
        round_to(out + j * w.taps, sums[j]);
      }
    }
  }
  parts[0] = sum<Narrow>(products) + product_tail;
  parts[1] = sum<Narrow>(squares) + square_tail;
}

// The same of all taps, where those of a column lie side by side: squares of taps and columns are transposed.
void finish_block(const Entry& e, const float* sums, const Weight& w, float* parts) {
  constexpr int SIDE = Narrow::lanes;
  const int64_t r = (int64_t)e.row * OUT, c = (int64_t)e.column * IN;
  const int64_t height = std::min<int64_t>(OUT, w.n - r), width = std::min<int64_t>(IN, w.k - c);
  Narrow::f products = {}, squares = {};
  float product_tail = 0, square_tail = 0;
  for (int64_t i = 0; i < height; ++i, sums += IN) {
    const w_t* const values = w.values + (r + i) * w.stride[0] + c * w.taps;
    w_t* const out = w.gradient + ((r + i) * w.k + c) * w.taps;
    for (int64_t j = 0; j < width; j += SIDE) {
      const int64_t columns = std::min<int64_t>(SIDE, width - j);
      int64_t t = 0;
      for (; columns == SIDE && t + SIDE <= w.taps; t += SIDE) {
        Narrow::f column[SIDE];
        load_transposed(sums + t * OUT * IN + j, OUT * IN, column);
        UNROLL for (int l = 0; l < SIDE; ++l) {
          const int64_t at = (j + l) * w.taps + t;
          squares += column[l] * column[l];
          if (e.written) {
            products += column[l] * load<Narrow>(values + at);
            store<Narrow>(out + at, column[l]);
          }
        }
      }
      for (; t < w.taps; ++t)
        for (int64_t l = j; l < j + columns; ++l) {
          const float g = sums[t * OUT * IN + l];
          square_tail += g * g;
          if (e.written) {
            product_tail += g * to_float(values[l * w.taps + t]);
            round_to(out + l * w.taps + t, g);
          }
        }
    }
  }
  std::fill_n(parts, 2 * w.taps, 0);
  parts[0] = sum<Narrow>(products) + product_tail;
  parts[1] = sum<Narrow>(squares) + square_tail;
}

// Asks the cache for what finish() needs of the weight, where a row of a block lies in one piece, and of the gradient.
void expect(const Entry& e, const Weight& w) {
  const int64_t r = (int64_t)e.row * OUT, c = (int64_t)e.column * IN, height = std::min<int64_t>(OUT, w.n - r);
  const int64_t size = std::min<int64_t>(IN, w.k - c) * w.taps;
  const bool whole = w.stride[1] == w.taps, written = !w.large || w.taps > 1;
  for (int64_t i = r; i < r + height; ++i)
    for (int64_t at = c * w.taps; at < c * w.taps + size; at += 64 / sizeof(w_t)) {
      if (whole) __builtin_prefetch(w.values + i * w.stride[0] + at);
      if (written) __builtin_prefetch(w.gradient + i * w.k * w.taps + at);
    }
}

// Of `count` taps, with the block's parts of the signals for each.
void finish(const Entry& e, int64_t tap, int64_t count, const float* sums, const Weight& w, float* parts) {
  if (count == w.taps && w.taps >= Narrow::lanes && w.stride[1] == w.taps && w.stride[2] == 1)
    return finish_block(e, sums, w, parts);
  for (int64_t t = 0; t < count; ++t) finish_tap(e, tap + t, sums + t * OUT * IN, w, parts + 2 * t);
}

void clear(w_t* to, int64_t size, bool large) {
  static const char zeros[64] = {};
  const int64_t bytes = size * sizeof(w_t);
  if (!large || bytes % sizeof zeros) return (void)std::memset(to, 0, bytes);
  for (int64_t b = 0; b < bytes; b += sizeof zeros) stream<sizeof zeros>(zeros, (char*)to + b);
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
      clear(row + done, c - done, w.large);
      done = std::min(c + IN * w.taps, row_size);
    }
    clear(row + done, row_size - done, w.large);
  }
}
"""
