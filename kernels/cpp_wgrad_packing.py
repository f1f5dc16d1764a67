"""The C++ of the panels that `cpp_wgrad` multiplies: a block's columns of an input, for the rows of a tile."""

PANELS = """
// ---- panels --------------------------------------------------------------------------------------------------------

// A block's columns of an input: where they begin, how many there are, and the number of the block.
struct Columns {
  const x_t* at;
  int64_t count, block;
};

// `rows` of them to [row][column]; zero where there is no column, and where there is no row.
template <int SIDE>
void pack(const Columns& x, const int64_t* from, int64_t rows, packed_t* to) {
  for (int64_t m = 0; m < rows; ++m, to += SIDE) {
    if (from[m] < 0) {
      std::memset(to, 0, SIDE * sizeof(packed_t));
    } else if (x.count == SIDE) {
      copy(x.at + from[m], SIDE, to);
    } else {
      copy(x.at + from[m], x.count, to);
      std::memset(to + x.count, 0, (SIDE - x.count) * sizeof(packed_t));
    }
  }
}

// As `pack` where every row is there, to [two rows][column][of the two]; what would pair with an odd last row is zero.
template <int SIDE>
void pack_in_pairs(const Columns& x, const int64_t* from, int64_t rows, bf16* to) {
  const bf16 zeros[SIDE] = {};
  for (int64_t m = 0; m < rows; m += 2) {
    const bf16 *one = x.at + from[m], *other = m + 1 < rows ? x.at + from[m + 1] : zeros;
    bf16 cut[2][SIDE] = {};
    if (x.count < SIDE) {
      std::memcpy(cut[0], one, x.count * sizeof(bf16));
      std::memcpy(cut[1], other, x.count * sizeof(bf16));
      one = cut[0], other = cut[1];
    }
    for (int c = 0; c < SIDE; c += Narrow::lanes, to += 2 * Narrow::lanes) {
      const Narrow::u pairs = in_pairs<Narrow>(one + c, other + c);
      std::memcpy(to, &pairs, sizeof pairs);
    }
  }
}

// The panels of one input that a thread has: of as many blocks that follow each other as there are slots.
struct Panels {
  int64_t size, slots;  // of a panel, in entries
  int64_t* holds;       // [slots] which tile's and block's panel is there
  packed_t* data;

  static int64_t bytes(int64_t size, int64_t slots) {
    return (slots * (int64_t)sizeof(int64_t) + 63) / 64 * 64 + slots * size * (int64_t)sizeof(packed_t);
  }

  Panels(int64_t size, int64_t slots, char* memory)
      : size(size), slots(slots), holds((int64_t*)memory), data((packed_t*)(memory + bytes(0, slots))) {
    std::fill(holds, holds + slots, -1);
  }

  static int64_t number(int64_t tile, int64_t block) { return tile << 32 | block; }

  bool has(int64_t tile, int64_t block) const { return holds[block % slots] == number(tile, block); }

  // The panel of a block, made by pack(to) where it is missing.
  template <class Pack> const packed_t* get(int64_t tile, int64_t block, Pack pack) const {
    packed_t* const panel = data + block % slots * size;
    if (!has(tile, block)) {
      pack(panel);
      holds[block % slots] = number(tile, block);
    }
    return panel;
  }
};

// What a panel will be packed from. A kernel asks the cache for a line of as many rows as it multiplies.
struct Source {
  const x_t* at = nullptr;
  int64_t columns = 0;  // that are left
  const int64_t* from = nullptr;
  int64_t rows = 0, row = 0;  // the next

  Source() = default;
  Source(const Columns& x, const int64_t* from, int64_t rows) : at(x.at), columns(x.count), from(from), rows(rows) {}

  // The next lines of `count` rows: at *line + (*places)[row]. False: there are none.
  bool take(int64_t count, const x_t** line, const int64_t** places) {
    if (columns <= 0 || rows < count) return false;
    *line = at, *places = from + std::min(row, rows - count);
    row += count;
    if (row >= rows) row = 0, at += LINE, columns -= LINE;
    return true;
  }

  static constexpr int64_t LINE = 64 / sizeof(x_t);
};

struct Sources {
  Source g, x;

  bool take(int64_t count, const x_t** line, const int64_t** places) {
    return x.take(count, line, places) || g.take(count, line, places);
  }
};
"""
