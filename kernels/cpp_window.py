"""The C++ that says where the rows of a product find their inputs: of a linear, or of a convolution, which is the same.

A row of the output is a sum over a list of (where in the input, which weight block). The rows of a product are the
pixels of its output, image after image. A row reads an input pixel for each tap of the window; a linear is the window
of one tap over one line of pixels. The pixels of a strided convolution's input gradient fall into phases, each with its
own taps, and pixel p of every phase reads about the same inputs. Kernels work on tiles of rows: the pixels that a tile
reads are packed side by side with the zeros around them, and two tables say which packed pixel is a row's first, and
how far a tap is from there. Where that would be a mere copy the pixels may stay where they lie.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_DIMENSIONS = 3  # that a geometry has room for: depth, height, width
Size = tuple[int, ...]
Taps = tuple[tuple[Size, int], ...]  # offset in the input's pixels, at the weight's tap of this index


class Phase(NamedTuple):
    """Pixels of the output that read the input through the same taps: `out` of them, the first at `start` in y."""

    out: Size
    start: int
    taps: Taps


@dataclass(frozen=True, eq=False)  # a key of caches that are read at each call
class Geometry:
    """The C++ `Geometry`: its words, and where they lie."""

    words: ctypes.Array[ctypes.c_int64]
    address: int


@functools.lru_cache(maxsize=1024)
def geometry(
    images: int, size: Size, step: Size, phases: tuple[Phase, ...], x_stride: Size, y_stride: Size
) -> Geometry:
    """That of inputs of `size` pixels.

    Output pixel p of a phase reads input pixel `p * step + offset` for each of its taps' offsets. `x_stride` and
    `y_stride` are those of an image and of each dimension, in entries, as is a phase's start.
    """
    dimensions = range(len(size))
    out = [max(phase.out[d] for phase in phases) for d in dimensions]
    offsets = [offset for phase in phases for offset, _ in phase.taps] or [(0,) * len(size)]
    first = [min(offset[d] for offset in offsets) for d in dimensions]
    reach = [max(offset[d] for offset in offsets) - first[d] for d in dimensions]
    words = [images, *_three(out, 1), *_three(size, 1), *_three(first, 0), *_three(step, 1), *_three(reach, 0)]
    for image, *rest in (x_stride, y_stride):
        words += [image, *_three(rest, 0)]
    words += [sum(len(phase.taps) for phase in phases), len(phases)]
    for phase in phases:
        for offset, index in phase.taps:
            words += [*_three([at - start for at, start in zip(offset, first, strict=True)], 0), index]
    taps = 0
    for phase in phases:
        words += [*_three(phase.out, 1), phase.start, taps, len(phase.taps)]
        taps += len(phase.taps)
    array = (ctypes.c_int64 * len(words))(*words)
    return Geometry(array, ctypes.addressof(array))


def _three(sizes: Sequence[int], missing: int) -> list[int]:
    return [missing] * (_DIMENSIONS - len(sizes)) + list(sizes)


GEOMETRY = """
// ---- where rows find their inputs ----------------------------------------------------------------------------------

struct Tap { int64_t at[3], index; };  // pixels from the first tap, 0 or more; position in the weight

struct Phase { int64_t out[3], to, first_tap, taps; };  // output pixels that share taps; offset in y of the first

// Depth, height and width, of size 1 where there are fewer. The row of output pixel p of an image reads, for each tap
// of its phase, input pixel p * step + first + tap; what lies outside the input is zero. Strides are in entries.
struct Geometry {
  int64_t images, out[3], in[3], first[3], step[3], reach[3];  // out: of the largest phase; reach: the largest tap
  int64_t x_stride[4], y_stride[4];  // of an image, and of each dimension
  int64_t taps, phases;
  const Tap* tap() const { return (const Tap*)(this + 1); }  // phase by phase
  const Phase* phase() const { return (const Phase*)(tap() + taps); }

  // How many taps of a phase stand side by side throughout, from left to right or the other way: 3, 2 or 1.
  int64_t taps_in_line(const Phase& phase) const { return in_lines(phase, 3) ? 3 : in_lines(phase, 2) ? 2 : 1; }

  // Whether no row reads beyond the input.
  bool inside() const {
    for (int d = 0; d < 3; ++d)
      if (first[d] < 0 || first[d] + (out[d] - 1) * step[d] + reach[d] >= in[d]) return false;
    return true;
  }

  bool in_lines(const Phase& phase, int64_t size) const {
    if (phase.taps == 0 || phase.taps % size) return false;
    const Tap* const taps = tap() + phase.first_tap;
    const int64_t right = taps[1].at[2] - taps[0].at[2];
    bool whole = right == 1 || right == -1;
    for (int64_t j = 0; j < phase.taps; ++j) {
      const Tap& first = taps[j - j % size];
      whole &= taps[j].at[0] == first.at[0] && taps[j].at[1] == first.at[1];
      whole &= taps[j].at[2] == first.at[2] + j % size * right;
    }
    return whole;
  }
};

// A tile is some whole lines of output pixels, or a part of one line: of `most` rows, or as many as fit, but no fewer
// than `least`, as far as lines allow. With phases, these are the rows of the largest.
struct Tiles {
  const Geometry& g;
  int64_t lines, parts, count, rows, pixels;  // rows and pixels of the largest tile

  // `grain`: rows that are worked on at a time.
  template <class Fits>
  Tiles(const Geometry& geometry, int64_t least, int64_t most, int64_t grain, Fits fits)
      : g(geometry), lines(g.images * g.out[0] * g.out[1]) {
    int64_t wanted = most / grain * grain;
    for (cut(wanted); wanted - grain >= least && !fits(*this); cut(wanted)) wanted -= grain;
  }

  void cut(int64_t wanted) {
    parts = std::max<int64_t>(1, (g.out[2] + wanted - 1) / wanted);
    const int64_t most = parts > 1 ? 1 : std::max<int64_t>(1, wanted / std::max<int64_t>(1, g.out[2]));
    count = parts > 1 ? lines * parts : (lines + most - 1) / most;
    const int64_t height = (lines * parts + count - 1) / count, width = (g.out[2] + parts - 1) / parts;
    const int64_t groups = std::min(height, (height + g.out[1] - 2) / g.out[1] + 1);  // of lines that share pixels
    rows = height * width;
    pixels = (groups * g.reach[1] + height * g.step[1]) * (g.reach[0] + 1) * ((width - 1) * g.step[2] + g.reach[2] + 1);
  }
};

// The rows of one phase of a tile.
struct Rows {
  int64_t taps_in_line;
  int64_t count, line;  // they come in runs of `line` neighbours
  int64_t* to;  // offset in y
  int64_t* at;  // where the packed pixel of the first tap begins
};

// The tables of one tile.
struct Tile {
  int64_t pixels;
  Rows* phase;
  int64_t* from;    // [pixels] offset in x of each packed pixel, -1: zero
  int64_t* tap_at;  // [taps] how far from a row's first tap

  static int64_t bytes(const Tiles& t) {
    const int64_t rows = t.g.phases * t.rows;
    return (t.g.phases * (int64_t)sizeof(Rows) + 8 * (t.pixels + 2 * rows + t.g.taps) + 63) / 64 * 64;
  }

  Tile(const Tiles& t, char* memory) : pixels(0), phase((Rows*)memory), from((int64_t*)(phase + t.g.phases)) {
    int64_t* const to = from + t.pixels;
    int64_t* const at = to + t.g.phases * t.rows;
    for (int64_t f = 0; f < t.g.phases; ++f)
      phase[f] = {t.g.taps_in_line(t.g.phase()[f]), 0, 0, to + f * t.rows, at + f * t.rows};
    tap_at = at + t.g.phases * t.rows;
  }

  // Pixels, packed or not, begin `stride` entries apart.
  void set(const Tiles& t, int64_t i, int64_t stride) {
    const Geometry& g = t.g;
    int64_t line = t.parts > 1 ? i / t.parts : part(t.lines, t.count, i);
    const int64_t end = t.parts > 1 ? line + 1 : part(t.lines, t.count, i + 1);
    const int64_t left = part(g.out[2], t.parts, i % t.parts), right = part(g.out[2], t.parts, i % t.parts + 1);
    const int64_t width = (right - left - 1) * g.step[2] + g.reach[2] + 1, planes = g.reach[0] + 1;
    pixels = 0;
    for (int64_t f = 0; f < g.phases; ++f) phase[f].count = 0;
    while (line < end) {  // the lines of one plane share pixels
      const int64_t top = line % g.out[1], bottom = std::min(g.out[1], top + end - line);
      const int64_t depth = line / g.out[1] % g.out[0], image = line / g.out[1] / g.out[0];
      for (int64_t f = 0; f < g.phases; ++f) {
        const Phase& in = g.phase()[f];
        Rows& rows = phase[f];
        const int64_t start = in.to + image * g.y_stride[0] + depth * g.y_stride[1];
        const int64_t below = depth < in.out[0] ? std::min(bottom, in.out[1]) : top, past = std::min(right, in.out[2]);
        rows.line = past - left;
        for (int64_t h = top; h < below; ++h)
          for (int64_t w = left; w < past; ++w, ++rows.count) {
            const int64_t at = pixels + (h - top) * g.step[1] * planes * width + (w - left) * g.step[2];
            rows.at[rows.count] = at * stride;
            rows.to[rows.count] = start + h * g.y_stride[2] + w * g.y_stride[3];
          }
      }
      const int64_t height = (bottom - top - 1) * g.step[1] + g.reach[1] + 1;
      for (int64_t a = 0; a < height; ++a)
        for (int64_t b = 0; b < planes; ++b) {
          const int64_t y = top * g.step[1] + g.first[1] + a, z = depth * g.step[0] + g.first[0] + b;
          const bool inside = 0 <= y && y < g.in[1] && 0 <= z && z < g.in[0];
          const int64_t start = image * g.x_stride[0] + z * g.x_stride[1] + y * g.x_stride[2];
          int64_t x = left * g.step[2] + g.first[2];
          for (int64_t c = 0; c < width; ++c, ++x, ++pixels)
            from[pixels] = inside && 0 <= x && x < g.in[2] ? start + x * g.x_stride[3] : -1;
        }
      line += bottom - top;
    }
    for (int64_t j = 0; j < g.taps; ++j) {
      const int64_t* tap = g.tap()[j].at;
      tap_at[j] = ((tap[1] * planes + tap[0]) * width + tap[2]) * stride;
    }
  }
};
"""
