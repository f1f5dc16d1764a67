"""The C++ of the panels that `cpp_wgrad` multiplies: a block's columns of an input, for the rows of a tile."""

PANELS = """
// ---- panels --------------------------------------------------------------------------------------------------------

// What a panel is packed from: `count` columns of each of `rows` rows, at `at + places[row]`, or zero where that is -1;
// `whole`: nowhere. Tile and block say which panel it is.
struct Source {
  int64_t tile, block;
  const x_t* at;
  int64_t count;
  const int64_t* places;
  int64_t rows;
  bool whole;

  int64_t number() const { return tile << 32 | block; }
};

// To [row][column], or [two rows][column][of the two]; zero where there is no row or column.
template <int SIDE, bool PAIRS>
void pack(const Source& x, packed_t* to) {
  constexpr int ROWS = PAIRS ? 2 : 1;
  const x_t zeros[SIDE] = {};
  x_t cut[2][SIDE] = {};
  const auto row = [&](int64_t m) -> const x_t* {
    if (m >= x.rows || x.places[m] < 0) return zeros;
    if (x.count == SIDE) return x.at + x.places[m];
    std::memcpy(cut[m % 2], x.at + x.places[m], x.count * sizeof(x_t));
    return cut[m % 2];
  };
  for (int64_t m = 0; m < x.rows; m += ROWS, to += ROWS * SIDE)
    PAIRS ? lay<true>(row(m), row(m + 1), SIDE, to, SIDE) : copy(row(m), SIDE, to);
}

// What a kernel does of a panel to come at each of its steps along the rows: it asks the cache for a line of as many of
// the panel's rows, and packs those that the kernel before asked for.
enum Work { NOTHING, ASK, PACK_G, PACK_X };
template <Work WORK> using does = std::integral_constant<Work, WORK>;

constexpr int64_t LINE = 64 / sizeof(x_t);  // columns

struct Lines { const x_t* at; const int64_t* places; };

struct Chunk {
  Lines asked, packed;
  packed_t* to;

  // For rows m to m + DEPTH.
  template <Work WORK> INLINE void step(int64_t m) {
    if (WORK != NOTHING) UNROLL for (int d = 0; d < DEPTH; ++d) __builtin_prefetch(asked.at + asked.places[m + d]);
    if (WORK == PACK_G || WORK == PACK_X) {
      constexpr int SIDE = WORK == PACK_G ? OUT : IN;
      constexpr bool PAIRS = WORK == PACK_G && DEPTH == 2;
      lay<PAIRS>(packed.at + packed.places[m], packed.at + packed.places[m + DEPTH - 1], LINE, to, SIDE);
      to += DEPTH * SIDE;
    }
  }
};

// The panels of one input that a thread has: of as many blocks that follow each other as there are slots, and the one
// that the next block needs, while kernels PACK it. They have SIDE columns, and rows in pairs or not.
template <int SIDE, bool PAIRS, Work PACK>
struct Panels {
  int64_t slots;
  int64_t* holds;     // [slots] the number of the panel that is there
  packed_t** panels;  // [slots + 1], the last one being made
  int64_t expected = -1;        // its number
  Source source = {};           // what it is packed from
  int64_t row = 0, column = 0;  // what to ask the cache for next
  bool packs = false;           // else the cache is asked, and no more
  Lines asked = {};             // for, by the kernel before
  packed_t* to = nullptr;       // where that is packed to, if it is

  static int64_t head(int64_t slots) { return ((2 * slots + 1) * (int64_t)sizeof(int64_t) + 63) / 64 * 64; }

  static int64_t bytes(int64_t size, int64_t slots) {
    return head(slots) + (slots + 1) * size * (int64_t)sizeof(packed_t);
  }

  Panels(int64_t size, int64_t slots, char* memory)
      : slots(slots), holds((int64_t*)memory), panels((packed_t**)(holds + slots)) {
    std::fill(holds, holds + slots, -1);
    for (int64_t i = 0; i <= slots; ++i) panels[i] = (packed_t*)(memory + head(slots)) + i * size;
  }

  // The panel, made now where it is missing.
  const packed_t* get(const Source& from) {
    const int64_t slot = from.block % slots, number = from.number();
    if (holds[slot] != number) {
      if (expected == number && packs && to == nullptr && column >= source.count)
        std::swap(panels[slot], panels[slots]);
      else
        pack<SIDE, PAIRS>(from, panels[slot]);
      holds[slot] = number;
      expected = -1;
    }
    return panels[slot];
  }

  void expect(const Source& from) {
    if (holds[from.block % slots] == from.number() || expected == from.number()) return;
    expected = from.number(), source = from;
    row = column = 0, to = nullptr;
    packs = from.whole && from.count == SIDE && SIDE % LINE == 0 && from.rows % DEPTH == 0;
  }

  // What a kernel does of the expected panel; until it is got, all have as many rows.
  Work take(int64_t rows, Chunk& chunk) {
    if (expected < 0 || source.rows < rows) return NOTHING;
    packs &= rows % DEPTH == 0;
    const bool more = column < source.count, packed = to != nullptr;
    if (!more && !packed) return NOTHING;
    chunk = {asked, asked, to};
    to = nullptr;
    if (more) {
      const int64_t first = std::min(row, source.rows - rows);
      chunk.asked = asked = {source.at + column, source.places + first};
      if (packs) to = panels[slots] + first * SIDE + (PAIRS ? 2 : 1) * column;
      row += rows;
      if (row >= source.rows) row = 0, column += LINE;
    }
    return packed ? PACK : ASK;
  }
};

typedef Panels<OUT, DEPTH == 2, PACK_G> PanelsOfG;
typedef Panels<IN, false, PACK_X> PanelsOfX;

// What comes next of both inputs.
struct Next {
  PanelsOfG& g;
  PanelsOfX& x;

  Work take(int64_t rows, Chunk& chunk) {
    const Work work = x.take(rows, chunk);
    return work == NOTHING ? g.take(rows, chunk) : work;
  }
};
"""
