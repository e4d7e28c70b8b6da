// SPDX-License-Identifier: Apache-2.0
// What topk_encode and grad_topk_encode share: the tile's product, the walk ahead, the bound of a
// screened score and the rescoring. The mathematics is told in topk_encode.cpp.
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
constexpr int kFewRows = kTileRows > 4 ? kTileRows / 3 : 1;  // a token or a few
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

// The lanes of the panel from candidate m0 on that are candidates.
KSAE_INLINE uint32_t lanes_of(const EncodeChunk& c, int64_t m0) {
  return c.M - m0 < kPanel ? (1u << (c.M - m0)) - 1 : uint32_t((uint64_t(1) << kPanel) - 1);
}

// Defined in topk_encode_pack.cpp.
float rounded_up(double x);
double norm_bound(float squares, int64_t d);
void pack_x(const EncodeChunk& c, int64_t tile0, int64_t tile1, void* scratch);
void pack_w(const EncodeChunk& c, int64_t group, int64_t panel);

// kScreen: the proven bound of |score - screened score| of candidate m on row r.
KSAE_INLINE float margin(const EncodeChunk& c, int64_t r, int32_t m) {
  const float* b = c.bound_w + (m / kPanel) * 3 * kPanel + m % kPanel;
  return b[0] * c.bound_x[2 * r] + b[kPanel] * c.bound_x[2 * r + 1] + b[2 * kPanel];
}

// kScreen: the largest margin of row r in panel `at`, which the row remembers.
KSAE_INLINE float panel_margin(const EncodeChunk& c, int64_t at, int64_t r) {
  const float* b = c.bound_panel + 4 * at;
  const float bx0 = c.bound_x[2 * r], bx1 = c.bound_x[2 * r + 1];
  // Where a sum might overflow the bound proves nothing.
  if (!(bx0 * b[3] + b[2] * 0x1p20f < 1e37f)) c.redo[r] = 1;
  const float margin = b[0] * bx0 + b[1] * bx1 + b[2];
  if (margin > c.margin[r]) c.margin[r] = margin;
  return margin;
}

template <Scoring kScoring, int kRows>
KSAE_INLINE void product_of_rows(const float* x, const float* w, int64_t n_steps,
                                 Vec (&acc)[kTileRows][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = splat(0);
  for (int64_t s = 0; s < n_steps; ++s, x += kTileRows, w += kPanel) {
    const Vec w0 = load(w), w1 = load(w + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
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

// The products of a tile of packed rows, of which `rows` are wanted, with a panel of packed
// weights.
template <Scoring kScoring>
KSAE_INLINE void product(int64_t rows, const float* x, const float* w, int64_t n_steps,
                         Vec (&acc)[kTileRows][2]) {
  if (rows <= kFewRows) {
    product_of_rows<kScoring, kFewRows>(x, w, n_steps, acc);
  } else {
    product_of_rows<kScoring, kTileRows>(x, w, n_steps, acc);
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

inline uint32_t* pairs_of(const EncodeChunk& c, int64_t row0) {
  return c.pairs + row0 * c.pair_stride;
}

// Lists the survivors of rows [row0, row1) in the order of their latents, to within a bucket of at
// least bucket / 2 latents and there by row; each in pairs_of(c, row0) as (row - row0) * capacity +
// place in the row. Returns their number.
inline int64_t by_latent(const EncodeChunk& c, int64_t row0, int64_t row1, int64_t bucket) {
  constexpr int kBuckets = 1024;
  const int64_t capacity = c.capacity;
  uint32_t* pairs = pairs_of(c, row0);
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

// to[s][l] = rows[l][j + s], s < lanes, less b[s] where there is a b; fetches ahead[l][at].
template <bool kWhole>
KSAE_INLINE void columns(const float* const* rows, const float* b, int64_t j, int lanes,
                         const float* const* ahead, int64_t at, float (*to)[kWidth]) {
  Vec block[kWidth], centre = splat(0);
  if (b) centre = kWhole ? load(b + j) : load_n(b + j, lanes);
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) {
    block[l] = kWhole ? load(rows[l] + j) : load_n(rows[l] + j, lanes);
    if (b) block[l] = block[l] - centre;
    __builtin_prefetch(ahead[l] + at);
  }
  transpose(block);
#pragma GCC unroll 16
  for (int s = 0; s < kWidth; ++s) store(to[s], block[s]);
}

// Where the kWidth (row, latent) pairs of a group lie.
struct Pairs {
  const float *w[kWidth], *x[kWidth];
};

// acc += columns [j, j + lanes) of the pairs' chains; fetches column `at` of `ahead`.
template <bool kWhole>
KSAE_INLINE void rescore_columns(const Pairs& p, const float* b_dec, int64_t j, int lanes,
                                 const Pairs& ahead, int64_t at, Vec& acc) {
  alignas(64) float w[kWidth][kWidth], x[kWidth][kWidth];
  columns<kWhole>(p.w, nullptr, j, lanes, ahead.w, at, w);
  columns<kWhole>(p.x, b_dec, j, lanes, ahead.x, at, x);
  for (int s = 0; s < lanes; ++s) acc = fma(load(x[s]), load(w[s]), acc);
}

// Float32 scores of n (row, latent) pairs, by the chain of score_tile<kFloat>, kWidth
// pairs at a time: both sides are transposed so that a pair is a lane. Pairs are taken in the order
// of their latents, so that W comes from memory once and x, the smaller table, from cache.
// Tried: row by row, W gathered from memory: no slower on one busy core (216 against 229 ms a call
// at F=24576, k=32); two groups at a time against the latency of the chain: 1.2 times slower;
// fetching the whole of the next group, which is larger than L1: slower.
// place(i, w, x) says where pair i lies, put(i, score) takes its score without the bias.
template <class Place, class Put>
inline void rescore_pairs(const EncodeChunk& c, int64_t n, Place place, Put put) {
  constexpr int64_t kFetch =
      6 * kWidth;  // columns between the fetch and the use (3 to 8: the same)
  const int64_t d = c.p->d, whole = d / kWidth * kWidth;
  const auto* b_dec = static_cast<const float*>(c.p->b_dec);
  Pairs groups[2];
  const auto point = [&](Pairs& p, int64_t i) {
    for (int l = 0; l < kWidth; ++l) place(i + l < n ? i + l : n - 1, p.w[l], p.x[l]);
  };
  if (n) point(groups[0], 0);
  for (int64_t i = 0, side = 0; i < n; i += kWidth, side ^= 1) {
    const Pairs& p = groups[side];
    Pairs& next = groups[side ^ 1];
    point(next, i + kWidth);
    Vec acc = splat(0);
    for (int64_t j = 0; j < whole; j += kWidth) {
      const int64_t at = j + kFetch;
      const bool here = at < whole;
      rescore_columns<true>(p, b_dec, j, kWidth, here ? p : next, here ? at : at - whole, acc);
    }
    if (whole < d) rescore_columns<false>(p, b_dec, whole, int(d - whole), next, 0, acc);
    float scores[kWidth];
    store(scores, acc);
    for (int l = 0; l < kWidth && i + l < n; ++l) put(i + l, scores[l]);
  }
}

// Float32 scores of the survivors of rows [row0, row1).
inline void rescore(const EncodeChunk& c, int64_t row0, int64_t row1) {
  const int64_t d = c.p->d, capacity = c.capacity;
  const auto* W = static_cast<const float*>(c.p->W_enc);
  const auto* X = static_cast<const float*>(c.p->x);
  const int64_t n = by_latent(c, row0, row1, 1);
  const uint32_t* pairs = pairs_of(c, row0);
  const auto place = [&](int64_t i, const float*& w, const float*& x) {
    const int64_t at = row0 * capacity + pairs[i];
    w = W + latent_of(c, c.index[at]) * d;
    x = X + row_of(c, at / capacity) * d;
  };
  rescore_pairs(c, n, place, [&](int64_t i, float score) {
    const int64_t at = row0 * capacity + pairs[i];
    c.score[at] = score + c.bias[c.index[at]];
  });
}

}  // namespace ksae::cpu::KSAE_ISA
