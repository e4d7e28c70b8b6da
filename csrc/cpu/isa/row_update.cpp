// SPDX-License-Identifier: Apache-2.0
// The pass over the rows of a matrix: the tokens that chose a latent are summed into its gradient
// row, which lives in L1 only: its square, or projection, Adam and unit norm follow at once.
//
// Cost: bytes 24 a parameter (weight and two moments, read and written; + 2 for a 16-bit copy) and
// d elements gathered an entry, from L2 or L3 where the table [N, d] fits; flops 2 d an entry, 12 a
// parameter. Sums run in token order, so bits depend on nothing else.
// Limits: a latent is one thread's: one that every token selects is N d elements of serial work.
// Encoder and decoder are separate passes: one table in cache at a time, three streams instead of
// six, and the decoder may be cut by columns so that a slice of the residual is all that exists.
#include "add_row.h"
#include "rows.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

// Sum over [0, d) in four vector chains; f(c, acc) adds column c to its chain.
template <class Fn>
KSAE_INLINE float sum_over(int64_t d, Fn f) {
  Vec acc[4] = {splat(0), splat(0), splat(0), splat(0)};
  int64_t c = 0;
  for (; c + 4 * kWidth <= d; c += 4 * kWidth) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) acc[s] = f(c + s * kWidth, acc[s]);
  }
  for (; c < d; c += kWidth) acc[0] = f(c, acc[0]);
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

struct Adam {
  Vec step, beta1, rest1, beta2, rest2, sqrt_bc2, eps, scale;
};
Adam adam_of(const float* hyper) {
  return {splat(hyper[0]), splat(hyper[2]), splat(hyper[6]), splat(hyper[3]),
          splat(hyper[7]), splat(hyper[1]), splat(hyper[4]), splat(hyper[5])};
}
KSAE_INLINE Vec adam(const Adam& a, Vec theta, Vec grad, Vec& m, Vec& v) {
  const Vec g = grad * a.scale;
  m = a.beta1 * m + a.rest1 * g;
  v = a.beta2 * v + a.rest2 * g * g;
  return theta - a.step * m / (sqrt(v) / a.sqrt_bc2 + a.eps);
}

// The gradient of columns [start, start + columns) of row i.
template <class T, class Coefficient, class Row>
KSAE_INLINE void gradient_row(const RowUpdateParams& p, int64_t i, float* grad, bool update) {
  clear(grad, p.columns + kWidth);
  for (int g = 0; g < p.n_groups; ++g) {
    const RowGroup& group = p.groups[g];
    const auto* coefficients = static_cast<const Coefficient*>(group.coefficients);
    const Row* rows = static_cast<const Row*>(group.rows);
    for (int32_t h = group.offsets[i]; h < group.offsets[i + 1]; ++h) {
      const int32_t at = group.order[h];
      if (h + 1 < group.offsets[i + 1]) {  // the next row is a gather that no hardware foresees
        const auto* next =
            reinterpret_cast<const char*>(rows + row_of(group, group.order[h + 1]) * p.columns);
        for (int64_t b = 0; b < int64_t(p.columns * sizeof(Row)); b += 64)
          __builtin_prefetch(next + b);
      }
      add_row(grad, p.scales[g] * to_float(coefficients[at]), rows + row_of(group, at) * p.columns,
              static_cast<const Row*>(p.centre), p.columns);
    }
  }
  if (p.grad_dot_w && p.grad_dot_w[i] != 0) {
    const T* w = static_cast<const T*>(p.W) + i * p.d;
    if (p.start == 0 || !update) {
      const float ww = sum_over(p.d, [&](int64_t c, Vec acc) {
        const Vec wc = load_part(w, c, p.d);
        return fma(wc, wc, acc);
      });
      const float along = ww > 0 ? p.grad_dot_w[i] / ww : 0;
      add_row<T>(grad, -along, w + p.start, nullptr, p.columns);
      if (update && p.columns < p.d) p.grad_dot_w[i] = along;
    } else {
      add_row<T>(grad, -p.grad_dot_w[i], w + p.start, nullptr, p.columns);
    }
  }
}

// Adam on the columns of row i.
template <class T, bool kGrad>
KSAE_INLINE void adam_row(const RowUpdateParams& p, const Adam& a, int64_t i, const float* grad) {
  const int64_t at = i * p.d + p.start, d = p.columns;
  T* low = static_cast<T*>(p.W) + at;
  float* theta = p.master ? p.master + at : reinterpret_cast<float*>(low);
  float *m = p.m + at, *v = p.v + at;
  for (int64_t c = 0; c < d; c += kWidth) {
    Vec mc = load_part(m, c, d), vc = load_part(v, c, d);
    const Vec t = adam(a, load_part(theta, c, d), kGrad ? load(grad + c) : splat(0), mc, vc);
    store_part(m, mc, c, d);
    store_part(v, vc, c, d);
    store_part(theta, t, c, d);
    if constexpr (sizeof(T) == 2) store_part(low, t, c, d);
  }
}

template <class T>
KSAE_INLINE void normalize_row(const RowUpdateParams& p, int64_t i) {
  T* low = static_cast<T*>(p.W) + i * p.d;
  float* theta = p.master ? p.master + i * p.d : reinterpret_cast<float*>(low);
  const float squares = sum_over(p.d, [&](int64_t c, Vec acc) {
    const Vec t = load_part(theta, c, p.d);
    return fma(t, t, acc);
  });
  if (!(squares > 0)) return;
  const Vec norm = splat(__builtin_sqrtf(squares));
  for (int64_t c = 0; c < p.d; c += kWidth) {
    const Vec t = load_part(theta, c, p.d) / norm;
    store_part(theta, t, c, p.d);
    if constexpr (sizeof(T) == 2) store_part(low, t, c, p.d);
  }
}

template <class T>
void update_rows(const RowUpdateParams& p, int64_t i0, int64_t i1, float* grad, float* grad_b_dec,
                 bool update) {
  const Adam a = update ? adam_of(p.hyper) : Adam{};
  const bool stored_rows = p.rows_dtype == p.dtype, stored = p.coefficients_dtype == p.dtype;
  for (int64_t i = i0; i < i1; ++i) {
    bool hit = false;
    for (int g = 0; g < p.n_groups; ++g) hit |= p.groups[g].offsets[i] < p.groups[g].offsets[i + 1];
    if (hit && !stored_rows)
      gradient_row<T, T, float>(p, i, grad, update);
    else if (hit && stored)
      gradient_row<T, T, T>(p, i, grad, update);
    else if (hit)
      gradient_row<T, float, T>(p, i, grad, update);
    if (!update) {
      double squares = 0;
      for (int64_t c = 0; hit && c < p.columns; ++c) squares += double(grad[c]) * grad[c];
      p.grad_sq[i] = squares;
      continue;
    }
    if (hit && p.grad_b_dec)
      add_row<T>(grad_b_dec, p.grad_b_enc[i], static_cast<const T*>(p.W) + i * p.d, nullptr, p.d);
    if (hit) {
      adam_row<T, true>(p, a, i, grad);
    } else {
      adam_row<T, false>(p, a, i, grad);
    }
    if (p.normalize) normalize_row<T>(p, i);
  }
}

}  // namespace

void row_pass(const RowUpdateParams& p, int64_t i0, int64_t i1, float* scratch, float* grad_b_dec,
              bool update) {
  with_dtype(p.dtype, [&](auto tag) {
    update_rows<typename decltype(tag)::type>(p, i0, i1, scratch, grad_b_dec, update);
  });
}

}  // namespace ksae::cpu::KSAE_ISA
