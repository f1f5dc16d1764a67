"""C++ that makes a gate's gradient and its signals of a dense gradient, in one walk over gradient and weight."""

import torch

from . import cpp_vectors
from .isa import Isa


def source(isa: Isa, gradient_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """C++ for a dense gradient of one type and a weight of another; in the weight's type it is written."""
    return (
        cpp_vectors.prelude(f"The gradient of a gated weight from a dense one, {gradient_dtype} to {weight_dtype}", isa)
        + f"\ntypedef {cpp_vectors.SCALARS[str(gradient_dtype)]} g_t;\n"
        + f"typedef {cpp_vectors.SCALARS[str(weight_dtype)]} w_t;\n"
        + _BODY
    )


_BODY = """
enum Kind : uint8_t { MASKED, ACTIVE, PROBED };

// Adds up columns, by itself and of what does not overlap: compilers vectorize nothing else.
void add(const g_t* __restrict gradient, const w_t* __restrict weight, float* __restrict products,
         float* __restrict squares, int64_t k) {
  for (int64_t j = 0; j < k; ++j) {
    const float g = to_float(gradient[j]);
    products[j] += g * to_float(weight[j]);
    squares[j] += g * g;
  }
}

void convert(const g_t* from, w_t* __restrict to, int64_t k) {
  for (int64_t j = 0; j < k; ++j) round_to(to + j, to_float(from[j]));
}

double total(const float* from, const float* to) {
  double sum = 0;
  for (; from < to; ++from) sum += *from;
  return sum;
}

}  // namespace

// gradient and weight [n, k]; where their types are one, gradient and out may be the same. Row r of blocks lists its
// columns in indices, from offsets[r] on. signals [2, R, C]: of active blocks both sums, of probed ones the squares.
extern "C" void run(const g_t* gradient, const w_t* weight, w_t* out, int64_t n, int64_t k, int64_t rows,
                    int64_t columns, const int32_t* offsets, const int32_t* indices, const int32_t* probes,
                    int64_t probe_count, float* signals, int threads) {
  const int64_t R = (n + rows - 1) / rows, C = (k + columns - 1) / columns;
  std::vector<Kind> kinds(R * C, MASKED);
  for (int64_t i = 0; i < probe_count; ++i)
    if (probes[i] >= 0) kinds[probes[i]] = PROBED;
  for (int64_t r = 0; r < R; ++r)
    for (int32_t i = offsets[r]; i < offsets[r + 1]; ++i) kinds[r * C + indices[i]] = ACTIVE;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> products(k), squares(k);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; ++r) {
      std::fill(products.begin(), products.end(), 0.0f);
      std::fill(squares.begin(), squares.end(), 0.0f);
      const int64_t last = std::min(n, (r + 1) * rows);
      for (int64_t i = r * rows; i < last; ++i) {
        add(gradient + i * k, weight + i * k, products.data(), squares.data(), k);
        if ((const void*)out != gradient) convert(gradient + i * k, out + i * k, k);
      }
      for (int64_t c = 0; c < C; ++c) {
        const int64_t from = c * columns, to = std::min(k, from + columns);
        const Kind kind = kinds[r * C + c];
        signals[r * C + c] = kind == ACTIVE ? total(&products[from], products.data() + to) : 0;
        signals[(R + r) * C + c] = kind == MASKED ? 0 : total(&squares[from], squares.data() + to);
        for (int64_t i = r * rows; i < last && kind != ACTIVE; ++i)
          std::memset(out + i * k + from, 0, (to - from) * sizeof(w_t));
      }
    }
  }
}
"""
