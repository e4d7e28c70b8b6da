// SPDX-License-Identifier: Apache-2.0
// grad_topk_encode, serial parts: topk_encode (encode.cpp) whose selection is by a score
//   s = u (c0 + c1 h(a)) where u > 0, else u;  a = <W_dec[i], grad[n]>, h(a) = |a| or relu(-a).
//
// A candidate carries bounds lo <= s <= hi. tau = the k-th largest lo so far bounds the k-th score
// from below, so hi <= tau loses, as in encode.cpp. Three sources of the bounds, one result:
//   exact   u and a of the tile product: lo = s = hi. Storage of 16 bits, rows marked for redoing.
//   dual    both products, screened in bf16 under the margins of encode.cpp.
//   pruned  u from the tile (screened or exact), |a| <= |grad| |W_dec[i]|. When the latents are
//           through, a is computed for the survivors alone, by a plain dot product (any order of
//           summation, margin 2 (d + 64) 2^-23 |grad| |W_dec[i]|), and the bounds taken again.
// What is left, some 2 k a row, is rescored: u and a by the chain over d that the float32 tile
// makes too. Selection is on those scores, so the route leaves no trace in the result.
// A row that keeps too many, or whose bounds are not finite, is marked and scored exactly.
//
// Slack: factors of a bound are widened by 2^-20, which covers their few roundings.
#include "encode.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

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

// ---- packing ----------------------------------------------------------------------------------

void pack_grad_x(const EncodeChunk& c, int64_t tile0, int64_t tile1, void* scratch) {
  const GradChunk& g = *c.grad;
  pack_x(c, tile0, tile1, scratch);
  if (!g.pruned) pack_x(g.a, tile0, tile1, scratch);
  const int64_t d = g.a.p->d;
  for (int64_t r = tile0 * kTileRows; r < tile1 * kTileRows && r < c.R; ++r) {
    bool zero = true, finite = true;
    float squares = 0;
    with_dtype(c.p->dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* row = static_cast<const T*>(g.a.p->x) + row_of(c, r) * d;
      Vec sums = splat(0);
      for (int64_t j = 0; j < d; j += kWidth) {
        float lanes[kWidth];
        const Vec v = load_n(row + j, d - j < kWidth ? int(d - j) : kWidth);
        store(lanes, v);
        for (int l = 0; l < kWidth; ++l) {
          zero &= lanes[l] == 0;
          finite &= __builtin_fabsf(lanes[l]) < __builtin_inff();
        }
        sums = fma(v, v, sums);
      }
      squares = sum(sums);
    });
    g.plain[r] = zero || !finite;
    if (g.pruned) c.redo[r] = 0;
    if (g.pruned) g.norm_g[r] = g.plain[r] ? 0 : rounded_up(norm_bound(squares, d) * c.p->slack);
  }
}

void pack_grad_w(const EncodeChunk& c, int64_t group, int64_t panel) {
  const GradChunk& g = *c.grad;
  pack_w(c, group, panel);
  if (!g.pruned) return pack_w(g.a, group, panel);
  const int64_t d = g.a.p->d, m0 = (group * c.panels + panel) * kPanel;
  for (int64_t m = m0; m < m0 + kPanel; ++m) {
    g.a.bias[m] = 0;
    if (m >= c.M) {
      g.norm_w[m] = 0;
      continue;
    }
    const auto* w = static_cast<const float*>(g.a.p->W_enc) + m * d;
    Vec sums = splat(0);
    for (int64_t j = 0; j < d; j += kWidth) {
      const Vec v = d - j < kWidth ? load_n(w + j, int(d - j)) : load(w + j);
      sums = fma(v, v, sums);
    }
    g.norm_w[m] = rounded_up(norm_bound(sum(sums), d));
  }
}

// ---- bounds -----------------------------------------------------------------------------------

enum class Source { kExact, kDual, kPruned };  // of the bounds; see above

Source source_of(const EncodeChunk& c) {
  if (c.grad->pruned) return Source::kPruned;
  return c.scoring == Scoring::kScreen ? Source::kDual : Source::kExact;
}

// Bounds of candidate `at` of row r from its u and a; `dot`: a is a dot product with its margin.
KSAE_INLINE void bounds(const EncodeChunk& c, const Score& score, int64_t r, int64_t at, bool dot,
                        float& lo, float& hi) {
  const GradChunk& g = *c.grad;
  const float u = c.score[at], a = g.a.score[at];
  const bool plain = g.plain[r];
  if (!dot && c.scoring != Scoring::kScreen) {
    lo = hi = score(u, a, plain);
    return;
  }
  const int32_t m = c.index[at];
  const float of_u = c.scoring == Scoring::kScreen ? margin(c, r, m) : 0;
  lo = u - of_u;
  hi = u + of_u;
  if (plain) return;
  const float of_a =
      dot ? float(g.a.p->d + 64) * 0x1p-22f * (g.norm_g[r] * g.norm_w[m]) : margin(g.a, r, m);
  const float h = score.height(a), least = h - of_a;
  if (!(h + of_a < __builtin_inff())) c.redo[r] = 1;
  const float f_lo = (score.c0 + score.c1 * (least > 0 ? least : 0)) * kNarrow;
  const float f_hi = (score.c0 + score.c1 * (h + of_a)) * kWiden;
  if (lo > 0) lo *= f_lo;
  if (!(hi <= 0)) hi *= f_hi;
}

int64_t room(const EncodeChunk& c) { return c.capacity - kPanel - kWidth; }

// Keeps the candidates that may still win and raises tau. `dot` as above.
void narrow(const EncodeChunk& c, const Score& score, int64_t r, bool dot, uint32_t* keys) {
  const GradChunk& g = *c.grad;
  const int64_t n = c.count[r], k = c.p->k, base = r * c.capacity;
  float *u = c.score + base, *a = g.a.score + base;
  int32_t* index = c.index + base;
  int64_t out = 0;
  if (n <= k) return;
  if (g.pruned && !dot) {  // a holds hi; one margin for the row, so that the loops have no lookup
    const float of_u = c.scoring == Scoring::kScreen ? c.margin[r] : 0;
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(u[i] - of_u);
    const float tau = order_score(kth_key(keys, n, k));
    const Vec t = splat(tau);
    for (int64_t i = 0; i < n; i += kWidth) {
      const Vec hi = load(a + i);
      uint32_t mask = not_lt(hi, t);
      if (n - i < kWidth) mask &= (1u << (n - i)) - 1;
      compress(index + out, mask, index + i);
      compress(u + out, mask, load(u + i));
      out += compress(a + out, mask, hi);
    }
    c.tau[r] = tau;
    c.count[r] = int32_t(out);
    return;
  }
  float lo, hi;
  for (int64_t i = 0; i < n; ++i) {
    bounds(c, score, r, base + i, dot, lo, hi);
    keys[i] = order_key(lo);
  }
  const uint32_t kth = kth_key(keys, n, k);
  const auto keep = [&](int64_t i) {
    u[out] = u[i];
    a[out] = a[i];
    index[out++] = index[i];
  };
  if (!dot && c.scoring != Scoring::kScreen) {  // exact: equal scores by the smaller index
    int64_t equal = k;
    for (int64_t i = 0; i < n; ++i) equal -= keys[i] > kth;
    for (int64_t i = 0; i < n; ++i)
      if (keys[i] > kth || (keys[i] == kth && equal-- > 0)) keep(i);
    c.tau[r] = kth == 0xffffffffu ? __builtin_inff() : order_score(kth);
  } else {
    const float tau = order_score(kth);
    for (int64_t i = 0; i < n; ++i) {
      bounds(c, score, r, base + i, dot, lo, hi);
      if (!(hi < tau)) keep(i);
    }
    c.tau[r] = tau;
  }
  c.count[r] = int32_t(out);
}

// ---- the tile ---------------------------------------------------------------------------------

template <Scoring kScoring, Source kSource>
void grad_tile(const EncodeChunk& c, const Score& score, const float* x, const float* w,
               const float* gx, const float* gw, int64_t at, int64_t r0, uint32_t* keys) {
  const GradChunk& g = *c.grad;
  alignas(64) float u[kTileRows][kPanel], a[kTileRows][kPanel];
  const auto multiply = [](const EncodeChunk& p, const float* rows, const float* panel,
                           const float* bias, float (&out)[kTileRows][kPanel]) {
    Vec acc[kTileRows][2];
    product<kScoring>(rows, panel, steps(p), acc);
    const Vec b0 = load(bias), b1 = load(bias + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      store(out[r], acc[r][0] + b0);
      store(out[r] + kWidth, acc[r][1] + b1);
    }
  };
  const int64_t m0 = at * kPanel;
  multiply(c, x, w, c.bias + m0, u);
  if constexpr (kSource != Source::kPruned) multiply(g.a, gx, gw, g.a.bias + m0, a);
  const int rows = c.R - r0 < kTileRows ? int(c.R - r0) : kTileRows;
  const uint32_t lanes =
      c.M - m0 < kPanel ? (1u << (c.M - m0)) - 1 : uint32_t((uint64_t(1) << kPanel) - 1);
  for (int i = 0; i < rows; ++i) {
    const int64_t r = r0 + i;
    float of_u = 0, of_a = 0;
    if constexpr (kScoring == Scoring::kScreen) {
      const auto panel_margin = [&](const EncodeChunk& p) {
        const float* b = p.bound_panel + 4 * at;
        const float bx0 = p.bound_x[2 * r], bx1 = p.bound_x[2 * r + 1];
        // Where a sum might overflow the bound proves nothing.
        if (!(bx0 * b[3] + b[2] * 0x1p20f < 1e37f)) c.redo[r] = 1;
        return b[0] * bx0 + b[1] * bx1 + b[2];
      };
      of_u = panel_margin(c);
      if (of_u > c.margin[r]) c.margin[r] = of_u;
      if (kSource == Source::kDual && !g.plain[r]) of_a = panel_margin(g.a);
      if (c.redo[r]) continue;
    } else if (kSource == Source::kPruned && c.redo[r]) {
      continue;
    }
    alignas(64) float hi[kPanel];
    if (g.plain[r]) {
      for (int l = 0; l < kPanel; ++l) hi[l] = u[i][l] + of_u;
    } else {
      const float limit = score.c1 * (kSource == Source::kPruned ? g.norm_g[r] : 0.0f);
      const float widen = kSource == Source::kExact ? 1.0f : kWiden;
      for (int l = 0; l < kPanel; ++l) {
        const float t = u[i][l] + of_u;
        const float h = kSource == Source::kPruned ? limit * g.norm_w[m0 + l]
                                                   : score.c1 * (score.height(a[i][l]) + of_a);
        const float s = t * ((score.c0 + h) * widen);
        hi[l] = t <= 0 ? t : s;
      }
    }
    const Vec tau = splat(c.tau[r]);
    uint32_t hits = not_le(load(hi), tau) | not_le(load(hi + kWidth), tau) << kWidth;
    hits &= lanes;
    if (!hits) continue;
    if (c.count[r] > room(c)) {
      narrow(c, score, r, false, keys);
      if (kSource != Source::kExact && c.count[r] > room(c) - c.p->k / 2) c.redo[r] = 1;
      if (kSource != Source::kExact && c.redo[r]) continue;
    }
    const int64_t base = r * c.capacity;
    int32_t n = c.count[r];
    const float* third = kSource == Source::kPruned ? hi : a[i];
    for (; hits; hits &= hits - 1) {
      const int l = __builtin_ctz(hits);
      c.score[base + n] = u[i][l];
      g.a.score[base + n] = third[l];
      c.index[base + n++] = int32_t(m0) + l;
    }
    c.count[r] = n;
  }
}

template <Scoring kScoring, Source kSource>
void grad_rows(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
               int size, uint32_t* keys) {
  const GradChunk& g = *c.grad;
  const Score score(*g.p);
  const int64_t last = (c.M + kPanel - 1) / kPanel - group * c.panels;
  const int64_t n_panels = last < c.panels ? last : c.panels;
  const auto rows_at = [](const EncodeChunk& p, int64_t tile) {
    return static_cast<const float*>(p.x_pack) + tile * steps(p) * kTileRows;
  };
  const auto panel_at = [group](const EncodeChunk& p, int64_t panel) {
    return packed_group(p, group) + panel * steps(p) * kPanel;
  };
  Ahead ahead(c, group, rank, size, (tile1 - tile0) * n_panels);
  Ahead ahead_a(g.a, group, rank, size, (tile1 - tile0) * n_panels);
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t panel = 0; panel < n_panels; ++panel) {
      const bool dual = kSource != Source::kPruned;
      grad_tile<kScoring, kSource>(
          c, score, rows_at(c, tile), panel_at(c, panel), dual ? rows_at(g.a, tile) : nullptr,
          dual ? panel_at(g.a, panel) : nullptr, group * c.panels + panel, tile * kTileRows, keys);
      ahead.advance();
      ahead_a.advance();
    }
}

void grad_score(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
                int size, void* scratch) {
  uint32_t* keys = scratch_of(c, scratch).keys;
  const auto run = [&](auto f) { f(c, group, tile0, tile1, rank, size, keys); };
  const bool pruned = c.grad->pruned;
  switch (c.scoring) {
    case Scoring::kFloat:
      return run(pruned ? grad_rows<Scoring::kFloat, Source::kPruned>
                        : grad_rows<Scoring::kFloat, Source::kExact>);
#if defined(__AVX512BF16__)
    case Scoring::kDot:
      return run(grad_rows<Scoring::kDot, Source::kExact>);
    case Scoring::kScreen:
      return run(pruned ? grad_rows<Scoring::kScreen, Source::kPruned>
                        : grad_rows<Scoring::kScreen, Source::kDual>);
#endif
    default:
      return;
  }
}

// ---- the end of a row -------------------------------------------------------------------------

// a of the survivors of rows [row0, row1), a bucket of latents at a time: its rows of W_dec come
// from memory once and stay in L2, and a row of grad serves all its candidates there.
constexpr int64_t kBucketBytes = int64_t(512) << 10;
void dots(const EncodeChunk& c, int64_t row0, int64_t row1) {
  const GradChunk& g = *c.grad;
  const int64_t d = g.a.p->d, whole = d / (4 * kWidth) * (4 * kWidth);
  const auto* W = static_cast<const float*>(g.a.p->W_enc);
  const auto* G = static_cast<const float*>(g.a.p->x);
  const int64_t n = by_latent(c, row0, row1, kBucketBytes / (4 * d));
  const uint32_t* pairs = pairs_of(c, row0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = row0 * c.capacity + pairs[i];
    const float* w = W + c.index[at] * d;
    const float* x = G + row_of(c, at / c.capacity) * d;
    if (i + 1 < n) {
      const int64_t next = row0 * c.capacity + pairs[i + 1];
      const float* next_w = W + c.index[next] * d;
      const float* next_x = G + row_of(c, next / c.capacity) * d;
      for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(next_w + j);
      if (next_x != x)
        for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(next_x + j);
    }
    Vec acc[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t j = 0; j < whole; j += 4 * kWidth)
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l)
        acc[l] = fma(load(x + j + l * kWidth), load(w + j + l * kWidth), acc[l]);
    for (int64_t j = whole; j < d; j += kWidth) {
      const int lanes = d - j < kWidth ? int(d - j) : kWidth;
      acc[0] = fma(load_n(x + j, lanes), load_n(w + j, lanes), acc[0]);
    }
    g.a.score[at] = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

void grad_finish(const EncodeChunk& c, int64_t row0, int64_t row1, void* scratch,
                 EncodeStats* stats) {
  const GradChunk& g = *c.grad;
  const Score score(*g.p);
  const Scratch s = scratch_of(c, scratch);
  const int64_t k = c.p->k;
  const Source source = source_of(c);
  if (source != Source::kExact) {
    for (int64_t r = row0; r < row1; ++r)
      if (!c.redo[r]) narrow(c, score, r, false, s.keys);
    if (source == Source::kPruned) {
      for (int64_t r = row0; r < row1; ++r)
        if (!c.redo[r]) stats->candidates += c.count[r];
      dots(c, row0, row1);
      for (int64_t r = row0; r < row1; ++r)
        if (!c.redo[r]) narrow(c, score, r, true, s.keys);
    }
    if (c.scoring == Scoring::kScreen) rescore(c, row0, row1);
    rescore(g.a, row0, row1);
  }
  for (int64_t r = row0; r < row1; ++r) {
    if (source != Source::kExact) {
      ++stats->screened_rows;
      if (c.redo[r]) {
        ++stats->redone_rows;
        continue;
      }
      stats->survivors += c.count[r];
    }
    const int64_t n = c.count[r], base = r * c.capacity, n_row = row_of(c, r);
    const float *u = c.score + base, *a = g.a.score + base;
    const int32_t* index = c.index + base;
    for (int64_t i = 0; i < n; ++i) s.sort[i] = sort_key(score(u[i], a[i], g.plain[r]), index[i]);
    sort_keys(s.sort, n, s.sort + c.capacity);
    int64_t* indices = c.p->indices + n_row * k;
    with_dtype(c.p->dtype, [&](auto tag) {
      auto* values = static_cast<typename decltype(tag)::type*>(c.p->values) + n_row * k;
      for (int64_t j = 0; j < k; ++j) {
        const int32_t m = key_index(s.sort[j]);
        int64_t low = 0, high = n;  // index ascends
        while (high - low > 1) (index[(low + high) / 2] <= m ? low : high) = (low + high) / 2;
        indices[j] = m;
        from_float(u[low] <= 0 ? 0.0f : u[low], values[j]);
      }
    });
  }
}

}  // namespace

void grad_encode_table(Kernels& t) {
  t.grad_encode = {pack_grad_x, pack_grad_w, grad_score, grad_finish};
}

}  // namespace ksae::cpu::KSAE_ISA
