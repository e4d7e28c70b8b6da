// SPDX-License-Identifier: Apache-2.0
// Latent-major passes: the tokens that chose a latent are summed into its gradient row, which lives
// in L1 only: projection, Adam and unit norm follow at once.
//
// Cost of row_update: bytes 24 a parameter (weight and two moments, read and written; + 2 for a
// 16-bit copy) and d elements gathered a hit, from L2 or L3 where the table [N, d] fits; flops 2 d
// a hit, 12 a parameter. Sums run in token order, so bits depend on nothing else.
// Limits: a latent is one thread's: one that every token selects is N d elements of serial work.
// Encoder and decoder are separate passes: one table in cache at a time, three streams instead of
// six, and the decoder may be cut by columns so that a slice of the residual is all that exists.
#include "gate.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

template <class T>
KSAE_INLINE Vec load_part(const T* p, int64_t c, int64_t d) {
  return c + kWidth <= d ? load(p + c) : load_n(p + c, int(d - c));
}
template <class T>
KSAE_INLINE void store_part(T* p, Vec v, int64_t c, int64_t d) {
  if (c + kWidth <= d) {
    store(p + c, v);
  } else {
    store_n(p + c, v, int(d - c));
  }
}

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

void clear(float* p, int64_t n) {
  for (int64_t c = 0; c < n; ++c) p[c] = 0;
}

// acc[c] += coefficient * (row[c] - centre[c])
template <class Row>
KSAE_INLINE void add_row(float* acc, float coefficient, const Row* row, const Row* centre,
                         int64_t d) {
  const Vec a = splat(coefficient);
  int64_t c = 0;
  if (centre) {
    for (; c + kWidth <= d; c += kWidth)
      store(acc + c, fma(a, load(row + c) - load(centre + c), load(acc + c)));
  } else {
    for (; c + kWidth <= d; c += kWidth) store(acc + c, fma(a, load(row + c), load(acc + c)));
  }
  if (c < d) {
    Vec r = load_n(row + c, int(d - c));
    if (centre) r = r - load_n(centre + c, int(d - c));
    store(acc + c, fma(a, r, load(acc + c)));
  }
}

template <class T>
void backward_weight_latents(const DecodeBackwardWeightParams& p, const int32_t* offsets,
                             const int32_t* order, int64_t i0, int64_t i1, float* acc) {
  const int64_t d = p.d;
  const T* grad = static_cast<const T*>(p.grad);
  for (int64_t i = i0; i < i1; ++i) {
    clear(acc, d + kWidth);
    float total = 0;
    for (int32_t h = offsets[i]; h < offsets[i + 1]; ++h) {
      const float v = to_float(static_cast<const T*>(p.values)[order[h]]);
      add_row<T>(acc, v, grad + order[h] / p.k * d, nullptr, d);
      total += v;
    }
    T* out = static_cast<T*>(p.grad_W) + i * d;
    for (int64_t c = 0; c < d; c += kWidth) store_part(out, load(acc + c), c, d);
    from_float(total, static_cast<T*>(p.value_sum)[i]);
  }
}

void backward_weight(const DecodeBackwardWeightParams& p, const int32_t* offsets,
                     const int32_t* order, int64_t i0, int64_t i1, float* scratch) {
  with_dtype(p.dtype, [&](auto tag) {
    backward_weight_latents<typename decltype(tag)::type>(p, offsets, order, i0, i1, scratch);
  });
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

void latent_sums(const LatentSumsParams& p, int64_t i0, int64_t i1) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = i0; i < i1; ++i) {
      double bias = 0, grad_dot_w = 0;
      for (int g = 0; g < p.n_groups; ++g) {
        const LatentSumsGroup& group = p.groups[g];
        double b = 0, w = 0;
        for (int32_t h = group.offsets[i]; h < group.offsets[i + 1]; ++h) {
          const double grad = group.grads[group.order[h]];
          b += grad;
          w += grad * to_float(static_cast<const T*>(group.values)[group.order[h]]);
        }
        bias += p.scales[g] * b;
        grad_dot_w += p.scales[g] * w;
      }
      p.grad_b_enc[i] = float(bias);
      p.grad_dot_w[i] = float(grad_dot_w);
    }
  });
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
            reinterpret_cast<const char*>(rows + group.order[h + 1] / group.k * p.columns);
        for (int64_t b = 0; b < int64_t(p.columns * sizeof(Row)); b += 64)
          __builtin_prefetch(next + b);
      }
      add_row(grad, p.scales[g] * to_float(coefficients[at]), rows + at / group.k * p.columns,
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
  for (int64_t i = i0; i < i1; ++i) {
    bool hit = false;
    for (int g = 0; g < p.n_groups; ++g) hit |= p.groups[g].offsets[i] < p.groups[g].offsets[i + 1];
    if (hit && p.encoder) gradient_row<T, float, T>(p, i, grad, update);
    if (hit && !p.encoder) gradient_row<T, T, float>(p, i, grad, update);
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

void row_update(const RowUpdateParams& p, int64_t i0, int64_t i1, float* scratch, float* grad_b_dec,
                bool update) {
  with_dtype(p.dtype, [&](auto tag) {
    update_rows<typename decltype(tag)::type>(p, i0, i1, scratch, grad_b_dec, update);
  });
}

}  // namespace

void latent_table(Kernels& t) {
  t.backward_weight = backward_weight;
  t.latent_sums = latent_sums;
  t.row_update = row_update;
}

}  // namespace ksae::cpu::KSAE_ISA
