// SPDX-License-Identifier: Apache-2.0
// The pruned route of grad_topk_encode: one tile product, a gate on u lifted by the most that the
// gradient can do, and dot products for what is left (see grad_topk_encode.cpp).
// Cost a row: 2 F d flops, d a dot product over the candidates, some 450 at beta |g| = 0.5, k=32,
// F=24576; about one in a panel passes the running gate, so appending has no branch on their
// number.
#pragma once

#include "dots.h"
#include "grad_bound.h"

namespace ksae::cpu::KSAE_ISA {

template <Scoring kScoring>
void pruned_tile(const EncodeChunk& c, const Score& score, const float* x, const float* w,
                 int64_t at, int64_t r0, const Scratch& s) {
  const GradChunk& g = *c.grad;
  const int rows = c.R - r0 < kTileRows ? int(c.R - r0) : kTileRows;
  Vec acc[kTileRows][2];
  product<kScoring>(rows, x, w, steps(c), acc);
  alignas(64) float u[kTileRows][kPanel], hi[kTileRows][kPanel];
  uint32_t hits[kTileRows];
  const int64_t m0 = at * kPanel;
  const uint32_t lanes = lanes_of(c, m0);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    float tau = 0, of_u = 0, limit = 0;
    if (r < rows) {
      tau = c.tau[r0 + r];
      limit = score.c1 * g.norm_g[r0 + r];  // 0 for a row that is selected by u
      if constexpr (kScoring == Scoring::kScreen) of_u = panel_margin(c, at, r0 + r);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int l = half * kWidth;
      const Vec value = acc[r][half] + load(c.bias + m0 + l), most = value + splat(of_u);
      const Vec lift = fma(splat(limit), load(g.norm_w + m0 + l), splat(1)) * splat(kWiden);
      const Vec bound = larger(most, most * lift);  // most <= 0 is not lifted
      store(u[r] + l, value);
      store(hi[r] + l, bound);
      const uint32_t passed = not_le(bound, splat(tau));
      hits[r] = half ? hits[r] | passed << kWidth : passed;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) break;
    const int64_t r = r0 + i;
    const uint32_t passed = hits[i] & lanes;
    if (!passed || c.redo[r]) continue;
    if (c.count[r] > room(c)) {
      narrow_bounded(c, score, r, true, s);
      if (c.count[r] > room(c) - c.p->k / 2) c.redo[r] = 1;
      if (c.redo[r]) continue;
    }
    constexpr uint32_t kHalf = uint32_t((uint64_t(1) << kWidth) - 1);
    int64_t to = r * c.capacity + c.count[r];
    for (int l = 0; l < kPanel; l += kWidth) {
      const uint32_t mask = passed >> l & kHalf;
      compress_iota(c.index + to, mask, int32_t(m0) + l);
      compress(c.score + to, mask, load(u[i] + l));
      to += compress(g.a.score + to, mask, load(hi[i] + l));
    }
    c.count[r] = int32_t(to - r * c.capacity);
  }
}

// a of the survivors of rows [row0, row1), a bucket of latents at a time: its rows of W_dec come
// from memory once and stay in L2, and a row of grad serves all its candidates there.
constexpr int64_t kBucketBytes = int64_t(512) << 10;
inline void dot_survivors(const EncodeChunk& c, int64_t row0, int64_t row1) {
  const GradChunk& g = *c.grad;
  const int64_t d = g.a.p->d, capacity = c.capacity;
  const auto* W = static_cast<const float*>(g.a.p->W_enc);
  const auto* G = static_cast<const float*>(g.a.p->x);
  const int64_t n = by_latent(c, row0, row1, kBucketBytes / (4 * d));
  const uint32_t* pairs = pairs_of(c, row0);
  const auto place = [&](int64_t i) { return row0 * capacity + pairs[i < n ? i : n - 1]; };
  for (int64_t i = 0; i < n;) {
    const int64_t r = place(i) / capacity, begin = r * capacity;
    const float *w[kDots], *next[kDots];
    float* out[kDots];
    int count = 0;
    for (; count < kDots && i + count < n; ++count) {
      const int64_t at = place(i + count);
      if (at < begin || at >= begin + capacity) break;  // of another row
      w[count] = W + c.index[at] * d;
      out[count] = g.a.score + at;
    }
    i += count;
    for (int l = 0; l < count; ++l) next[l] = W + c.index[place(i + l)] * d;
    float products[kDots];
    dots<3>(count, G + row_of(c, r) * d, w, d, next, products);
    for (int l = 0; l < count; ++l) *out[l] = products[l];
  }
}

}  // namespace ksae::cpu::KSAE_ISA
