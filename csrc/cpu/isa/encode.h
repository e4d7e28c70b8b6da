// SPDX-License-Identifier: Apache-2.0
// What topk_encode and grad_topk_encode share: the tile's product, the walk ahead, the bound of a
// screened score and the rescoring. The mathematics is told in encode.cpp.
#pragma once

#include "gate.h"

namespace ksae::cpu::KSAE_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 accumulators, 2 weights, 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 + 2 + 1 of 16 registers
#else
constexpr int kTileRows = 2;  // 2 x 2 pairs of SSE registers
#endif
constexpr int kPanel = 2 * kWidth;

// Steps of the inner loop: columns, or pairs of columns.
inline int64_t steps(const EncodeChunk& c) {
  return c.scoring == Scoring::kFloat ? c.p->d : (c.p->d + 1) / 2;
}

inline float* packed_group(const EncodeChunk& c, int64_t group) {
  return static_cast<float*>(c.w_pack) + group % c.slots * c.panels * steps(c) * kPanel;
}

struct Scratch {
  float* row;      // [d + pad]
  uint32_t* keys;  // [capacity]
  uint64_t* sort;  // [2 capacity]
};
inline Scratch scratch_of(const EncodeChunk& c, void* base) {
  Scratch s;
  s.row = static_cast<float*>(base);
  s.keys = reinterpret_cast<uint32_t*>(s.row + c.p->d + kVectorPad);
  s.sort = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(s.keys + c.capacity) + 7) & ~7);
  return s;
}

inline int64_t row_of(const EncodeChunk& c, int64_t r) { return c.rows ? c.rows[r] : c.row0 + r; }
inline int64_t latent_of(const EncodeChunk& c, int64_t m) { return c.ids ? c.ids[m] : m; }

// Defined in encode_pack.cpp.
float rounded_up(double x);
double norm_bound(float squares, int64_t d);
void pack_x(const EncodeChunk& c, int64_t tile0, int64_t tile1, void* scratch);
void pack_w(const EncodeChunk& c, int64_t group, int64_t panel);

// kScreen: the proven bound of |score - screened score| of candidate m on row r.
KSAE_INLINE float margin(const EncodeChunk& c, int64_t r, int32_t m) {
  const float* b = c.bound_w + (m / kPanel) * 3 * kPanel + m % kPanel;
  return b[0] * c.bound_x[2 * r] + b[kPanel] * c.bound_x[2 * r + 1] + b[2 * kPanel];
}

// The products of a tile of packed rows with a panel of packed weights.
template <Scoring kScoring>
KSAE_INLINE void product(const float* x, const float* w, int64_t n_steps,
                         Vec (&acc)[kTileRows][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = splat(0);
  for (int64_t s = 0; s < n_steps; ++s, x += kTileRows, w += kPanel) {
    const Vec w0 = load(w), w1 = load(w + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec a = splat(x[r]);
      if constexpr (kScoring == Scoring::kFloat) {
        acc[r][0] = fma(a, w0, acc[r][0]);
        acc[r][1] = fma(a, w1, acc[r][1]);
      } else {
#if defined(__AVX512BF16__)
        acc[r][0].v = _mm512_dpbf16_ps(acc[r][0].v, (__m512bh)a.v, (__m512bh)w0.v);
        acc[r][1].v = _mm512_dpbf16_ps(acc[r][1].v, (__m512bh)a.v, (__m512bh)w1.v);
#endif
      }
    }
  }
}

// Walks through the weights that this thread will pack next (its share, if all are in step), a few
// lines at a time, so that they are in L2 when their turn comes.
struct Ahead {
  const char* W;
  int64_t panel_bytes, panel, end, step, line, lines;  // panels [panel, end) by step; lines a call

  Ahead(const EncodeChunk& c, int64_t group, int rank, int size, int64_t calls) {
    const int64_t width = c.p->dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t full = c.M / kPanel, first = (group + 1) * c.panels;
    W = static_cast<const char*>(c.p->W_enc);
    panel_bytes = kPanel * c.p->d * width;
    panel = first + rank;
    end = c.ids ? 0 : (first + c.panels < full ? first + c.panels : full);
    step = size;
    line = 0;
    const int64_t total = (c.panels / size + 1) * (panel_bytes / 64 + 1);
    lines = total / (calls > 0 ? calls : 1) + 1;
    if (lines > 64) lines = 64;
  }
  KSAE_INLINE void advance() {
    if (panel >= end) return;
    const char* from = W + panel * panel_bytes;
    for (int64_t i = 0; i < lines; ++i, line += 64) __builtin_prefetch(from + line, 0, 2);
    if (line >= panel_bytes) {
      line = 0;
      panel += step;
    }
  }
};

// Lists the survivors of rows [row0, row1) in the order of their latents, to within a bucket of at
// least bucket / 2 latents and there by row; each in c.pairs + row0 * capacity as (row - row0) *
// capacity + place in the row. Returns their number.
inline int64_t by_latent(const EncodeChunk& c, int64_t row0, int64_t row1, int64_t bucket) {
  constexpr int kBuckets = 1024;
  const int64_t capacity = c.capacity;
  uint32_t* pairs = c.pairs + row0 * capacity;
  int shift = 0;
  while ((c.M >> shift) >= kBuckets || (int64_t(2) << shift) <= bucket) ++shift;
  uint32_t first[kBuckets + 1] = {};
  const auto each = [&](auto f) {
    for (int64_t r = row0; r < row1; ++r)
      for (int32_t i = 0; !c.redo[r] && i < c.count[r]; ++i) f(r * capacity + i);
  };
  each([&](int64_t at) { ++first[(c.index[at] >> shift) + 1]; });
  for (int b = 0; b < kBuckets; ++b) first[b + 1] += first[b];
  const int64_t n = first[kBuckets];
  each([&](int64_t at) { pairs[first[c.index[at] >> shift]++] = uint32_t(at - row0 * capacity); });
  return n;
}

// Float32 scores of the survivors of rows [row0, row1), by the chain of score_tile<kFloat>, kWidth
// (row, latent) pairs at a time. Pairs are taken in the order of their latents (to within a bucket
// that fits L2), so that W comes from memory once and x, the smaller table, from cache.
// Tried: row by row, W gathered from memory: no slower on one busy core (216 against 229 ms a call
// at F=24576, k=32); prefetching to L2 instead of L1: 10 % slower.
inline void rescore(const EncodeChunk& c, int64_t row0, int64_t row1) {
  const int64_t d = c.p->d, capacity = c.capacity;
  const auto* W = static_cast<const float*>(c.p->W_enc);
  const auto* X = static_cast<const float*>(c.p->x);
  const auto* b_dec = static_cast<const float*>(c.p->b_dec);
  const int64_t n = by_latent(c, row0, row1, 1);
  const uint32_t* pairs = c.pairs + row0 * capacity;
  const float *w[2][kWidth], *x[2][kWidth];
  const auto point = [&](int side, int64_t i) {
    for (int l = 0; l < kWidth; ++l) {
      const int64_t at = row0 * capacity + pairs[i + l < n ? i + l : n - 1];
      w[side][l] = W + latent_of(c, c.index[at]) * d;
      x[side][l] = X + row_of(c, at / capacity) * d;
    }
  };
  if (n) point(0, 0);
  for (int64_t i = 0, side = 0; i < n; i += kWidth, side ^= 1) {
    if (i + kWidth < n) point(int(side ^ 1), i + kWidth);
    const auto &wi = w[side], &xi = x[side], &next_w = w[side ^ 1], &next_x = x[side ^ 1];
    const bool more = i + kWidth < n;
    Vec acc = splat(0), wb[kWidth], xb[kWidth];
    for (int64_t j = 0; j < d; j += kWidth) {
      const int lanes = d - j < kWidth ? int(d - j) : kWidth;
      const Vec b = b_dec ? load_n(b_dec + j, lanes) : splat(0);
      for (int l = 0; l < kWidth; ++l) {
        wb[l] = lanes == kWidth ? load(wi[l] + j) : load_n(wi[l] + j, lanes);
        xb[l] = (lanes == kWidth ? load(xi[l] + j) : load_n(xi[l] + j, lanes)) - b;
        if (more) {
          __builtin_prefetch(next_w[l] + j);
          __builtin_prefetch(next_x[l] + j);
        }
      }
      transpose(wb);
      transpose(xb);
      for (int s = 0; s < lanes; ++s) acc = fma(xb[s], wb[s], acc);
    }
    float scores[kWidth];
    store(scores, acc);
    for (int l = 0; l < kWidth && i + l < n; ++l) {
      const int64_t at = row0 * capacity + pairs[i + l];
      c.score[at] = scores[l] + c.bias[c.index[at]];
    }
  }
}

}  // namespace ksae::cpu::KSAE_ISA
