"""The C++ that every generated kernel begins with: vector types, loads and stores, bfloat16, activations."""

from .isa import Isa

SCALARS = {"torch.float32": "float", "torch.bfloat16": "bf16"}  # str(dtype) -> C++


def prelude(isa: Isa) -> str:
    """Types and primitives for vectors of `isa`, and of 8 lanes for what a wider vector leaves over."""
    narrow = min(isa.lanes, 8)
    vectors = "\n".join(_vector(n) for n in sorted({isa.lanes, narrow}))
    stages = "\n".join(_transpose_stage(narrow, distance) for distance in (4, 2, 1) if distance < narrow)
    return (
        _PRIMITIVES.replace("$VECTORS", vectors).replace("$NARROW", f"v{narrow}").replace("$TRANSPOSE_STAGES", stages)
    )


def activation(name: str) -> str:
    """`activate(z)` for a vector of pre-activations."""
    return _ACTIVATIONS[name]


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
#include <omp.h>

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

struct bf16 { uint16_t bits; };

$VECTORS
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

template <class V> INLINE void store(float* p, typename V::f v) { std::memcpy(p, &v, sizeof v); }

// Rounds to the nearest, ties to even; a NaN stays one.
template <class V> INLINE void store(bf16* p, typename V::f v) {
  const typename V::u bits = (typename V::u)v;
  const typename V::u rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const typename V::u kept = v == v ? rounded : bits | 0x400000;
  const typename V::h h = __builtin_convertvector(kept >> 16, typename V::h);
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

template <class V> INLINE float sum(typename V::f v) {
  float total = 0;
  for (int i = 0; i < V::lanes; ++i) total += v[i];
  return total;
}

// Square of Narrow::lanes: to[k * WIDTH + i] = from[i * stride + k].
template <int WIDTH, class T> INLINE void transpose(const T* from, int64_t stride, float* to) {
  Narrow::f row[Narrow::lanes];
  UNROLL for (int i = 0; i < Narrow::lanes; ++i) row[i] = load<Narrow>(from + i * stride);
$TRANSPOSE_STAGES
  UNROLL for (int i = 0; i < Narrow::lanes; ++i) store<Narrow>(to + i * WIDTH, row[i]);
}

// Part i of `count` nearly equal parts of [0, size) begins here.
inline int64_t part(int64_t size, int64_t count, int64_t i) { return size / count * i + std::min(size % count, i); }
"""

_POLYNOMIAL = """
// An odd rational approximation, numerator and denominator in x * x by Horner's rule.
template <class F, int N, int D> INLINE F odd_rational(F x, const float (&p)[N], const float (&q)[D]) {
  const F square = x * x;
  F above = square * p[0] + p[1], below = square * q[0] + q[1];
  UNROLL for (int i = 2; i < N; ++i) above = above * square + p[i];
  UNROLL for (int i = 2; i < D; ++i) below = below * square + q[i];
  return x * above / below;
}

// Written so that a NaN passes.
template <class F> INLINE F clamp(F x, float limit) {
  const F high = F{} + limit;
  x = x > high ? high : x;
  return x < -high ? -high : x;
}
"""

_ACTIVATIONS = {
    "none": "\ntemplate <class F> INLINE F activate(F z) { return z; }\n",
    "relu": "\ntemplate <class F> INLINE F activate(F z) { return z < F{} ? F{} : z; }\n",
    "gelu": _POLYNOMIAL
    + """
template <class F> INLINE F activate(F z) {
  static const float p[] = {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                            -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  static const float q[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                            -7.37332916720468e-03f, -1.42647390514189e-02f};
  const F erf = odd_rational(clamp(z * 0.70710678118654752f, 4.0f), p, q);
  return z * 0.5f * (1.0f + erf);
}
""",
    "gelu_tanh": _POLYNOMIAL
    + """
template <class F> INLINE F activate(F z) {
  static const float p[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                            1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f};
  static const float q[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
  const F inner = 0.79788456080286536f * (z + 0.044715f * (z * z * z));
  return z * 0.5f * (1.0f + odd_rational(clamp(inner, 7.90531110763549805f), p, q));
}
""",
}
