// SPDX-License-Identifier: Apache-2.0
// grad_topk_encode, serial parts: topk_encode (topk_encode.cpp) whose selection is by a score
//   s = u (c0 + c1 h(a)) where u > 0, else u;  a = <W_dec[i], grad[n]>, h(a) = |a| or relu(-a).
//
// A candidate carries bounds lo <= s <= hi. tau = the k-th largest lo so far bounds the k-th score
// from below, so hi <= tau loses, as in topk_encode.cpp. Three sources of the bounds, one result:
//   exact   u and a of the tile product: lo = s = hi. Storage of 16 bits, rows marked for redoing.
//   dual    both products, screened in bf16 under the margins of topk_encode.cpp.
//   pruned  u from the tile (screened or exact), |a| <= |grad| |W_dec[i]|. When the latents are
//           through, a is computed for the survivors alone, by a plain dot product (any order of
//           summation, margin 2 (d + 64) 2^-23 |grad| |W_dec[i]|), and the bounds taken again.
// What is left, some 2 k a row, is rescored: u and a by the chain over d that the float32 tile
// makes too. Selection is on those scores, so the route leaves no trace in the result.
// A row that keeps too many, or whose bounds are not finite, is marked and scored exactly.
//
// Slack: factors of a bound are widened by 2^-20, which covers their few roundings.
#include "grad_prune.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

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
  if (g.has_norms) return;
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

// ---- the tile ---------------------------------------------------------------------------------

template <Scoring kScoring>
void grad_tile(const EncodeChunk& c, const Score& score, const float* x, const float* w,
               const float* gx, const float* gw, int64_t at, int64_t r0, const Scratch& s) {
  const GradChunk& g = *c.grad;
  alignas(64) float u[kTileRows][kPanel], a[kTileRows][kPanel];
  const int rows = c.R - r0 < kTileRows ? int(c.R - r0) : kTileRows;
  const auto multiply = [rows](const EncodeChunk& p, const float* x_pack, const float* panel,
                               const float* bias, float (&out)[kTileRows][kPanel]) {
    Vec acc[kTileRows][2];
    product<kScoring>(rows, x_pack, panel, steps(p), acc);
    const Vec b0 = load(bias), b1 = load(bias + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      store(out[r], acc[r][0] + b0);
      store(out[r] + kWidth, acc[r][1] + b1);
    }
  };
  const int64_t m0 = at * kPanel;
  multiply(c, x, w, c.bias + m0, u);
  multiply(g.a, gx, gw, g.a.bias + m0, a);
  const uint32_t lanes = lanes_of(c, m0);
  for (int i = 0; i < rows; ++i) {
    const int64_t r = r0 + i;
    float of_u = 0, of_a = 0;
    if constexpr (kScoring == Scoring::kScreen) {
      of_u = panel_margin(c, at, r);
      if (!g.plain[r]) of_a = panel_margin(g.a, at, r);
      if (c.redo[r]) continue;
    }
    const Vec tau = splat(c.tau[r]), none = splat(0);
    uint32_t hits = 0;
    for (int l = 0; l < kPanel; l += kWidth) {
      const Vec most = load(u[i] + l) + splat(of_u);
      uint32_t passed = not_le(most, tau);
      if (!g.plain[r]) {
        const Vec gain = load(a[i] + l);
        const Vec h = larger(score.is_signed ? none : gain, none - gain) + splat(of_a);
        const Vec factor = splat(score.c0) + splat(score.c1) * h;
        const Vec lifted = most * (kScoring == Scoring::kScreen ? factor * splat(kWiden) : factor);
        const uint32_t positive = not_le(most, none);
        passed = (positive & not_le(lifted, tau)) | (~positive & passed);
      }
      hits |= passed << l;
    }
    hits &= lanes;
    if (!hits) continue;
    if (c.count[r] > room(c)) {
      if constexpr (kScoring == Scoring::kScreen) {
        narrow_bounded(c, score, r, false, s);
        if (c.count[r] > room(c) - c.p->k / 2) c.redo[r] = 1;
        if (c.redo[r]) continue;
      } else {
        narrow_exact(c, score, r, s.keys);
      }
    }
    const int64_t base = r * c.capacity;
    int32_t n = c.count[r];
    for (; hits; hits &= hits - 1) {
      const int l = __builtin_ctz(hits);
      c.score[base + n] = u[i][l];
      g.a.score[base + n] = a[i][l];
      c.index[base + n++] = int32_t(m0) + l;
    }
    c.count[r] = n;
  }
}

template <Scoring kScoring, bool kPruned>
void grad_rows(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
               int size, const Scratch& s) {
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
  if (g.has_norms) ahead_a.end = 0;
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t panel = 0; panel < n_panels; ++panel) {
      const int64_t at = group * c.panels + panel, r0 = tile * kTileRows;
      if constexpr (kPruned) {
        pruned_tile<kScoring>(c, score, rows_at(c, tile), panel_at(c, panel), at, r0, s);
      } else {
        grad_tile<kScoring>(c, score, rows_at(c, tile), panel_at(c, panel), rows_at(g.a, tile),
                            panel_at(g.a, panel), at, r0, s);
      }
      ahead.advance();
      ahead_a.advance();
    }
}

void grad_score(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
                int size, void* scratch) {
  const Scratch s = scratch_of(c, scratch);
  const auto run = [&](auto f) { f(c, group, tile0, tile1, rank, size, s); };
  const bool pruned = c.grad->pruned;
  switch (c.scoring) {
    case Scoring::kFloat:
      return run(pruned ? grad_rows<Scoring::kFloat, true> : grad_rows<Scoring::kFloat, false>);
#if defined(__AVX512BF16__)
    case Scoring::kDot:
      return run(grad_rows<Scoring::kDot, false>);
    case Scoring::kScreen:
      return run(pruned ? grad_rows<Scoring::kScreen, true> : grad_rows<Scoring::kScreen, false>);
#endif
    default:
      return;
  }
}

// ---- the end of a row -------------------------------------------------------------------------

void grad_finish(const EncodeChunk& c, int64_t row0, int64_t row1, void* scratch,
                 EncodeStats* stats) {
  const GradChunk& g = *c.grad;
  const Score score(*g.p);
  const Scratch s = scratch_of(c, scratch);
  const int64_t k = c.p->k;
  const Source source = source_of(c);
  const auto each = [&](auto f) {
    for (int64_t r = row0; r < row1; ++r)
      if (!c.redo[r]) f(r);
  };
  if (source != Source::kExact) {
    if (source == Source::kPruned) {
      each([&](int64_t r) { narrow_bounded(c, score, r, true, s); });
      each([&](int64_t r) { stats->candidates += c.count[r]; });
      dot_survivors(c, row0, row1);
      each([&](int64_t r) { narrow_bounded(c, score, r, false, s); });
    } else {
      each([&](int64_t r) { narrow_bounded(c, score, r, false, s); });
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
    if (c.p->scores)
      for (int64_t j = 0; j < k; ++j) c.p->scores[n_row * k + j] = key_score(s.sort[j]);
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

void grad_topk_encode_table(Kernels& t) {
  t.grad_encode = {pack_grad_x, pack_grad_w, grad_score, grad_finish};
}

}  // namespace ksae::cpu::KSAE_ISA
