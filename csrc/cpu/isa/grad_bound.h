// SPDX-License-Identifier: Apache-2.0
// The score of grad_topk_encode, its bounds, and the narrowing of a row's candidates by them. The
// mathematics is told in grad_encode.cpp.
#pragma once

#include "encode.h"

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
    const float h = is_signed ? -a : __builtin_fabsf(a);
    return h < 0 ? 0.0f : h;  // NaN stays
  }
  KSAE_INLINE float operator()(float u, float a, bool plain) const {
    return plain || u <= 0 ? u : u * (c0 + c1 * height(a));
  }
};

enum class Source { kExact, kDual, kPruned };  // of the bounds (grad_encode.cpp)

inline Source source_of(const EncodeChunk& c) {
  if (c.grad->pruned) return Source::kPruned;
  return c.scoring == Scoring::kScreen ? Source::kDual : Source::kExact;
}

// Bounds of candidate `at` of row r from its u and a, exact or screened.
KSAE_INLINE void bounds(const EncodeChunk& c, const Score& score, int64_t r, int64_t at, float& lo,
                        float& hi) {
  const GradChunk& g = *c.grad;
  const float u = c.score[at], a = g.a.score[at];
  const bool plain = g.plain[r];
  if (c.scoring != Scoring::kScreen) {
    lo = hi = score(u, a, plain);
    return;
  }
  const int32_t m = c.index[at];
  const float of_u = margin(c, r, m);
  lo = u - of_u;
  hi = u + of_u;
  if (plain) return;
  const float of_a = margin(g.a, r, m), h = score.height(a), least = h - of_a;
  if (!(h + of_a < __builtin_inff())) c.redo[r] = 1;
  const float f_lo = (score.c0 + score.c1 * (least > 0 ? least : 0)) * kNarrow;
  const float f_hi = (score.c0 + score.c1 * (h + of_a)) * kWiden;
  if (lo > 0) lo *= f_lo;
  if (!(hi <= 0)) hi *= f_hi;
}

// Candidates of a row when it has to be narrowed: a panel and a whole-vector store still fit.
inline int64_t room(const EncodeChunk& c) { return c.capacity - kPanel - kWidth; }

// Keeps the candidates that may still win and raises tau.
inline void narrow(const EncodeChunk& c, const Score& score, int64_t r, uint32_t* keys) {
  const GradChunk& g = *c.grad;
  const int64_t n = c.count[r], k = c.p->k, base = r * c.capacity;
  float *u = c.score + base, *a = g.a.score + base;
  int32_t* index = c.index + base;
  int64_t out = 0;
  if (n <= k) return;
  float lo, hi;
  for (int64_t i = 0; i < n; ++i) {
    bounds(c, score, r, base + i, lo, hi);
    keys[i] = order_key(lo);
  }
  const uint32_t kth = kth_key(keys, n, k);
  const auto keep = [&](int64_t i) {
    u[out] = u[i];
    a[out] = a[i];
    index[out++] = index[i];
  };
  if (c.scoring != Scoring::kScreen) {  // exact: equal scores by the smaller index
    int64_t equal = k;
    for (int64_t i = 0; i < n; ++i) equal -= keys[i] > kth;
    for (int64_t i = 0; i < n; ++i)
      if (keys[i] > kth || (keys[i] == kth && equal-- > 0)) keep(i);
    c.tau[r] = kth == 0xffffffffu ? __builtin_inff() : order_score(kth);
  } else {
    const float tau = order_score(kth);
    for (int64_t i = 0; i < n; ++i) {
      bounds(c, score, r, base + i, lo, hi);
      if (!(hi < tau)) keep(i);
    }
    c.tau[r] = tau;
  }
  c.count[r] = int32_t(out);
}

}  // namespace ksae::cpu::KSAE_ISA
