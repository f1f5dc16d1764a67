"""The C++ that packs what `cpp_wgrad` reads: the columns of both inputs, by blocks, for the rows of a tile."""

PACKING = """
// ---- packing -------------------------------------------------------------------------------------------------------

// Rows [first, last) of a tile to [block][row][column], for those of so many `blocks` of SIDE columns that are used; of
// a row's columns `left` are left; zero from there on, and where there is no row. Some rows at a time and block by
// block: reads then follow as many streams as there are rows, and writes are one.
template <int SIDE>
void pack(const x_t* x, const int64_t* from, int64_t left, int64_t blocks, const char* used, int64_t first,
          int64_t last, int64_t size, packed_t* to) {
  for (int64_t b = 0; b < blocks; ++b, x += SIDE, left -= SIDE, to += size * SIDE) {
    if (!used[b]) continue;
    for (int64_t p = first; p < last; ++p) {
      packed_t* const row = to + p * SIDE;
      if (from[p] < 0) {
        std::memset(row, 0, SIDE * sizeof(packed_t));
      } else if (left >= SIDE) {
        copy(x + from[p], SIDE, row);
      } else {
        copy(x + from[p], left, row);
        std::memset(row + left, 0, (SIDE - left) * sizeof(packed_t));
      }
    }
  }
}

// As `pack` where every row is there, to [block][two rows][column][of the two]; `first` is even, and what would pair
// with the last row is zero.
template <int SIDE>
void pack_in_pairs(const bf16* x, const int64_t* from, int64_t left, int64_t blocks, const char* used, int64_t first,
                   int64_t last, int64_t size, bf16* to) {
  const bf16 zeros[SIDE] = {};
  for (int64_t b = 0; b < blocks; ++b, x += SIDE, left -= SIDE, to += size * SIDE) {
    if (!used[b]) continue;
    for (int64_t p = first; p < last; p += 2) {
      const bf16 *one = x + from[p], *other = p + 1 < last ? x + from[p + 1] : zeros;
      bf16 cut[2][SIDE] = {};
      if (left < SIDE) {
        std::memcpy(cut[0], one, left * sizeof(bf16));
        std::memcpy(cut[1], other, left * sizeof(bf16));
        one = cut[0], other = cut[1];
      }
      for (int c = 0; c < SIDE; c += Narrow::lanes) {
        const Narrow::u pairs = in_pairs<Narrow>(one + c, other + c);
        std::memcpy(to + p * SIDE + 2 * c, &pairs, sizeof pairs);
      }
    }
  }
}
"""
