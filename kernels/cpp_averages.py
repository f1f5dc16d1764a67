"""C++ for dead and uniform heads: each query averages the values that it sees, and what that makes of gradients.

One walk over the positions of a head forward, one backward. Causal attention sums up as it goes; else all is summed up
first. Sums are kept in two parts, of the latest positions and of all before, so that a long sequence rounds little.
"""

import torch

from . import cpp_vectors
from .isa import Isa

DEAD, UNIFORM, LIVE = range(3)  # kinds of heads, see `attention`


def source(isa: Isa, dtype: torch.dtype) -> str:
    """C++ for operands of one type."""
    return (
        cpp_vectors.prelude(f"Averages of attention's values, {dtype}", isa)
        + f"\ntypedef {cpp_vectors.SCALARS[str(dtype)]} x_t;\n"
        + f"enum Kind : uint8_t {{ DEAD = {DEAD}, UNIFORM = {UNIFORM}, LIVE = {LIVE} }};\n"
        + _BODY
    )


_BODY = """
constexpr int FOLD = 64;  // positions that are summed up by themselves

struct Sizes { int64_t batch, heads, queries, keys, features, causal; };

// One head of [batch, heads, length, features], with a unit stride along features.
template <class T> struct Head {
  T* data;
  int64_t stride;
  Head(T* all, const int64_t* strides, const Sizes& n, int64_t head)
      : data(all + head / n.heads * strides[0] + head % n.heads * strides[1]), stride(strides[2]) {}
  T* operator[](int64_t at) const { return data + at * stride; }
};

float share(const Sizes& n, bool causal, int64_t query) {
  return 1.0f / std::max<int64_t>(1, causal ? std::min(query + 1, n.keys) : n.keys);
}

// A running sum of rows.
struct Sum {
  std::vector<float> recent, before;
  int taken = 0;
  explicit Sum(int64_t features) : recent(features), before(features) {}
  void clear() {
    std::fill(recent.begin(), recent.end(), 0.0f);
    std::fill(before.begin(), before.end(), 0.0f);
    taken = 0;
  }
  void fold() {
    if (++taken % FOLD) return;
    for (size_t e = 0; e < recent.size(); ++e) before[e] += recent[e], recent[e] = 0;
  }
};

// Loops over the features of a position. By themselves, and of what does not overlap: compilers vectorize no others.

void add(const x_t* __restrict v, float* __restrict sum, int64_t features) {
  for (int64_t e = 0; e < features; ++e) sum[e] += to_float(v[e]);
}

void scaled_sum(const float* __restrict a, const float* __restrict b, float factor, x_t* __restrict to,
                int64_t features) {
  for (int64_t e = 0; e < features; ++e) round_to(to + e, (a[e] + b[e]) * factor);
}

void scaled(const x_t* __restrict v, float factor, x_t* __restrict to, int64_t features) {
  for (int64_t e = 0; e < features; ++e) round_to(to + e, factor * to_float(v[e]));
}

float add_scaled_and_dot(const x_t* __restrict g, float factor, const x_t* __restrict y, float* __restrict sum,
                         int64_t features) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t e = 0; e < features; ++e) {
    const float mine = to_float(g[e]) * factor;
    sum[e] += mine;
    dot += mine * to_float(y[e]);
  }
  return dot;
}

float sum_and_dot(const float* __restrict a, const float* __restrict b, const x_t* __restrict v, x_t* __restrict to,
                  int64_t features) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t e = 0; e < features; ++e) {
    const float g = a[e] + b[e];
    dot += g * to_float(v[e]);
    round_to(to + e, g);
  }
  return dot;
}

void average(const Sizes& n, bool causal, Head<const x_t> value, Head<x_t> out, Sum& sum) {
  float *recent = sum.recent.data(), *before = sum.before.data();
  auto take = [&](int64_t at) {
    add(value[at], recent, n.features);
    sum.fold();
  };
  sum.clear();
  for (int64_t at = 0; at < n.keys && !causal; ++at) take(at);
  for (int64_t query = 0; query < n.queries; ++query) {
    if (causal && query < n.keys) take(query);
    scaled_sum(before, recent, share(n, causal, query), out[query], n.features);
  }
}

void clear(Head<x_t> rows, int64_t count, int64_t features) {
  for (int64_t at = 0; at < count; ++at) std::memset(rows[at], 0, features * sizeof(x_t));
}

// A score's gradient is what its value adds to the loss less what the average of all does. The keys' is its sum over
// the queries that see them, times the one query that these all are; the queries' is zero, as all keys are one.
void differentiate(const Sizes& n, Head<const x_t> grad, Head<const x_t> query, Head<const x_t> value,
                   Head<const x_t> out, Head<x_t> grad_query, Head<x_t> grad_key, Head<x_t> grad_value, float scale,
                   Sum& sum) {
  float *recent = sum.recent.data(), *before = sum.before.data();
  double average = 0;
  auto take = [&](int64_t at) {
    average += add_scaled_and_dot(grad[at], share(n, n.causal, at), out[at], recent, n.features);
    std::memset(grad_query[at], 0, n.features * sizeof(x_t));
    sum.fold();
  };
  auto give = [&](int64_t at) {
    const float dot = sum_and_dot(before, recent, value[at], grad_value[at], n.features);
    scaled(query[0], (float)(dot - average) * scale, grad_key[at], n.features);
  };
  sum.clear();
  for (int64_t at = 0; at < n.queries && !n.causal; ++at) take(at);
  for (int64_t at = std::max(n.queries, n.keys); at-- > 0;) {
    if (n.causal && at < n.queries) take(at);
    if (at < n.keys) give(at);
  }
}

}  // namespace

// Kinds: one for each head; live ones are left out. Strides: three for each tensor, in order.
extern "C" void forward(const Sizes* n, const Kind* kinds, const x_t* value, x_t* out, const int64_t* strides,
                        int threads) {
#pragma omp parallel num_threads(threads)
  {
    Sum sum(n->features);
#pragma omp for schedule(dynamic, 1)
    for (int64_t head = 0; head < n->batch * n->heads; ++head) {
      const Kind kind = kinds[head % n->heads];
      if (kind == LIVE) continue;
      average(*n, n->causal && kind == UNIFORM, {value, strides, *n, head}, {out, strides + 3, *n, head}, sum);
    }
  }
}

extern "C" void backward(const Sizes* n, const Kind* kinds, const x_t* grad, const x_t* query, const x_t* value,
                         const x_t* out, x_t* grad_query, x_t* grad_key, x_t* grad_value, const int64_t* strides,
                         float scale, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Sum sum(n->features);
#pragma omp for schedule(dynamic, 1)
    for (int64_t head = 0; head < n->batch * n->heads; ++head) {
      const Kind kind = kinds[head % n->heads];
      if (kind == LIVE) continue;
      const Head<x_t> dq(grad_query, strides + 12, *n, head), dk(grad_key, strides + 15, *n, head),
          dv(grad_value, strides + 18, *n, head);
      if (kind == DEAD || n->queries == 0) {
        clear(dq, n->queries, n->features), clear(dk, n->keys, n->features), clear(dv, n->keys, n->features);
      } else {
        differentiate(*n, {grad, strides, *n, head}, {query, strides + 3, *n, head}, {value, strides + 6, *n, head},
                      {out, strides + 9, *n, head}, dq, dk, dv, scale, sum);
      }
    }
  }
}
"""
