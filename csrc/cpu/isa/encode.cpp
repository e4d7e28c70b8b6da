// SPDX-License-Identifier: Apache-2.0
// topk_encode, serial parts: pack, score a tile of rows x latents, gate it while it is in
// registers, select. The N x F scores are never stored.
//
// Scores: a register tile of kTileRows x kPanel; both operands packed so that the loop over d reads
// them in sequence. A score is one chain over d in order, whatever tile or chunk it sits in, so its
// bits depend on its row and latent alone (the rescoring below repeats that chain).
// Cost a row: 2 F d flops. Bytes: W once per chunk of rows (packed on the fly), the packed rows
// from L2, candidates in L1.
//
// Certified screening (float32, BF16 dot instructions). With w^, x^ rounded to bf16 and
// g = (d + 16) 2^-23 bounding either accumulation (its rounding is at most half of that),
//   |s - s^| <= |w - w^| |x| (1 + g) + |w^| (|x - x^| + g |x^| + g |x|) + 2^-20 |b| + d 2^-124 = m.
// tau = the k-th largest s^ - m so far bounds the k-th score from below; s^ + m <= tau loses. What
// remains (about 2 k a row) is rescored by the float32 chain: the result is the float32 result. A
// row that keeps too many, or whose scores might overflow, is marked and scored in full.
// Norms are computed in float32 and rounded up; a floor of d 2^-126 under each square sum covers
// squares lost to underflow.
#include "gate.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 accumulators, 2 weights, 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 + 2 + 1 of 16 registers
#else
constexpr int kTileRows = 2;  // 2 x 2 pairs of SSE registers
#endif
constexpr int kPanel = 2 * kWidth;

// Steps of the inner loop: columns, or pairs of columns.
int64_t steps(const EncodeChunk& c) {
  return c.scoring == Scoring::kFloat ? c.p->d : (c.p->d + 1) / 2;
}

float* packed_group(const EncodeChunk& c, int64_t group) {
  return static_cast<float*>(c.w_pack) + group % c.slots * c.panels * steps(c) * kPanel;
}

struct Scratch {
  float* row;      // [d + pad]
  uint32_t* keys;  // [capacity]
  uint64_t* sort;  // [2 capacity]
};
Scratch scratch_of(const EncodeChunk& c, void* base) {
  Scratch s;
  s.row = static_cast<float*>(base);
  s.keys = reinterpret_cast<uint32_t*>(s.row + c.p->d + kVectorPad);
  s.sort = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(s.keys + c.capacity) + 7) & ~7);
  return s;
}

int64_t row_of(const EncodeChunk& c, int64_t r) { return c.rows ? c.rows[r] : c.row0 + r; }
int64_t latent_of(const EncodeChunk& c, int64_t m) { return c.ids ? c.ids[m] : m; }

// x - b_dec of one row in float32, rounded to the storage type where b_dec is subtracted.
template <class T>
void centred_row(const EncodeChunk& c, int64_t n, float* row) {
  const int64_t d = c.p->d;
  const T* x = static_cast<const T*>(c.p->x) + n * d;
  const T* b = static_cast<const T*>(c.p->b_dec);
  for (int64_t j = 0; j < d; j += kWidth) {
    const int lanes = d - j < kWidth ? int(d - j) : kWidth;
    Vec v = load_n(x + j, lanes);
    if (b) {
      v = v - load_n(b + j, lanes);
      if constexpr (sizeof(T) == 2) {
        T rounded[kWidth];
        store(rounded, v);
        v = load(rounded);
      }
    }
    store(row + j, v);  // rows are padded: missing lanes are 0
  }
}

float rounded_up(double x) { return float(x * (1 + 1e-6)); }

// Upper bound of a norm from its float32 sum of squares.
double norm_bound(float squares, int64_t d) {
  return __builtin_sqrt(double(squares) * (1 + double(d + 64) * 0x1p-23) + double(d) * 0x1p-126);
}

void pack_x(const EncodeChunk& c, int64_t tile0, int64_t tile1, void* scratch) {
  float* row = scratch_of(c, scratch).row;
  const int64_t d = c.p->d, n_steps = steps(c);
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    float* out = static_cast<float*>(c.x_pack) + tile * n_steps * kTileRows;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t i = tile * kTileRows + r;
      if (i >= c.R) {
        for (int64_t s = 0; s < n_steps; ++s) out[s * kTileRows + r] = 0;
        continue;
      }
      with_dtype(c.p->dtype, [&](auto tag) {
        centred_row<typename decltype(tag)::type>(c, row_of(c, i), row);
      });
      c.count[i] = 0;
      c.tau[i] = __builtin_nanf("");
      if (c.scoring == Scoring::kFloat) {
        for (int64_t s = 0; s < d; ++s) out[s * kTileRows + r] = row[s];
        continue;
      }
      if (d % 2) row[d] = 0;
      for (int64_t s = 0; s < n_steps; ++s) {
        BF16 pair[2];
        from_float(row[2 * s], pair[0]);
        from_float(row[2 * s + 1], pair[1]);
        out[s * kTileRows + r] = float_of(pair[0].bits | uint32_t(pair[1].bits) << 16);
      }
      if (c.scoring != Scoring::kScreen) continue;
      Vec full = splat(0), rounded = splat(0), lost = splat(0);
      for (int64_t j = 0; j < d; j += kWidth) {
        const Vec v = load_n(row + j, d - j < kWidth ? int(d - j) : kWidth);
        BF16 h[kWidth];
        store(h, v);
        const Vec w = load(h), e = v - w;
        full = fma(v, v, full);
        rounded = fma(w, w, rounded);
        lost = fma(e, e, lost);
      }
      const double g = double(d + 16) * 0x1p-23, x = norm_bound(sum(full), d);
      c.redo[i] = 0;
      c.margin[i] = 0;
      c.bound_x[2 * i] = rounded_up(x * (1 + g) * c.p->slack);
      c.bound_x[2 * i + 1] = rounded_up(
          (norm_bound(sum(lost), d) + g * (norm_bound(sum(rounded), d) + x)) * c.p->slack);
    }
  }
}

#if defined(__AVX512BF16__)
// 32 values of a float32 row as 16 bf16 pairs; sums of squares for the bound are updated.
KSAE_INLINE Vec round_pairs(const float* w, Vec& rounded, Vec& lost) {
  const Vec lo = load(w), hi = load(w + 16);
  const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(hi.v, lo.v);
  const Vec rl = {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)), 16))};
  const Vec rh = {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1)), 16))};
  const Vec el = lo - rl, eh = hi - rh;
  rounded = fma(rl, rl, fma(rh, rh, rounded));
  lost = fma(el, el, fma(eh, eh, lost));
  return {_mm512_castsi512_ps(h)};
}
#endif

// Packs kWidth rows of weights (null: zeros) into lanes [0, kWidth) of a panel.
template <class T>
void pack_rows(const EncodeChunk& c, const T* const* w, float* panel, float* squares) {
  const int64_t d = c.p->d;
  Vec block[kWidth];
  (void)squares;
  if (c.scoring == Scoring::kFloat) {
    for (int64_t j = 0; j < d; j += kWidth) {
      const int lanes = d - j < kWidth ? int(d - j) : kWidth;
      for (int l = 0; l < kWidth; ++l)
        block[l] = !w[l] ? splat(0) : lanes == kWidth ? load(w[l] + j) : load_n(w[l] + j, lanes);
      transpose(block);
      for (int s = 0; s < lanes; ++s) store(panel + (j + s) * kPanel, block[s]);
    }
    return;
  }
#if defined(__AVX512BF16__)
  Vec rounded[kWidth], lost[kWidth];
  for (int l = 0; l < kWidth; ++l) rounded[l] = lost[l] = splat(0);
  for (int64_t j = 0; j < d; j += 2 * kWidth) {
    const int lanes = d - j < 2 * kWidth ? int(d - j) : 2 * kWidth;
    for (int l = 0; l < kWidth; ++l) {
      T part[2 * kWidth] = {};
      const T* from = part;
      if (w[l] && lanes == 2 * kWidth) {
        from = w[l] + j;
      } else if (w[l]) {
        for (int s = 0; s < lanes; ++s) part[s] = w[l][j + s];
      }
      if constexpr (sizeof(T) == 4) {
        block[l] = round_pairs(from, rounded[l], lost[l]);
      } else {
        block[l] = {_mm512_loadu_ps(from)};
      }
    }
    transpose(block);
    for (int s = 0; s < (lanes + 1) / 2; ++s) store(panel + (j / 2 + s) * kPanel, block[s]);
  }
  if (squares) {
    for (int l = 0; l < kWidth; ++l) {
      squares[2 * l] = sum(lost[l]);
      squares[2 * l + 1] = sum(rounded[l]);
    }
  }
#endif
}

void pack_w(const EncodeChunk& c, int64_t group, int64_t panel) {
  const int64_t d = c.p->d, at = group * c.panels + panel, m0 = at * kPanel;
  if (m0 >= c.M) return;
  float* out = packed_group(c, group) + panel * steps(c) * kPanel;
  float* bias = c.bias + m0;
  float squares[2 * kPanel] = {};  // |w - w^|^2, |w^|^2
  with_dtype(c.p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* w[kPanel];
    for (int l = 0; l < kPanel; ++l) {
      const bool valid = m0 + l < c.M;
      const int64_t i = valid ? latent_of(c, m0 + l) : 0;
      w[l] = valid ? static_cast<const T*>(c.p->W_enc) + i * d : nullptr;
      bias[l] = valid ? to_float(static_cast<const T*>(c.p->b_enc)[i]) : 0;
    }
    for (int half = 0; half < 2; ++half)
      pack_rows(c, w + half * kWidth, out + half * kWidth, squares + half * 2 * kWidth);
  });
  if (c.scoring != Scoring::kScreen) return;
  float* bound = c.bound_w + at * 3 * kPanel;
  float* panel_bound = c.bound_panel + 4 * at;  // the largest of each, and of |w|
  for (int j = 0; j < 4; ++j) panel_bound[j] = 0;
  for (int l = 0; l < kPanel; ++l) {
    const double lost = norm_bound(squares[2 * l], d), rounded = norm_bound(squares[2 * l + 1], d);
    bound[l] = rounded_up(lost);
    bound[kPanel + l] = rounded_up(rounded);
    bound[2 * kPanel + l] =
        (__builtin_fabsf(bias[l]) * 0x1p-20f + float(d) * 0x1p-124f) * c.p->slack;
    const float row[4] = {bound[l], bound[kPanel + l], bound[2 * kPanel + l],
                          rounded_up(lost + rounded)};
    for (int j = 0; j < 4; ++j)  // NaN comes in and stays
      if (row[j] > panel_bound[j] || row[j] != row[j]) panel_bound[j] = row[j];
  }
}

// kScreen: the proven bound of |score - screened score| of candidate m on row r.
KSAE_INLINE float margin(const EncodeChunk& c, int64_t r, int32_t m) {
  const float* b = c.bound_w + (m / kPanel) * 3 * kPanel + m % kPanel;
  return b[0] * c.bound_x[2 * r] + b[kPanel] * c.bound_x[2 * r + 1] + b[2 * kPanel];
}

// kScreen: keeps what may still win; returns tau. With too many left the row is marked.
float screen_refine(const EncodeChunk& c, int64_t r, uint32_t* keys) {
  float* score = c.score + r * c.capacity;
  int32_t* index = c.index + r * c.capacity;
  const int64_t n = c.count[r], k = c.p->k;
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score[i] - margin(c, r, index[i]));
  const float tau = order_score(kth_key(keys, n, k));
  int64_t out = 0;
  for (int64_t i = 0; i < n; ++i) {
    // Equal stays: it may tie with the k-th score and have the smaller index.
    if (!(score[i] + margin(c, r, index[i]) < tau)) {
      score[out] = score[i];
      index[out++] = index[i];
    }
  }
  c.count[r] = int32_t(out);
  return tau;
}

// The same with the largest margin that the row has met for every candidate: looser, but without a
// look at each one's bound.
float coarse_refine(const EncodeChunk& c, int64_t r, uint32_t* keys) {
  float* score = c.score + r * c.capacity;
  int32_t* index = c.index + r * c.capacity;
  const int64_t n = c.count[r];
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score[i]);
  const float margin = c.margin[r], tau = order_score(kth_key(keys, n, c.p->k)) - margin;
  c.count[r] = int32_t(keep_from(score, index, n, tau - margin));
  return tau;
}

template <Scoring kScoring>
void append(const EncodeChunk& c, int64_t r, int64_t m0, uint32_t hits, const float* tile,
            uint32_t* keys) {
  const int64_t full = c.capacity - kPanel - kWidth;  // room for a panel and a whole-vector store
  if (c.count[r] > full) {
    if constexpr (kScoring == Scoring::kScreen) {
      c.tau[r] = coarse_refine(c, r, keys);
      if (c.count[r] > full - c.p->k / 2) c.tau[r] = screen_refine(c, r, keys);
      if (c.count[r] > full - c.p->k / 2) c.redo[r] = 1;
      if (c.redo[r]) return;
    } else {
      c.tau[r] =
          refine(c.score + r * c.capacity, c.index + r * c.capacity, c.count[r], c.p->k, keys);
      c.count[r] = int32_t(c.p->k);
    }
  }
  float* score = c.score + r * c.capacity;
  int32_t* index = c.index + r * c.capacity;
  int32_t n = c.count[r];
  if (__builtin_popcount(hits) > 4) {
    constexpr uint32_t kHalf = (1u << kWidth) - 1;
    compress_iota(index + n, hits & kHalf, int32_t(m0));
    n += compress(score + n, hits & kHalf, load(tile));
    compress_iota(index + n, hits >> kWidth, int32_t(m0) + kWidth);
    n += compress(score + n, hits >> kWidth, load(tile + kWidth));
  } else {
    for (; hits; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      if constexpr (kScoring == Scoring::kScreen)  // the gate took the panel's largest margin
        if (tile[lane] + margin(c, r, int32_t(m0) + lane) <= c.tau[r]) continue;
      score[n] = tile[lane];
      index[n++] = int32_t(m0) + lane;
    }
  }
  c.count[r] = n;
}

template <Scoring kScoring>
void score_tile(const EncodeChunk& c, const float* x, const float* w, int64_t n_steps, int64_t at,
                int64_t r0, uint32_t* keys) {
  Vec acc[kTileRows][2];
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
  // The gate. Appending is left for after the loop, so that the accumulators never spill.
  alignas(64) float tile[kTileRows][kPanel];
  uint32_t hits[kTileRows];
  const int64_t m0 = at * kPanel;
  const int rows = c.R - r0 < kTileRows ? int(c.R - r0) : kTileRows;
  const uint32_t lanes =
      c.M - m0 < kPanel ? (1u << (c.M - m0)) - 1 : uint32_t((uint64_t(1) << kPanel) - 1);
  const Vec b0 = load(c.bias + m0), b1 = load(c.bias + m0 + kWidth);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const Vec s0 = acc[r][0] + b0, s1 = acc[r][1] + b1;
    store(tile[r], s0);
    store(tile[r] + kWidth, s1);
    float tau = r < rows ? c.tau[r0 + r] : 0;
    if constexpr (kScoring == Scoring::kScreen) {
      if (r < rows) {
        const float* b = c.bound_panel + 4 * at;
        const float bx0 = c.bound_x[2 * (r0 + r)], bx1 = c.bound_x[2 * (r0 + r) + 1];
        // Where a sum might overflow the bound proves nothing.
        if (!(bx0 * b[3] + b[2] * 0x1p20f < 1e37f)) c.redo[r0 + r] = 1;
        const float margin = b[0] * bx0 + b[1] * bx1 + b[2];
        if (margin > c.margin[r0 + r]) c.margin[r0 + r] = margin;
        tau -= margin;
      }
    }
    hits[r] = not_le(s0, splat(tau)) | not_le(s1, splat(tau)) << kWidth;
  }
  if (c.p->product_only) {
    asm volatile("" : : "r"(&tile[0][0]), "r"(hits) : "memory");
    return;
  }
  uint32_t waiting = 0;  // rows with hits
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) break;
    if constexpr (kScoring == Scoring::kScreen)
      if (c.redo[r0 + r]) continue;
    waiting |= uint32_t((hits[r] & lanes) != 0) << r;
  }
  for (; waiting; waiting &= waiting - 1) {
    const int r = __builtin_ctz(waiting);
    append<kScoring>(c, r0 + r, m0, hits[r] & lanes, tile[r], keys);
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

template <Scoring kScoring>
void score_rows(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
                int size, uint32_t* keys) {
  const int64_t n_steps = steps(c), last = (c.M + kPanel - 1) / kPanel - group * c.panels;
  const int64_t n_panels = last < c.panels ? last : c.panels;
  const float* x = static_cast<const float*>(c.x_pack);
  const float* w = packed_group(c, group);
  Ahead ahead(c, group, rank, size, (tile1 - tile0) * n_panels);
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t panel = 0; panel < n_panels; ++panel) {
      score_tile<kScoring>(c, x + tile * n_steps * kTileRows, w + panel * n_steps * kPanel, n_steps,
                           group * c.panels + panel, tile * kTileRows, keys);
      ahead.advance();
    }
}

void score(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank, int size,
           void* scratch) {
  uint32_t* keys = scratch_of(c, scratch).keys;
  switch (c.scoring) {
    case Scoring::kFloat:
      return score_rows<Scoring::kFloat>(c, group, tile0, tile1, rank, size, keys);
#if defined(__AVX512BF16__)
    case Scoring::kDot:
      return score_rows<Scoring::kDot>(c, group, tile0, tile1, rank, size, keys);
    case Scoring::kScreen:
      return score_rows<Scoring::kScreen>(c, group, tile0, tile1, rank, size, keys);
#endif
    default:
      return;
  }
}

// Float32 scores of the survivors of rows [row0, row1), by the chain of score_tile<kFloat>, kWidth
// (row, latent) pairs at a time. Pairs are taken in the order of their latents (to within a bucket
// that fits L2), so that W comes from memory once and x, the smaller table, from cache.
// Tried: row by row, W gathered from memory: no slower on one busy core (216 against 229 ms a call
// at F=24576, k=32); prefetching to L2 instead of L1: 10 % slower.
void rescore(const EncodeChunk& c, int64_t row0, int64_t row1) {
  constexpr int kBuckets = 1024;
  const int64_t d = c.p->d, capacity = c.capacity;
  const auto* W = static_cast<const float*>(c.p->W_enc);
  const auto* X = static_cast<const float*>(c.p->x);
  const auto* b_dec = static_cast<const float*>(c.p->b_dec);
  uint32_t* pairs = c.pairs + row0 * capacity;  // (row - row0) * capacity + place in the row
  int shift = 0;
  while ((c.M >> shift) >= kBuckets) ++shift;
  uint32_t first[kBuckets + 1] = {};
  const auto each = [&](auto f) {
    for (int64_t r = row0; r < row1; ++r)
      for (int32_t i = 0; !c.redo[r] && i < c.count[r]; ++i) f(r * capacity + i);
  };
  each([&](int64_t at) { ++first[(c.index[at] >> shift) + 1]; });
  for (int b = 0; b < kBuckets; ++b) first[b + 1] += first[b];
  const int64_t n = first[kBuckets];
  each([&](int64_t at) { pairs[first[c.index[at] >> shift]++] = uint32_t(at - row0 * capacity); });

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

// Slots that no candidate above -inf fills carry the smallest latents not chosen, score -inf.
int64_t fill(const EncodeChunk& c, uint64_t* sort, int64_t n, const int32_t* index) {
  const float none = -__builtin_inff();
  int64_t out = n, next = 0;
  for (int64_t i = 0; out < c.p->k; ++i) {
    if (next < n && latent_of(c, index[next]) == i) {
      ++next;
    } else {
      sort[out++] = sort_key(none, int32_t(i));
    }
  }
  return out;
}

void finish(const EncodeChunk& c, int64_t row0, int64_t row1, void* scratch, EncodeStats* stats) {
  if (c.p->product_only) return;
  const Scratch s = scratch_of(c, scratch);
  const int64_t k = c.p->k;
  const bool screen = c.scoring == Scoring::kScreen;
  if (screen) {
    for (int64_t r = row0; r < row1; ++r)
      if (!c.redo[r] && c.count[r] > k) screen_refine(c, r, s.keys);
    rescore(c, row0, row1);
  }
  for (int64_t r = row0; r < row1; ++r) {
    float* score = c.score + r * c.capacity;
    int32_t* index = c.index + r * c.capacity;
    const int64_t n_row = row_of(c, r);
    if (screen) {
      ++stats->screened_rows;
      if (c.redo[r]) {
        ++stats->redone_rows;
        continue;
      }
      stats->survivors += c.count[r];
    }
    int64_t n = c.count[r];
    if (n > k) {
      refine(score, index, n, k, s.keys);
      n = k;
    }
    int64_t kept = 0;  // under a mask, -inf is left to fill(): it may tie with a masked latent
    for (int64_t i = 0; i < n; ++i) {
      if (c.ids && score[i] == -__builtin_inff()) continue;
      index[kept] = index[i];
      s.sort[kept++] = sort_key(score[i], int32_t(latent_of(c, index[i])));
    }
    if (kept < k) fill(c, s.sort, kept, index);
    sort_keys(s.sort, k, s.sort + c.capacity);
    int64_t* indices = c.p->indices + n_row * k;
    for (int64_t j = 0; j < k; ++j) indices[j] = key_index(s.sort[j]);
    with_dtype(c.p->dtype, [&](auto tag) {
      auto* values = static_cast<typename decltype(tag)::type*>(c.p->values) + n_row * k;
      for (int64_t j = 0; j < k; ++j) {
        const float u = key_score(s.sort[j]);
        from_float(u <= 0 ? 0.0f : u, values[j]);
      }
    });
  }
}

}  // namespace

void encode_table(Kernels& t) {
  t.tile_rows = kTileRows;
  t.panel_width = kPanel;
#if defined(__AVX512BF16__)
  t.has_dot = true;
#else
  t.has_dot = false;
#endif
  t.encode_pack_x = pack_x;
  t.encode_pack_w = pack_w;
  t.encode_score = score;
  t.encode_finish = finish;
}

}  // namespace ksae::cpu::KSAE_ISA
