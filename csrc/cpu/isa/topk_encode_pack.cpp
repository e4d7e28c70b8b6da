// SPDX-License-Identifier: Apache-2.0
// Packing of rows and weights for the tile product of topk_encode.h, and the norms that bound what
// screening loses (see topk_encode.cpp).
#include "topk_encode.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

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

// Packs kWidth rows of weights (null: zeros) into lanes [0, kWidth) of a panel, and fetches as many
// columns of the kWidth rows that lie behind them.
template <class T>
void pack_rows(const EncodeChunk& c, const T* const* w, float* panel, float* squares) {
  const int64_t d = c.p->d;
  Vec block[kWidth];
  (void)squares;  // of levels that screen
  if (c.scoring == Scoring::kFloat) {
    for (int64_t j = 0; j < d; j += kWidth) {
      const int lanes = d - j < kWidth ? int(d - j) : kWidth;
      for (int l = 0; l < kWidth; ++l) {
        block[l] = !w[l] ? splat(0) : lanes == kWidth ? load(w[l] + j) : load_n(w[l] + j, lanes);
        __builtin_prefetch(w[l] + j + kWidth * d);
      }
      transpose(block);
      for (int s = 0; s < lanes; ++s) store(panel + (j + s) * kPanel, block[s]);
    }
    return;
  }
#if defined(__AVX512BF16__)
  const bool screen = c.scoring == Scoring::kScreen;
  Vec rounded[kWidth], lost[kWidth];
  for (int l = 0; l < kWidth; ++l) rounded[l] = lost[l] = splat(0);
  for (int64_t j = 0; j < d; j += 2 * kWidth) {
    const int lanes = d - j < 2 * kWidth ? int(d - j) : 2 * kWidth;
    for (int l = 0; l < kWidth; ++l) {
      T part[2 * kWidth];
      const T* from = part;
      if (w[l] && lanes == 2 * kWidth) {
        from = w[l] + j;
        for (int s = 0; s < lanes; s += int(64 / sizeof(T)))
          __builtin_prefetch(w[l] + j + s + kWidth * d);
      } else {
        for (int s = 0; s < 2 * kWidth; ++s) part[s] = w[l] && s < lanes ? w[l][j + s] : T{};
      }
      if constexpr (sizeof(T) == 4) {
        block[l] = round_pairs(from, rounded[l], lost[l]);
      } else {
        block[l] = {_mm512_loadu_ps(from)};
        if (screen) {
          const Vec lo = load(from), hi = load(from + kWidth);
          rounded[l] = fma(lo, lo, fma(hi, hi, rounded[l]));
        }
      }
    }
    transpose(block);
    for (int s = 0; s < (lanes + 1) / 2; ++s) store(panel + (j / 2 + s) * kPanel, block[s]);
  }
  if (screen) {
    for (int l = 0; l < kWidth; ++l) {
      squares[2 * l] = sum(lost[l]);
      squares[2 * l + 1] = sum(rounded[l]);
    }
  }
#endif
}

}  // namespace

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
      c.tau[i] = c.gate;
      if (c.fixed) c.redo[i] = 0;
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

void pack_w(const EncodeChunk& c, int64_t group, int64_t panel) {
  const int64_t d = c.p->d, at = group * c.panels + panel, m0 = at * kPanel;
  if (m0 >= c.M) return;
  float* out = packed_group(c, group) + panel * steps(c) * kPanel;
  float* bias = c.bias + m0;
  float sizes[kPanel];             // of what a bias is made of
  float squares[2 * kPanel] = {};  // |w - w^|^2, |w^|^2
  with_dtype(c.p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* w[kPanel];
    for (int l = 0; l < kPanel; ++l) {
      const bool valid = m0 + l < c.M;
      const int64_t i = valid ? latent_of(c, m0 + l) : 0;
      w[l] = valid ? static_cast<const T*>(c.p->W_enc) + i * d : nullptr;
      bias[l] = valid && c.p->b_enc ? to_float(static_cast<const T*>(c.p->b_enc)[i]) : 0;
      sizes[l] = __builtin_fabsf(bias[l]);
      if (valid && c.theta) {
        bias[l] -= c.theta[i];
        sizes[l] += __builtin_fabsf(c.theta[i]);
      }
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
    bound[2 * kPanel + l] = (sizes[l] * 0x1p-20f + float(d) * 0x1p-124f) * c.p->slack;
    const float row[4] = {bound[l], bound[kPanel + l], bound[2 * kPanel + l],
                          rounded_up(lost + rounded)};
    for (int j = 0; j < 4; ++j)  // NaN comes in and stays
      if (row[j] > panel_bound[j] || row[j] != row[j]) panel_bound[j] = row[j];
  }
}

}  // namespace ksae::cpu::KSAE_ISA
