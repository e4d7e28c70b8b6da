// SPDX-License-Identifier: Apache-2.0
// Latent-major pass. For one latent, everything that training does to its two rows: values
// gradient, dW_dec, dW_enc, db_enc, projection, Adam, unit norm. Gradients live in L1 only.
//
// For each token n that chose latent i with v > 0 (r = scale * residual of the loss term):
//   dv = <r_n, W_dec[i]>;  dW_dec += v r_n;  dW_enc += dv (x_n - b_dec);  db_enc += dv
// Cost: bytes 24 a parameter (weights and two moments, read and written; + 2 for a 16-bit copy),
// plus (d_in + d_out) elements gathered a hit, from L3 where residual and x fit. Flops 6 d a hit,
// 12 a parameter. Sums run in token order, so bits depend on nothing else.
// Limits: a latent is one thread's: one that every token selects is 2 N d elements of serial work.
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

template <class T>
void backward_weight_latents(const DecodeBackwardWeightParams& p, const int32_t* offsets,
                             const int32_t* order, int64_t i0, int64_t i1, float* acc) {
  const int64_t d = p.d;
  const T* grad = static_cast<const T*>(p.grad);
  for (int64_t i = i0; i < i1; ++i) {
    clear(acc, d);
    float total = 0;
    for (int32_t h = offsets[i]; h < offsets[i + 1]; ++h) {
      const float v = to_float(static_cast<const T*>(p.values)[order[h]]);
      const T* g = grad + order[h] / p.k * d;
      const Vec a = splat(v);
      for (int64_t c = 0; c < d; c += kWidth)
        store(acc + c, fma(a, load_part(g, c, d), load(acc + c)));
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
  return {splat(hyper[0]),     splat(hyper[2]), splat(1 - hyper[2]), splat(hyper[3]),
          splat(1 - hyper[3]), splat(hyper[1]), splat(hyper[4]),     splat(hyper[5])};
}
KSAE_INLINE Vec adam(const Adam& a, Vec theta, Vec grad, Vec& m, Vec& v) {
  const Vec g = grad * a.scale;
  m = a.beta1 * m + a.rest1 * g;
  v = a.beta2 * v + a.rest2 * g * g;
  return theta - a.step * m / (sqrt(v) / a.sqrt_bc2 + a.eps);
}

// Gradients of latent i into dec [d_out] and enc [d_in]; returns db_enc.
template <class T>
KSAE_INLINE float gradients(const LatentParams& p, int64_t i, float* dec, float* enc) {
  const T* w = static_cast<const T*>(p.W_dec) + i * p.d_out;
  const T* b = static_cast<const T*>(p.b_dec);
  float db = 0;
  clear(dec, p.d_out);
  clear(enc, p.d_in);
  for (int g = 0; g < p.n_groups; ++g) {
    const LatentGroup& group = p.groups[g];
    const float scale = p.scales[g];
    const T* values = static_cast<const T*>(group.values);
    for (int32_t h = group.offsets[i]; h < group.offsets[i + 1]; ++h) {
      const int64_t at = group.order[h], n = at / group.k;
      if (h + 1 < group.offsets[i + 1]) {  // the next rows are gathers that nothing foresees
        const int64_t next = group.order[h + 1] / group.k;
        const char* r1 = reinterpret_cast<const char*>(group.residual + next * p.d_out);
        const char* x1 =
            reinterpret_cast<const char*>(static_cast<const T*>(p.x) + next * p.d_in);
        for (int line = 0; line < 8; ++line) {
          __builtin_prefetch(r1 + 64 * line);
          __builtin_prefetch(x1 + 64 * line);
        }
      }
      const float v = to_float(values[at]);
      const float* r = group.residual + n * p.d_out;
      const Vec sv = splat(scale * v);
      const float dot = sum_over(p.d_out, [&](int64_t c, Vec acc) {
        const Vec rc = load_part(r, c, p.d_out);
        store(dec + c, fma(sv, rc, load(dec + c)));
        return fma(rc, load_part(w, c, p.d_out), acc);
      });
      if (!(v > 0)) continue;
      const float dv = scale * dot;
      const T* x = static_cast<const T*>(p.x) + n * p.d_in;
      const Vec sdv = splat(dv);
      if (b) {
        for (int64_t c = 0; c < p.d_in; c += kWidth) {
          const Vec xc = load_part(x, c, p.d_in) - load_part(b, c, p.d_in);
          store(enc + c, fma(sdv, xc, load(enc + c)));
        }
      } else {
        for (int64_t c = 0; c < p.d_in; c += kWidth)
          store(enc + c, fma(sdv, load_part(x, c, p.d_in), load(enc + c)));
      }
      db += dv;
    }
  }
  return db;
}

// Adam on one row; returns the squared norm of the new row.
template <class T>
KSAE_INLINE float update_row(const LatentParams& p, const Adam& a, int which, void* param,
                             int64_t at, int64_t d, const float* grad, bool has_grad) {
  T* low = static_cast<T*>(param) + at;
  float* theta = p.master[which] ? p.master[which] + at : reinterpret_cast<float*>(low);
  float* m = p.moments[2 * which] + at;
  float* v = p.moments[2 * which + 1] + at;
  return sum_over(d, [&](int64_t c, Vec acc) {
    Vec mc = load_part(m, c, d), vc = load_part(v, c, d);
    const Vec g = has_grad ? load(grad + c) : splat(0);
    Vec t = adam(a, load_part(theta, c, d), g, mc, vc);
    store_part(m, mc, c, d);
    store_part(v, vc, c, d);
    store_part(theta, t, c, d);
    if constexpr (sizeof(T) == 2) store_part(low, t, c, d);
    if (c + kWidth > d) {  // lanes past the row: eps = 0 makes them 0 / 0
      float lanes[kWidth] = {};
      store_n(lanes, t, int(d - c));
      t = load(lanes);
    }
    return fma(t, t, acc);
  });
}

template <class T>
void latents(const LatentParams& p, int64_t i0, int64_t i1, float* scratch, float* grad_b_dec,
             bool update) {
  float* dec = scratch;
  float* enc = dec + p.d_out + kVectorPad;
  const Adam a = update ? adam_of(p.hyper) : Adam{};
  for (int64_t i = i0; i < i1; ++i) {
    bool hit = false;
    for (int g = 0; g < p.n_groups; ++g)
      hit |= p.groups[g].offsets[i] < p.groups[g].offsets[i + 1];
    const int64_t at_dec = i * p.d_out, at_enc = i * p.d_in;
    float db = 0;
    if (hit) {
      db = gradients<T>(p, i, dec, enc);
      // The encoder path of db_dec, with W_enc as the forward used it.
      const T* w_enc = static_cast<const T*>(p.W_enc) + at_enc;
      const Vec s = splat(db);
      for (int64_t c = 0; c < p.d_in; c += kWidth)
        store(grad_b_dec + c, fma(s, load_part(w_enc, c, p.d_in), load(grad_b_dec + c)));
      if (p.project) {
        const float* w = p.master[2] ? p.master[2] + at_dec : static_cast<float*>(p.W_dec) + at_dec;
        const float ww = sum_over(p.d_out, [&](int64_t c, Vec acc) {
          const Vec wc = load_part(w, c, p.d_out);
          return fma(wc, wc, acc);
        });
        const float gw = sum_over(p.d_out, [&](int64_t c, Vec acc) {
          return fma(load(dec + c), load_part(w, c, p.d_out), acc);
        });
        if (ww > 0) {
          const Vec f = splat(-gw / ww);
          for (int64_t c = 0; c < p.d_out; c += kWidth)
            store(dec + c, fma(f, load_part(w, c, p.d_out), load(dec + c)));
        }
      }
    }
    if (!update) {
      double squares = 0;
      if (hit) {
        for (int64_t c = 0; c < p.d_in; ++c) squares += double(enc[c]) * enc[c];
        for (int64_t c = 0; c < p.d_out; ++c) squares += double(dec[c]) * dec[c];
      }
      p.grad_sq[i] = squares + double(db) * db;
      continue;
    }
    update_row<T>(p, a, 0, p.W_enc, at_enc, p.d_in, enc, hit);
    const float bias_grad[kWidth] = {db};
    update_row<T>(p, a, 1, p.b_enc, i, 1, bias_grad, hit);
    const float squares = update_row<T>(p, a, 2, p.W_dec, at_dec, p.d_out, dec, hit);
    if (p.normalize && squares > 0) {
      T* low = static_cast<T*>(p.W_dec) + at_dec;
      float* theta = p.master[2] ? p.master[2] + at_dec : reinterpret_cast<float*>(low);
      const Vec norm = splat(__builtin_sqrtf(squares));
      for (int64_t c = 0; c < p.d_out; c += kWidth) {
        const Vec t = load_part(theta, c, p.d_out) / norm;
        store_part(theta, t, c, p.d_out);
        if constexpr (sizeof(T) == 2) store_part(low, t, c, p.d_out);
      }
    }
  }
}

void latent(const LatentParams& p, int64_t i0, int64_t i1, float* scratch, float* grad_b_dec,
            bool update) {
  with_dtype(p.dtype, [&](auto tag) {
    latents<typename decltype(tag)::type>(p, i0, i1, scratch, grad_b_dec, update);
  });
}

}  // namespace

void latent_table(Kernels& t) {
  t.backward_weight = backward_weight;
  t.latent = latent;
}

}  // namespace ksae::cpu::KSAE_ISA
