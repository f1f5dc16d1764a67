"""The C++ that says where the rows of a product find their inputs: of a linear, or of a convolution, which is the same.

A row of the output is a sum over a list of (where in the input, which weight block). The rows of a product are the
pixels of its output, image after image. A row reads an input pixel for each tap of the window; a linear is the window
of one tap over one line of pixels. Kernels work on tiles of rows: the pixels that a tile reads are packed side by side
with the zeros around them, and two tables say which packed pixel is a row's first, and how far a tap is from there.
"""

import ctypes
from collections.abc import Sequence

_DIMENSIONS = 3  # that a geometry has room for: depth, height, width
Size = tuple[int, ...]
Taps = Sequence[tuple[Size, int]]  # offset in the input's pixels, at the weight's tap of this index


def geometry(
    images: int, out: Size, size: Size, first: Size, step: Size, taps: Taps, x_stride: Size, y_stride: Size
) -> ctypes.Array[ctypes.c_int64]:
    """The `Geometry` of the C++ for outputs of `out` pixels and inputs of `size`.

    Output pixel p reads input pixel `p * step + offset` for each tap's offset; `first` is at most the least of them.
    `x_stride` and `y_stride` are those of an image and of each dimension, in entries.
    """
    reach = [max((offset[d] for offset, _ in taps), default=first[d]) - first[d] for d in range(len(out))]
    words = [images, *_three(out, 1), *_three(size, 1), *_three(first, 0), *_three(step, 1), *_three(reach, 0)]
    for image, *rest in (x_stride, y_stride):
        words += [image, *_three(rest, 0)]
    words.append(len(taps))
    for offset, index in taps:
        words += [*_three([at - start for at, start in zip(offset, first, strict=True)], 0), index]
    return (ctypes.c_int64 * len(words))(*words)


def _three(sizes: Sequence[int], missing: int) -> list[int]:
    return [missing] * (_DIMENSIONS - len(sizes)) + list(sizes)


GEOMETRY = """
// ---- where rows find their inputs ----------------------------------------------------------------------------------

struct Tap { int64_t at[3], index; };  // pixels from the first tap, 0 or more; position in the weight

// Depth, height and width, of size 1 where there are fewer. The row of output pixel p of an image reads, for each tap,
// input pixel p * step + first + tap; what lies outside the input is zero. Strides are in entries.
struct Geometry {
  int64_t images, out[3], in[3], first[3], step[3], reach[3];  // reach: the largest tap
  int64_t x_stride[4], y_stride[4];  // of an image, and of each dimension
  int64_t taps;
  Tap tap[];
};

// A tile is some whole lines of output pixels, or a part of one line: of `most` rows, or as many as take no more than
// `bytes`, but no fewer than `least`, as far as lines allow.
struct Tiles {
  const Geometry& g;
  int64_t lines, parts, count, rows, pixels;  // rows and pixels of the largest tile

  // `grain`: rows that are worked on at a time.
  template <class Need>
  Tiles(const Geometry& geometry, int64_t bytes, Need need, int64_t least, int64_t most, int64_t grain)
      : g(geometry), lines(g.images * g.out[0] * g.out[1]) {
    int64_t wanted = most / grain * grain;
    for (cut(wanted); wanted - grain >= least && need(*this) > bytes; cut(wanted)) wanted -= grain;
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

// The tables of one tile.
struct Tile {
  int64_t rows, pixels;
  int64_t* from;    // [pixels] offset in x of each packed pixel, -1: zero
  int64_t* to;      // [rows] offset in y
  int32_t* at;      // [rows] the packed pixel of the first tap
  int32_t* tap_at;  // [taps] packed pixels from there

  static int64_t bytes(const Tiles& t) {
    return (8 * (t.pixels + t.rows) + 4 * (t.rows + t.g.taps) + 63) / 64 * 64;  // whole cache lines
  }

  Tile(const Tiles& t, char* memory) : rows(0), pixels(0) {
    from = (int64_t*)memory;
    to = from + t.pixels;
    at = (int32_t*)(to + t.rows);
    tap_at = at + t.rows;
  }

  void set(const Tiles& t, int64_t i) {
    const Geometry& g = t.g;
    int64_t line = t.parts > 1 ? i / t.parts : part(t.lines, t.count, i);
    const int64_t end = t.parts > 1 ? line + 1 : part(t.lines, t.count, i + 1);
    const int64_t left = part(g.out[2], t.parts, i % t.parts), right = part(g.out[2], t.parts, i % t.parts + 1);
    const int64_t width = (right - left - 1) * g.step[2] + g.reach[2] + 1, planes = g.reach[0] + 1;
    rows = pixels = 0;
    while (line < end) {  // the lines of one plane share pixels
      const int64_t top = line % g.out[1], bottom = std::min(g.out[1], top + end - line);
      const int64_t depth = line / g.out[1] % g.out[0], image = line / g.out[1] / g.out[0];
      for (int64_t h = top; h < bottom; ++h)
        for (int64_t w = left; w < right; ++w, ++rows) {
          at[rows] = (int32_t)(pixels + (h - top) * g.step[1] * planes * width + (w - left) * g.step[2]);
          to[rows] = image * g.y_stride[0] + depth * g.y_stride[1] + h * g.y_stride[2] + w * g.y_stride[3];
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
      const int64_t* tap = g.tap[j].at;
      tap_at[j] = (int32_t)((tap[1] * planes + tap[0]) * width + tap[2]);
    }
  }
};
"""
