"""The C++ that every generated kernel begins with: vector types, loads and stores, bfloat16, activations."""

from .isa import Isa

SCALARS = {"torch.float32": "float", "torch.bfloat16": "bf16"}  # str(dtype) -> C++


def prelude(what: str, isa: Isa) -> str:
    """What the file is, then types and primitives for vectors of `isa`, and of 8 lanes for what is left over."""
    narrow = min(isa.lanes, 8)
    vectors = "\n".join(_vector(n) for n in sorted({isa.lanes, narrow}))
    stages = "\n".join(_transpose_stage(narrow, distance) for distance in (4, 2, 1) if distance < narrow)
    heading = f"// {what}, {isa.name}.\n// Generated; kept beside the library for whoever wants to read it.\n"
    return heading + (
        _PRIMITIVES.replace("$VECTORS", vectors)
        .replace("$WIDE", f"v{isa.lanes}")
        .replace("$NARROW", f"v{narrow}")
        .replace("$TRANSPOSE_STAGES", stages)
    )


def activation(name: str) -> str:
    """`activate(z)` for a vector of pre-activations."""
    return _ACTIVATIONS[name]


def slope(name: str) -> str:
    """`slope(z)`, the derivative of an activation for a vector of pre-activations."""
    return _CLAMP + _EXPONENTIAL + _SLOPES[name]


def _vector(lanes: int) -> str:
    return f"""\
struct v{lanes} {{
  static constexpr int lanes = {lanes};
  typedef float f __attribute__((vector_size({4 * lanes})));
  typedef uint32_t u __attribute__((vector_size({4 * lanes})));
  typedef uint16_t h __attribute__((vector_size({2 * lanes})));
}};"""


def _transpose_stage(lanes: int, distance: int) -> str:
    """Swaps, between rows that are `distance` apart, the off-diagonal squares of that size."""
    low = [lane - distance + lanes if lane & distance else lane for lane in range(lanes)]
    high = [lane + lanes if lane & distance else lane + distance for lane in range(lanes)]
    return f"""\
  UNROLL for (int i = 0; i < {lanes}; ++i) {{
    if (i & {distance}) continue;
    const Narrow::f a = row[i], b = row[i + {distance}];
    row[i] = SHUFFLE(Narrow::u, a, b, {", ".join(map(str, low))});
    row[i + {distance}] = SHUFFLE(Narrow::u, a, b, {", ".join(map(str, high))});
  }}"""


_PRIMITIVES = """\
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define UNROLL_TWICE _Pragma("unroll 2")
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_TWICE _Pragma("GCC unroll 2")
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

struct bf16 { uint16_t bits; };

$VECTORS
typedef $WIDE Wide;
typedef $NARROW Narrow;  // divides every block side

template <class V> INLINE typename V::f load(const float* p) {
  typename V::f v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V> INLINE typename V::f load(const bf16* p) {
  typename V::h h;
  std::memcpy(&h, p, sizeof h);
  return (typename V::f)(__builtin_convertvector(h, typename V::u) << 16);
}

// Of each column the two of two rows, the first in the lower half.
template <class V> INLINE typename V::u in_pairs(const bf16* row, const bf16* next) {
#if defined(__AVX512BF16__)  // GCC makes five instructions of this one
  if constexpr (V::lanes == 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)row));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)next));
    return (typename V::u)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
#endif
  typename V::h low, high;
  std::memcpy(&low, row, sizeof low);
  std::memcpy(&high, next, sizeof high);
  return __builtin_convertvector(low, typename V::u) | __builtin_convertvector(high, typename V::u) << 16;
}

template <class V> INLINE void store(float* p, typename V::f v) { std::memcpy(p, &v, sizeof v); }

// Rounded to the nearest bfloat16, ties to even, in the upper half of each word; a NaN stays one.
template <class V> INLINE typename V::u rounded(typename V::f v) {
  const typename V::u bits = (typename V::u)v;
  const typename V::u nearest = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? nearest : bits | 0x400000;
}

template <class V> INLINE void store(bf16* p, typename V::f v) {
  const typename V::h h = __builtin_convertvector(rounded<V>(v) >> 16, typename V::h);
  std::memcpy(p, &h, sizeof h);
}

INLINE float to_float(float v) { return v; }

INLINE float to_float(bf16 v) {
  const uint32_t bits = (uint32_t)v.bits << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

INLINE void round_to(float* p, float v) { *p = v; }

INLINE void round_to(bf16* p, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  p->bits = (v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000) >> 16;
}

// `size` values as float32. Where what follows in memory is wanted next, the cache is asked for it AHEAD bytes before:
// the hardware does that by itself, but only as far as the page goes.
template <int AHEAD = 0, class T> INLINE void copy(const T* from, int64_t size, float* to) {
  constexpr int LINE = 64 / sizeof(T);
  int64_t k = 0;
  for (; k + LINE <= size; k += LINE) {
    if (AHEAD) __builtin_prefetch((const char*)(from + k) + AHEAD, 0, 2);
    UNROLL for (int l = 0; l < LINE; l += Wide::lanes) store<Wide>(to + k + l, load<Wide>(from + k + l));
  }
  for (; k + Narrow::lanes <= size; k += Narrow::lanes) store<Narrow>(to + k, load<Narrow>(from + k));
  for (; k < size; ++k) to[k] = to_float(from[k]);
}

template <int AHEAD = 0> INLINE void copy(const bf16* from, int64_t size, bf16* to) {
  constexpr int LINE = 64 / sizeof(bf16);
  int64_t k = 0;
  for (; k + LINE <= size; k += LINE) {
    if (AHEAD) __builtin_prefetch((const char*)(from + k) + AHEAD, 0, 2);
    UNROLL for (int l = 0; l < LINE; l += 2 * Wide::lanes) {
      Wide::u words;
      std::memcpy(&words, from + k + l, sizeof words);
      std::memcpy(to + k + l, &words, sizeof words);
    }
  }
  std::memcpy(to + k, from + k, (size - k) * sizeof(bf16));
}

// Copies BYTES past the caches where that can be, for what is large and not read soon; `streamed()` ends a series.
template <int BYTES> INLINE void stream(const void* from, void* to) {
#if defined(__AVX__)
  typedef long long part_t __attribute__((vector_size(32)));
  if (BYTES % 64 == 0 && ((uintptr_t)to & 63) == 0) {  // whole lines: parts of one would each go by themselves
    UNROLL for (int b = 0; b < BYTES; b += 32) {
      part_t part;
      std::memcpy(&part, (const char*)from + b, sizeof part);
#if defined(__clang__)
      __builtin_nontemporal_store(part, (part_t*)((char*)to + b));
#else
      __builtin_ia32_movntdq256((part_t*)((char*)to + b), part);
#endif
    }
    return;
  }
#endif
  std::memcpy(to, from, BYTES);
}

INLINE void streamed() {
#if defined(__AVX__)
  __builtin_ia32_sfence();
#endif
}

template <class V> INLINE float sum(typename V::f v) {
  float total = 0;
  for (int i = 0; i < V::lanes; ++i) total += v[i];
  return total;
}

// Square of Narrow::lanes: row[k][i] = from[i * stride + k].
template <class T> INLINE void load_transposed(const T* from, int64_t stride, Narrow::f (&row)[Narrow::lanes]) {
  UNROLL for (int i = 0; i < Narrow::lanes; ++i) row[i] = load<Narrow>(from + i * stride);
$TRANSPOSE_STAGES
}

// Part i of `count` nearly equal parts of [0, size) begins here.
inline int64_t part(int64_t size, int64_t count, int64_t i) { return size / count * i + std::min(size % count, i); }
"""

_CLAMP = """
// Written so that a NaN passes.
template <class F> INLINE F clamp(F x, float low, float high) {
  const F least = F{} + low, most = F{} + high;
  x = x > most ? most : x;
  return x < least ? least : x;
}
"""

# 2**n times a polynomial of degree 7 (Cephes, expf).
_EXPONENTIAL = """
template <class V> INLINE typename V::f exponential(typename V::f x) {
  x = clamp(x, -87.0f, 89.0f);  // from 88.7 on the result is infinite
  const typename V::f shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
  const typename V::f r = x - n * 0.693359375f + n * 2.12194440e-4f;
  typename V::f p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const typename V::u power = ((typename V::u)shifted << 23) + 0x3f800000u;
  return (p * r * r + r + 1.0f) * (typename V::f)power;
}
"""

_ACTIVATIONS = {
    "none": "\ntemplate <class V> INLINE typename V::f activate(typename V::f z) { return z; }\n",
    "relu": """
template <class V> INLINE typename V::f activate(typename V::f z) {
  const typename V::f zero = {};
  return z < zero ? zero : z;
}
""",
    # erf: an odd rational function of degree 13 / 8, minimax on [-4, 4], where it reaches 1 in float32.
    "gelu": _CLAMP
    + """
template <class V> INLINE typename V::f activate(typename V::f z) {
  const typename V::f x = clamp(z * 0.70710678118654752f, -4.0f, 4.0f), s = x * x;
  typename V::f p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  typename V::f q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return z * 0.5f * (1.0f + x * p / q);
}
""",
    # z * (1 + tanh(u)) / 2 = z / (1 + exp(-2 u)).
    "gelu_tanh": _CLAMP
    + _EXPONENTIAL
    + """
template <class V> INLINE typename V::f activate(typename V::f z) {
  const typename V::f u = z + 0.044715f * (z * z * z);
  return z / (1.0f + exponential<V>(u * -1.59576912160573071f));
}
""",
}

# What is left far out is taken to be zero: it would become denormal numbers, with which a CPU is slow.
_SLOPES = {
    # cdf(z) + z pdf(z) of the normal distribution. The tail cdf(-a) is exp(-a**2 / 2) times a polynomial in
    # t = 1 / (1 + 0.3 a), minimax in the relative error, 1.3e-7.
    "gelu": """
template <class V> INLINE typename V::f slope(typename V::f z) {
  const typename V::f near = clamp(z, -9.0f, 9.0f), a = near < 0 ? -near : near, t = 1.0f / (1.0f + 0.3f * a);
  const typename V::f zero = {}, bell = a == 9.0f ? zero : exponential<V>(near * near * -0.5f);
  typename V::f p = t * 0.03593273434174107f + -0.1582802865329414f;
  p = p * t + 0.20821418378334933f;
  p = p * t + -0.05540097942777844f;
  p = p * t + 0.12947304667392232f;
  p = p * t + 0.09963630894435598f;
  p = p * t + 0.12079855060500708f;
  p = p * t + 0.1196263770578057f;
  const typename V::f tail = p * t * bell;
  return (near < 0 ? tail : 1.0f - tail) + near * bell * 0.39894228040143268f;
}
""",
    # s + z s (1 - s) 2 du/dz with s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)).
    "gelu_tanh": """
template <class V> INLINE typename V::f slope(typename V::f z) {
  const typename V::f near = clamp(z, -8.0f, 8.0f), squared = near * near;
  const typename V::f e = exponential<V>(near * (-1.5957691216057308f - 0.0713548162726f * squared));
  const typename V::f zero = {}, s = near == -8.0f ? zero : 1.0f / (1.0f + e);
  return s + near * (1.5957691216057308f + 0.2140644488178f * squared) * (e * s) * s;
}
""",
}
