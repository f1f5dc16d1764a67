"""The C++ that packs what `cpp_rows` reads: the listed blocks of the weight, and the inputs of a tile of rows."""

PACKING = """
// An output block, and the input blocks that it sums over.
struct alignas(64) List {
  int64_t begin, length;  // of its entries among the listed blocks
  int64_t column, width;  // of the output: the first, and how many there are of OUT
  int64_t input, weight;  // where its first possible input is in a packed pixel, and its first weight
  const float* bias;      // [OUT]
};

// Input blocks side by side that some list names: where they begin in a pixel and in a packed one, how many columns
// they have, and how many zeros follow up to a whole block.
struct alignas(64) Run { int64_t from, to, size, zeros; };

struct Call {
  const Geometry& g;
  const x_t* x;
  const w_t* weight;
  int64_t w_out, w_in, w_tap;  // strides of the weight along output columns, input columns, taps
  const int32_t* indices;  // input blocks
  x_t *y, *z;
  int64_t groups, inputs;  // input columns of a group
  int64_t listed;          // input columns that a list may name: of a group, or of all
  bool in_order;           // the weight's taps lie side by side, and one phase has them all
  const Run* run;          // what is packed of a pixel
  int64_t runs;
  packed_t* packed;        // the listed blocks, list by list, phase by phase, strip by strip
  int64_t pixel_stride;    // of packed pixels, in entries

  // [entry of the list][tap of the phase][DEPTH inputs][column of the strip][of these inputs]
  packed_t* packed_strip(const List& l, const Phase& phase, int64_t strip) const {
    return packed + IN * (l.begin * g.taps * OUT + l.length * (phase.first_tap * OUT + phase.taps * strip));
  }
};

// ---- packing -------------------------------------------------------------------------------------------------------

// The pixels of a tile, each group zero up to a whole block, at a stride that spreads them over the cache's sets. What
// no list names is left out.
void pack_x(const Call& c, const Tile& tile, packed_t* to) {
  for (int64_t p = 0; p < tile.pixels; ++p, to += c.pixel_stride)
    for (const Run* run = c.run; run < c.run + c.runs; ++run)
      if (tile.from[p] < 0) {
        std::memset(to + run->to, 0, (run->size + run->zeros) * sizeof(packed_t));
      } else {
        copy<8192>(c.x + tile.from[p] + run->from, run->size, to + run->to);
        if (run->zeros) std::memset(to + run->to + run->size, 0, run->zeros * sizeof(packed_t));
      }
}

// How many runs there are; `named` has a flag per input block of all groups.
int64_t set_runs(const Call& c, const List* lists, int64_t count, int32_t* named, Run* runs) {
  const int64_t columns = (c.inputs + IN - 1) / IN;
  std::fill(named, named + c.groups * columns, 0);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t j = lists[l].begin; j < lists[l].begin + lists[l].length; ++j)
      named[lists[l].input / IN + c.indices[j]] = 1;
  int64_t found = 0;
  for (int64_t group = 0; group < c.groups; ++group)
    for (int64_t i = 0; i < columns; ++i) {
      if (!named[group * columns + i]) continue;
      const int64_t first = i;
      while (i + 1 < columns && named[group * columns + i + 1]) ++i;
      const int64_t end = std::min((i + 1) * IN, c.inputs);
      runs[found++] = {group * c.inputs + first * IN, (group * columns + first) * IN, end - first * IN,
                       (i + 1) * IN - end};
    }
  return found;
}

// Rows of WIDTH columns, two by two and rounded: each column has its two side by side.
template <int WIDTH> void pair_up(const float* rows, int64_t count, bf16* to) {
  for (int64_t a = 0; a < count; a += 2, rows += 2 * WIDTH)
    for (int b = 0; b < WIDTH; b += Narrow::lanes, to += 2 * Narrow::lanes) {
      const Narrow::u first = rounded<Narrow>(load<Narrow>(rows + b));
      const Narrow::u second = rounded<Narrow>(load<Narrow>(rows + WIDTH + b));
      const Narrow::u pairs = first >> 16 | (second & 0xffff0000u);
      std::memcpy(to, &pairs, sizeof pairs);
    }
}

// A strip of a block of one tap that lies as it is multiplied but for its order. False: it does not.
template <int WIDTH, class T> bool reorder(const Call&, const T*, packed_t*) { return false; }
$REORDER
// Columns [strip, strip + WIDTH) of the blocks of a list, for one phase; zero where the weight ends. `room` is for a
// block in float32 on its way to pairs.
template <int WIDTH> void pack_strip(const Call& c, const List& l, const Phase& phase, int64_t strip, float* room) {
  const Tap* const tap = c.g.tap() + phase.first_tap;
  const int64_t taps = phase.taps, columns = std::min<int64_t>(WIDTH, l.width - strip);
  packed_t* packed = c.packed_strip(l, phase, strip);
  for (int64_t j = l.begin; j < l.begin + l.length; ++j, packed += taps * WIDTH * IN) {
    float* const to = DEPTH == 1 ? (float*)packed : room;
    const int64_t i = (int64_t)c.indices[j] * IN;
    const w_t* from = c.weight + l.weight + strip * c.w_out + i * c.w_in;
    const bool whole = columns == WIDTH && i + IN <= c.listed;
    if (whole && taps == 1 && reorder<WIDTH>(c, from, packed)) continue;
    if (whole && c.in_order && c.w_in == taps) {  // inputs and taps lie in one run
      for (int b = 0; b < WIDTH; b += Narrow::lanes) {
        int64_t a = 0, t = 0;  // of the next entry of the run
        for (int64_t at = 0; at < taps * IN; at += Narrow::lanes) {
          Narrow::f row[Narrow::lanes];
          load_transposed(from + b * c.w_out + at, c.w_out, row);
          UNROLL for (int l = 0; l < Narrow::lanes; ++l) {
            store<Narrow>(to + (t * IN + a) * WIDTH + b, row[l]);
            if (++t == taps) t = 0, ++a;
          }
        }
      }
    } else if (whole && c.w_out == 1) {
      for (int64_t t = 0; t < taps; ++t)
        for (int a = 0; a < IN; ++a)
          for (int b = 0; b < WIDTH; b += Narrow::lanes)
            store<Narrow>(to + (t * IN + a) * WIDTH + b, load<Narrow>(from + tap[t].index * c.w_tap + a * c.w_in + b));
    } else if (whole) {
      for (int a = 0; a < IN; ++a)
        for (int b = 0; b < WIDTH; b += Narrow::lanes) {
          const w_t* const corner = from + a * c.w_in + b * c.w_out;
          float* const column = to + a * WIDTH + b;
          int64_t t = 0;
          for (; c.in_order && t + Narrow::lanes <= taps; t += Narrow::lanes) {
            Narrow::f row[Narrow::lanes];
            load_transposed(corner + t, c.w_out, row);
            UNROLL for (int l = 0; l < Narrow::lanes; ++l) store<Narrow>(column + (t + l) * IN * WIDTH, row[l]);
          }
          for (; t < taps; ++t) {
            const w_t* const entry = corner + tap[t].index * c.w_tap;
            Narrow::f row;
            UNROLL for (int l = 0; l < Narrow::lanes; ++l) row[l] = to_float(entry[l * c.w_out]);
            store<Narrow>(column + t * IN * WIDTH, row);
          }
        }
    } else {
      const int depth = std::min<int64_t>(IN, c.listed - i);
      std::memset(to, 0, taps * WIDTH * IN * sizeof(float));
      for (int a = 0; a < depth; ++a)
        for (int64_t t = 0; t < taps; ++t) {
          const w_t* const line = from + tap[t].index * c.w_tap + a * c.w_in;
          for (int b = 0; b < columns; ++b) to[(t * IN + a) * WIDTH + b] = to_float(line[b * c.w_out]);
        }
    }
    if (DEPTH == 2) pair_up<WIDTH>(to, taps * IN, (bf16*)packed);
  }
}

void pack_list(const Call& c, const List& list, float* room) {
  for (int64_t f = 0; f < c.g.phases; ++f) {
    const Phase& phase = c.g.phase()[f];
$PACKS
  }
}
"""

# Of a weight whose inputs are multiplied in pairs.
REORDER = """
template <int WIDTH> bool reorder(const Call& c, const bf16* from, bf16* to) {
  constexpr int SIDE = Narrow::lanes;
  if (c.w_out == 1) {
    for (int a = 0; a < IN; a += 2, to += 2 * WIDTH)
      lay<true>(from + a * c.w_in, from + (a + 1) * c.w_in, WIDTH, to, 2 * WIDTH);
    return true;
  }
  if (c.w_in != 1 || c.w_out % 2 || IN % (2 * SIDE)) return false;
  for (int b = 0; b < WIDTH; b += SIDE)
    for (int a = 0; a < IN; a += 2 * SIDE) {
      Narrow::f pairs[SIDE];  // whatever numbers these would be
      load_transposed((const float*)(from + b * c.w_out + a), c.w_out / 2, pairs);
      UNROLL for (int l = 0; l < SIDE; ++l) store<Narrow>((float*)(to + (a + 2 * l) * WIDTH + 2 * b), pairs[l]);
    }
  return true;
}
"""
