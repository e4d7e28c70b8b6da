// SPDX-License-Identifier: Apache-2.0
// The score of grad_topk_encode, its bounds, and the narrowing of a row's candidates by them. The
// mathematics is told in grad_topk_encode.cpp.
#pragma once

#include "topk_encode.h"

namespace ksae::cpu::KSAE_ISA {

constexpr float kWiden = 1 + 0x1p-20f, kNarrow = 1 - 0x1p-20f;

struct Score {
  float c0, c1;
  bool is_signed;
  explicit Score(const GradEncodeParams& p)
      : c0(p.mode == GradMode::kMultiplicative ? 0.0f : 1.0f),
        c1(p.mode == GradMode::kMultiplicative ? 1.0f : p.beta),
        is_signed(p.mode == GradMode::kSigned) {}
  KSAE_INLINE float height(float a) const {
    const float least = is_signed ? 0.0f : a;
    return least > -a ? least : -a;  // |a| or relu(-a); NaN stays
  }
  KSAE_INLINE float operator()(float u, float a, bool plain) const {
    return plain || u <= 0 ? u : u * (c0 + c1 * height(a));
  }
};

enum class Source { kExact, kDual, kPruned };  // of the bounds (grad_topk_encode.cpp)

inline Source source_of(const EncodeChunk& c) {
  if (c.grad->pruned) return Source::kPruned;
  return c.scoring == Scoring::kScreen ? Source::kDual : Source::kExact;
}

// Candidates of a row when it has to be narrowed: a panel and a whole-vector store still fit.
inline int64_t room(const EncodeChunk& c) { return c.capacity - kPanel - kWidth; }

// Keeps the k best candidates of exact score (equal: the smaller index) and raises tau.
inline void narrow_exact(const EncodeChunk& c, const Score& score, int64_t r, uint32_t* keys) {
  const GradChunk& g = *c.grad;
  const int64_t n = c.count[r], k = c.p->k, base = r * c.capacity;
  if (n <= k) return;
  float *u = c.score + base, *a = g.a.score + base;
  int32_t* index = c.index + base;
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score(u[i], a[i], g.plain[r]));
  const uint32_t kth = kth_key(keys, n, k);
  int64_t equal = k, out = 0;
  for (int64_t i = 0; i < n; ++i) equal -= keys[i] > kth;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] > kth || (keys[i] == kth && equal-- > 0)) {
      u[out] = u[i];
      a[out] = a[i];
      index[out++] = index[i];
    }
  }
  c.tau[r] = kth == 0xffffffffu ? __builtin_inff() : order_score(kth);
  c.count[r] = int32_t(out);
}

// Keeps the candidates that may still win and raises tau. Margins are the row's largest, so that
// the loops look up none. `lifted`: a holds hi, which knows no a yet (pruned).
inline void narrow_bounded(const EncodeChunk& c, const Score& score, int64_t r, bool lifted,
                           const Scratch& s) {
  const GradChunk& g = *c.grad;
  const int64_t n = c.count[r], k = c.p->k, base = r * c.capacity;
  if (n <= k) return;
  float *u = c.score + base, *a = g.a.score + base, *hi = a;
  int32_t* index = c.index + base;
  const float of_u = c.scoring == Scoring::kScreen ? c.margin[r] : 0;
  if (lifted) {
    for (int64_t i = 0; i < n; ++i) s.keys[i] = order_key(u[i] - of_u);
  } else if (g.plain[r]) {
    hi = reinterpret_cast<float*>(s.sort);
    for (int64_t i = 0; i < n; ++i) {
      s.keys[i] = order_key(u[i] - of_u);
      hi[i] = u[i] + of_u;
    }
  } else {
    float* of_a = hi = reinterpret_cast<float*>(s.sort);
    if (g.pruned) {  // a dot product's margin goes with the norm of its row
      const float of_norm = float(g.a.p->d + 64) * 0x1p-22f * g.norm_g[r];
      for (int64_t i = 0; i < n; ++i) of_a[i] = of_norm * g.norm_w[index[i]];
    } else {
      for (int64_t i = 0; i < n; ++i) of_a[i] = g.a.margin[r];
    }
    const Score f = score;  // a copy, which no store in the loop can change
    uint32_t unbounded = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float h = f.height(a[i]), most_h = h + of_a[i], least_h = h - of_a[i];
      const float least = least_h > 0 ? least_h : 0, lo = u[i] - of_u, most = u[i] + of_u;
      const float lo_lifted = lo * ((f.c0 + f.c1 * least) * kNarrow);
      const float most_lifted = most * ((f.c0 + f.c1 * most_h) * kWiden);
      unbounded |= most_h < __builtin_inff() ? 0u : 1u;
      s.keys[i] = order_key(lo > 0 ? lo_lifted : lo);
      hi[i] = most <= 0 ? most : most_lifted;
    }
    if (unbounded) c.redo[r] = 1;
  }
  const float tau = order_score(kth_key(s.keys, n, k));
  const Vec t = splat(tau);
  int64_t out = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec most = load(hi + i), third = load(a + i);
    uint32_t mask = not_lt(most, t);
    if (n - i < kWidth) mask &= (1u << (n - i)) - 1;
    compress(index + out, mask, index + i);
    compress(u + out, mask, load(u + i));
    out += compress(a + out, mask, third);
  }
  c.tau[r] = tau;
  c.count[r] = int32_t(out);
}

}  // namespace ksae::cpu::KSAE_ISA
