"""The C++ of one multiply-add: in float32, or of pairs of bfloat16 where the CPU adds up the products of a pair.

Kernels pack what they multiply as `packed_t`, and take DEPTH entries along a sum at a time: a row has them side by
side, and so has each column. `broadcast` has those of a row in every lane, for `multiply_add` with those of a vector's
columns; `load_columns` puts the columns of DEPTH rows side by side that are not packed so. `lay` packs DEPTH rows.
"""

import torch

from .isa import Isa


def takes_pairs(isa: Isa, dtype: torch.dtype) -> bool:
    """Whether products of inputs of this type are made in pairs."""
    return isa.pairs and dtype == torch.bfloat16


def source(isa: Isa, dtype: torch.dtype) -> str:
    """`packed_t`, DEPTH, `factors` and what makes and multiplies them, for inputs of this type."""
    if not takes_pairs(isa, dtype):
        return _FLOATS
    return _PAIRS.replace(
        "$INTERLEAVE", "\n".join(_interleave(lanes) for lanes in sorted({isa.lanes, min(isa.lanes, 8)}))
    )


def _interleave(lanes: int) -> str:
    """Columns of two rows for two vectors, in two instructions where there is one for it."""
    columns = [at + row * 2 * lanes for at in range(2 * lanes) for row in (0, 1)]
    first, second = (", ".join(map(str, half)) for half in (columns[: 2 * lanes], columns[2 * lanes :]))
    return f"""
INLINE void interleave(const bf16* row, const bf16* next, v{lanes}::u& first, v{lanes}::u& second) {{
  typedef uint16_t both __attribute__((vector_size({4 * lanes})));
  both low, high;
  std::memcpy(&low, row, sizeof low);
  std::memcpy(&high, next, sizeof high);
  first = (v{lanes}::u)SHUFFLE(both, low, high, {first});
  second = (v{lanes}::u)SHUFFLE(both, low, high, {second});
}}"""


_FLOATS = """
typedef float packed_t;
constexpr int DEPTH = 1;
template <class V> using factors = typename V::f;

template <class V> INLINE factors<V> load_factors(const packed_t* p) { return load<V>(p); }

template <class V> INLINE factors<V> broadcast(const packed_t* row) { return *row - factors<V>{}; }

template <class V> INLINE typename V::f multiply_add(typename V::f sum, factors<V> row, factors<V> columns) {
  return sum + row * columns;
}

template <class V, int VECTORS>
INLINE void load_columns(const packed_t* row, const packed_t*, factors<V> (&b)[VECTORS]) {
  UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load_factors<V>(row + v * V::lanes);
}

template <bool, class T> INLINE void lay(const T* row, const T*, int64_t size, packed_t* to, int64_t) {
  copy(row, size, to);
}
"""

_PAIRS = """
typedef bf16 packed_t;
constexpr int DEPTH = 2;
template <class V> using factors = typename V::u;

template <class V> INLINE factors<V> load_factors(const packed_t* p) {
  factors<V> pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

template <class V> INLINE factors<V> broadcast(const packed_t* row) {
  uint32_t pair;
  std::memcpy(&pair, row, sizeof pair);
  return pair - factors<V>{};
}

template <class V> INLINE typename V::f multiply_add(typename V::f sum, factors<V> row, factors<V> columns) {
#if defined(__AVX512BF16__)
  if constexpr (V::lanes == 16)
    return (typename V::f)_mm512_dpbf16_ps((__m512)sum, (__m512bh)columns, (__m512bh)row);
  else
    return (typename V::f)_mm256_dpbf16_ps((__m256)sum, (__m256bh)columns, (__m256bh)row);
#else
  return sum + (typename V::f)(row << 16) * (typename V::f)(columns << 16) +
         (typename V::f)(row & 0xffff0000u) * (typename V::f)(columns & 0xffff0000u);
#endif
}
$INTERLEAVE

template <class V, int VECTORS>
INLINE void load_columns(const packed_t* row, const packed_t* next, factors<V> (&b)[VECTORS]) {
  constexpr int LAST = VECTORS - 1;
  UNROLL for (int v = 0; v < LAST; v += 2) interleave(row + v * V::lanes, next + v * V::lanes, b[v], b[v + 1]);
  if (VECTORS % 2) b[LAST] = in_pairs<V>(row + LAST * V::lanes, next + LAST * V::lanes);
}

// `size` columns of each: side by side, or `stride` apart.
template <bool SIDE_BY_SIDE>
INLINE void lay(const bf16* row, const bf16* next, int64_t size, packed_t* to, int64_t stride) {
  if (SIDE_BY_SIDE) {
    int64_t c = 0;
    for (; c + 2 * Wide::lanes <= size; c += 2 * Wide::lanes) {
      Wide::u first, second;
      interleave(row + c, next + c, first, second);
      std::memcpy(to + 2 * c, &first, sizeof first);
      std::memcpy(to + 2 * (c + Wide::lanes), &second, sizeof second);
    }
    for (; c < size; c += Narrow::lanes) {
      const Narrow::u pairs = in_pairs<Narrow>(row + c, next + c);
      std::memcpy(to + 2 * c, &pairs, sizeof pairs);
    }
  } else {
    copy(row, size, to);
    copy(next, size, to + stride);
  }
}
"""
