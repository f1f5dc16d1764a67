"""C++ for uniform attention: each query averages the values that it sees, and what that makes of gradients.

One walk over the positions of a head forward, one backward. Causal attention sums up as it goes; else all is summed up
first. Sums are kept in two parts, of the latest positions and of all before, so that a long sequence rounds little.
"""

import torch

from . import cpp_vectors
from .isa import Isa


def source(isa: Isa, dtype: torch.dtype) -> str:
    """C++ for operands of one type."""
    return (
        f"// Averages of attention's values, {dtype}, {isa.name}.\n"
        "// Generated; kept beside the library for whoever wants to read it.\n"
        + cpp_vectors.prelude(isa).replace("#include <omp.h>", "#include <omp.h>\n#include <vector>")
        + f"\ntypedef {cpp_vectors.SCALARS[str(dtype)]} x_t;\n"
        + _BODY
    )


_BODY = """
constexpr int FOLD = 64;  // positions that are summed up by themselves

struct Sizes { int64_t batch, heads, queries, keys, features, causal; };

// [batch, heads, length, features], with a unit stride along features.
template <class T> struct Tensor {
  T* data;
  const int64_t* stride;
  T* row(int64_t head, const Sizes& n, int64_t at) const {
    return data + head / n.heads * stride[0] + head % n.heads * stride[1] + at * stride[2];
  }
};

float share(const Sizes& n, int64_t query) { return 1.0f / (n.causal ? std::min(query + 1, n.keys) : n.keys); }

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

void average(const Sizes& n, int64_t head, Tensor<const x_t> value, Tensor<x_t> out, Sum& sum) {
  float *recent = sum.recent.data(), *before = sum.before.data();
  auto take = [&](int64_t at) {
    const x_t* v = value.row(head, n, at);
    #pragma omp simd
    for (int64_t e = 0; e < n.features; ++e) recent[e] += to_float(v[e]);
    sum.fold();
  };
  sum.clear();
  for (int64_t at = 0; at < n.keys && !n.causal; ++at) take(at);
  for (int64_t query = 0; query < n.queries; ++query) {
    if (n.causal && query < n.keys) take(query);
    const float part = share(n, query);
    x_t* y = out.row(head, n, query);
    #pragma omp simd
    for (int64_t e = 0; e < n.features; ++e) round_to(y + e, (before[e] + recent[e]) * part);
  }
}

// A score's gradient is what its value adds to the loss less what the average of all does. The keys' is its sum over
// the queries that see them, times the one query that these all are; the queries' is zero, as all keys are one.
void differentiate(const Sizes& n, int64_t head, Tensor<const x_t> grad, Tensor<const x_t> query,
                   Tensor<const x_t> value, Tensor<const x_t> out, Tensor<x_t> grad_query, Tensor<x_t> grad_key,
                   Tensor<x_t> grad_value, float scale, Sum& sum) {
  float *recent = sum.recent.data(), *before = sum.before.data();
  double average = 0;
  auto take = [&](int64_t at) {
    const x_t *g = grad.row(head, n, at), *y = out.row(head, n, at);
    x_t* gq = grad_query.row(head, n, at);
    const float part = share(n, at);
    float dot = 0;
    #pragma omp simd reduction(+ : dot)
    for (int64_t e = 0; e < n.features; ++e) {
      const float mine = to_float(g[e]) * part;
      recent[e] += mine;
      dot += mine * to_float(y[e]);
      round_to(gq + e, 0.0f);
    }
    average += dot;
    sum.fold();
  };
  auto give = [&](int64_t at) {
    const x_t *v = value.row(head, n, at), *q = query.row(head, n, 0);
    x_t *gk = grad_key.row(head, n, at), *gv = grad_value.row(head, n, at);
    float dot = 0;
    #pragma omp simd reduction(+ : dot)
    for (int64_t e = 0; e < n.features; ++e) {
      const float g = before[e] + recent[e];
      dot += g * to_float(v[e]);
      round_to(gv + e, g);
    }
    const float score = (float)(dot - average) * scale;
    #pragma omp simd
    for (int64_t e = 0; e < n.features; ++e) round_to(gk + e, score * to_float(q[e]));
  };
  sum.clear();
  for (int64_t at = 0; at < n.queries && !n.causal; ++at) take(at);
  for (int64_t at = std::max(n.queries, n.keys); at-- > 0;) {
    if (n.causal && at < n.queries) take(at);
    if (at < n.keys) give(at);
  }
}

}  // namespace

// Strides: three for each tensor, in order.
extern "C" void forward(const Sizes* n, const x_t* value, x_t* out, const int64_t* strides, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Sum sum(n->features);
#pragma omp for
    for (int64_t head = 0; head < n->batch * n->heads; ++head)
      average(*n, head, {value, strides}, {out, strides + 3}, sum);
  }
}

extern "C" void backward(const Sizes* n, const x_t* grad, const x_t* query, const x_t* value, const x_t* out,
                         x_t* grad_query, x_t* grad_key, x_t* grad_value, const int64_t* strides, float scale,
                         int threads) {
#pragma omp parallel num_threads(threads)
  {
    Sum sum(n->features);
#pragma omp for
    for (int64_t head = 0; head < n->batch * n->heads; ++head)
      differentiate(*n, head, {grad, strides}, {query, strides + 3}, {value, strides + 6}, {out, strides + 9},
                    {grad_query, strides + 12}, {grad_key, strides + 15}, {grad_value, strides + 18}, scale, sum);
  }
}
"""
