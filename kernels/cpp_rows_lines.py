"""The C++ of the inner kernel of `cpp_rows` for windows with two or three taps side by side.

Neighbouring rows of the output read many of the same pixels. So rows are taken in segments of neighbours, and a pixel
is loaded once for all taps that see it. Where a strip is one vector wide, the kernel that takes one tap after another
needs a load for each multiply-add, which is more than CPUs load; this one needs one for 1.3 to 1.8 of them. Wider
strips do without.
"""

from .isa import Isa, Panel

SEGMENT = 4  # rows: lines of 4, 8, 16, 28, 32, 56 pixels divide into as many, those of 7 and 14 do not


def segments(strip: Panel, isa: Isa) -> int:
    """How many segments at a time at most have their sums in registers; 0 where a strip would not gain."""
    return 6 if isa.registers == 32 and strip.vectors == 1 else 0


LINES = """
// ---- the inner kernel, for taps side by side -----------------------------------------------------------------------

constexpr int SEGMENT = $SEGMENT;

template <class V, int LINE, int STEP, int SEGMENTS>
__attribute__((noinline)) void line_kernel(const Call& c, const List& list, const Phase& phase, int strip,
                                           const packed_t* x, const Rows& rows, const int64_t* tap_at, int64_t row,
                                           float* total) {
  constexpr int ROWS = SEGMENTS * SEGMENT, WIDTH = V::lanes, PIXELS = (SEGMENT - 1) * STEP + LINE;
  const int64_t* const to = rows.to + row;
  const int64_t column = list.column + strip, stride = c.pixel_stride;
  typename V::f acc[ROWS][1];
  UNROLL for (int i = 0; i < ROWS; ++i) acc[i][0] = load<V>(list.bias + strip);
  // From left to right; an input gradient's taps stand the other way round.
  const bool reversed = tap_at[1] < tap_at[0];
  const int64_t leftmost = reversed ? LINE - 1 : 0, right = (reversed ? -1 : 1) * IN * WIDTH;
  const packed_t* pixel[SEGMENTS];
  UNROLL for (int s = 0; s < SEGMENTS; ++s) pixel[s] = x + rows.at[row + s * SEGMENT] + list.input;
  const int64_t length = list.length, lines = phase.taps / LINE, all = length * lines;
  const int32_t* entry = c.indices + list.begin;
  const packed_t* w = c.packed_strip(list, phase, strip) + leftmost * IN * WIDTH;
  tap_at += leftmost;
  // Bytes to pixel p, which an address can have as 1, 2, 4 or 8 times a register. The compiler is not to know how those
  // are related: it would keep an address for each pixel, and has not so many registers.
  int64_t one = stride * sizeof(packed_t), three = 3 * one, five = 5 * one, seven = 7 * one;
  asm("" : "+r"(one), "+r"(three), "+r"(five), "+r"(seven));
  const auto away = [&](int p) {
    return p == 3 ? three : p == 5 ? five : p == 6 ? 2 * three : p == 7 ? seven : p * one;
  };
  int64_t j = 0, l = 0, from = all ? (int64_t)entry[0] * IN + tap_at[0] : 0;
  int fetched = 0;
  const int fetch = all >= ROWS ? 1 : all ? (ROWS + (int)all - 1) / (int)all : 0;
  for (int64_t steps = all; steps > 0; --steps, w += (LINE - 1) * IN * WIDTH) {
    if (++l == lines) l = 0, ++j;
    const int64_t next = (int64_t)entry[j < length ? j : 0] * IN + tap_at[l * LINE];
    if (l == 0)
      UNROLL for (int s = 0; s < SEGMENTS; ++s)
        UNROLL for (int p = 0; p < SEGMENT; ++p)
          UNROLL for (int k = 0; k < IN; k += 64 / sizeof(packed_t))
            __builtin_prefetch(pixel[s] + next + p * STEP * stride + k);
    for (const int last = std::min(ROWS, fetched + fetch); fetched < last; ++fetched)
      ask_for_outputs<WIDTH>(c, to[fetched] + column);
    const char* start[SEGMENTS];
    UNROLL for (int s = 0; s < SEGMENTS; ++s) start[s] = (const char*)(pixel[s] + from);
    for (int k = 0; k < IN; k += DEPTH, w += DEPTH * WIDTH) {
      factors<V> b[LINE];
      UNROLL for (int t = 0; t < LINE; ++t) b[t] = load_factors<V>(w + t * right);
      UNROLL for (int s = 0; s < SEGMENTS; ++s)
        UNROLL for (int p = 0; p < PIXELS; ++p) {
          const factors<V> a = broadcast<V>((const packed_t*)(start[s] + away(p)));
          UNROLL for (int t = 0; t < LINE; ++t)  // that see pixel p
            if (p >= t && (p - t) % STEP == 0 && (p - t) / STEP < SEGMENT) {
              typename V::f& sum = acc[s * SEGMENT + (p - t) / STEP][0];
              sum = multiply_add<V>(sum, a, b[t]);
            }
        }
      UNROLL for (int s = 0; s < SEGMENTS; ++s) start[s] += DEPTH * sizeof(packed_t);
    }
    from = next;
  }
  finish<V, 1, ROWS>(c, to, column, list.width - strip, acc, total + strip);
}

template <class V, int LINE, int STEP, int SEGMENTS, int LEAST>
void line_kernel_of(int64_t count, const Call& c, const List& list, const Phase& phase, int strip, const packed_t* x,
                    const Rows& rows, const int64_t* tap_at, int64_t row, float* total) {
  if (count == SEGMENTS)
    line_kernel<V, LINE, STEP, SEGMENTS>(c, list, phase, strip, x, rows, tap_at, row, total);
  else if constexpr (SEGMENTS > LEAST)
    line_kernel_of<V, LINE, STEP, SEGMENTS - 1, LEAST>(count, c, list, phase, strip, x, rows, tap_at, row, total);
}

// In groups of LEAST segments or more, so that sums keep the multiply-add units busy; false where there are none such.
template <class V, int LINE, int STEP, int SEGMENTS>
bool by_segments(const Call& c, const List& list, const Phase& phase, int strip, const packed_t* x, const Rows& rows,
                 const int64_t* tap_at, float* total) {
  const int64_t all = rows.count / SEGMENT, groups = (all + SEGMENTS - 1) / SEGMENTS;
  constexpr int LEAST = 4;
  if (all < LEAST * groups) return false;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = part(all, groups, g), count = part(all, groups, g + 1) - begin, row = begin * SEGMENT;
    line_kernel_of<V, LINE, STEP, SEGMENTS, LEAST>(count, c, list, phase, strip, x, rows, tap_at, row, total);
  }
  return true;
}

// A strip one vector wide, where lines of taps and of rows allow it; else false.
template <class V, int SEGMENTS>
bool strip_by_lines(const Call& c, const List& list, const Phase& phase, int strip, const packed_t* x, const Rows& rows,
                    const int64_t* tap_at, float* total) {
  if (rows.line % SEGMENT) return false;
  const int64_t line = rows.taps_in_line, step = c.g.step[2];
  if (line == 3 && step == 1)
    return by_segments<V, 3, 1, SEGMENTS>(c, list, phase, strip, x, rows, tap_at, total);
  if (line == 2 && step == 1)
    return by_segments<V, 2, 1, SEGMENTS>(c, list, phase, strip, x, rows, tap_at, total);
  if constexpr (!TAKES_Z)  // an input gradient goes pixel by pixel
    if (line == 3 && step == 2)
      return by_segments<V, 3, 2, SEGMENTS>(c, list, phase, strip, x, rows, tap_at, total);
  return false;
}
"""
