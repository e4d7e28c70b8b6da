// SPDX-License-Identifier: Apache-2.0
// threshold_encode: entries whose pre-activation is above their latent's threshold.
//
// count: a few rows of W_enc at a time pass a block of rows of x, and a bit says which products are
// above. fill: the products of these alone are taken once more, with the same bits (dots.h), and
// written in the order of latents.
// Screened (float32 or bfloat16, BF16 dot instructions), the product is topk_encode's: with s^ the
// screened u, less theta, and its margin m, s^ - m > 0 is above, s^ + m <= 0 is not, and between
// them the product of count decides: m bounds the error of any order of summation
// (topk_encode.cpp). Cost: flops 2 N F d and 2 d an entry; W_enc is read once for kThresholdRows
// rows; N F / 8 bytes of marks, and no other memory than the exact result. Limits, where it is not
// screened: dot products without a register tile, about twice topk_encode's time.
#include "dots.h"
#include "topk_encode.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

template <class T>
KSAE_INLINE void center_row(const ThresholdEncodeParams& p, int64_t n, float* row) {
  const T* x = static_cast<const T*>(p.x) + n * p.d;
  const T* b = static_cast<const T*>(p.b_dec);
  for (int64_t c = 0; c < p.d; ++c) {
    row[c] = to_float(x[c]);
    if (!b) continue;
    T rounded;
    from_float(row[c] - to_float(b[c]), rounded);
    row[c] = to_float(rounded);
  }
}

// Rows row_at(0), ... row_at(n - 1).
template <class T, class Row>
void count_rows(const ThresholdEncodeParams& p, int64_t n, Row row_at, float* scratch) {
  const int64_t words = (p.F + 31) / 32, stride = p.d + kVectorPad;
  const T* W = static_cast<const T*>(p.W_enc);
  const T* b = static_cast<const T*>(p.b_enc);
  for (int64_t first = 0; first < n; first += kThresholdRows) {
    const int64_t rows = n - first < kThresholdRows ? n - first : kThresholdRows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_at(first + r);
      center_row<T>(p, row, scratch + r * stride);
      for (int64_t i = 0; i < words; ++i) p.above[row * words + i] = 0;
      p.row_offsets[row + 1] = 0;
    }
    for (int64_t i = 0; i < p.F; i += kDots) {
      const int latents = p.F - i < kDots ? int(p.F - i) : kDots;
      const T *w[kDots], *next[kDots];
      for (int l = 0; l < latents; ++l) {
        w[l] = W + (i + l) * p.d;
        next[l] = i + l + kDots < p.F ? w[l] + kDots * p.d : w[l];
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = row_at(first + r);
        float u[kDots];
        dots<2>(latents, scratch + r * stride, w, p.d, r == 0 ? next : w, u);
        for (int l = 0; l < latents; ++l) {
          const bool above = u[l] + to_float(b[i + l]) > p.theta[i + l];
          p.above[row * words + (i + l) / 32] |= uint32_t(above) << (i + l) % 32;
          p.row_offsets[row + 1] += above;
        }
      }
    }
  }
}

template <class T>
void fill_rows(const ThresholdEncodeParams& p, int64_t row0, int64_t row1, float* row) {
  const int64_t words = (p.F + 31) / 32;
  const T* b = static_cast<const T*>(p.b_enc);
  for (int64_t n = row0; n < row1; ++n) {
    int64_t at = p.row_offsets[n];
    const int64_t end = p.row_offsets[n + 1];
    if (at == end) continue;
    for (int64_t i = 0; i < words; ++i)
      for (uint32_t rest = p.above[n * words + i]; rest; rest &= rest - 1)
        p.latents[at++] = i * 32 + __builtin_ctz(rest);
    center_row<T>(p, n, row);
    const auto latent_row = [&](int64_t e) {
      return static_cast<const T*>(p.W_enc) + p.latents[e < end ? e : end - 1] * p.d;
    };
    for (at = p.row_offsets[n]; at < end; at += kDots) {
      const int count = end - at < kDots ? int(end - at) : kDots;
      const T *w[kDots], *next[kDots];
      for (int l = 0; l < count; ++l) {
        w[l] = latent_row(at + l);
        next[l] = latent_row(at + count + l);
      }
      float u[kDots];
      dots<3>(count, row, w, p.d, next, u);
      for (int l = 0; l < count; ++l)
        from_float(u[l] + to_float(b[p.latents[at + l]]), static_cast<T*>(p.values)[at + l]);
    }
  }
}

// Marks which of the candidates of row r are above; returns how many.
template <class T>
int64_t decide(const ThresholdEncodeParams& p, const EncodeChunk& c, int64_t r, const float* score,
               const int32_t* index, int64_t n, bool& centred, float* row) {
  const T* W = static_cast<const T*>(p.W_enc);
  const T* b = static_cast<const T*>(p.b_enc);
  uint32_t* above = p.above + row_of(c, r) * ((p.F + 31) / 32);
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t i = index[j];
    bool is_above = score[j] - margin(c, r, i) > 0;
    if (!is_above && !(score[j] + margin(c, r, i) <= 0)) {
      if (!centred) center_row<T>(p, row_of(c, r), row);
      centred = true;
      const T* w[1] = {W + i * p.d};
      float u[1];
      dots<2>(1, row, w, p.d, w, u);
      is_above = u[0] + to_float(b[i]) > p.theta[i];
    }
    above[i / 32] |= uint32_t(is_above) << i % 32;
    count += is_above;
  }
  return count;
}

template <class T>
void decide_rows(const ThresholdEncodeParams& p, const EncodeChunk& c, int64_t r0, int64_t r1,
                 float* scratch) {
  const int64_t words = (p.F + 31) / 32;
  const int32_t blocks = *c.spill.used < c.spill.blocks ? *c.spill.used : c.spill.blocks;
  int64_t again[kThresholdRows], n_again = 0;
  const auto row_at = [&again](int64_t i) { return again[i]; };
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t n = row_of(c, r);
    if (c.redo[r]) {
      again[n_again++] = n;
      if (n_again < kThresholdRows) continue;
      count_rows<T>(p, n_again, row_at, scratch);
      n_again = 0;
      continue;
    }
    for (int64_t i = 0; i < words; ++i) p.above[n * words + i] = 0;
    bool centred = false;
    int64_t count = decide<T>(p, c, r, c.score + r * c.capacity, c.index + r * c.capacity,
                              c.count[r], centred, scratch);
    for (int32_t b = 0; b < blocks; ++b) {
      if (c.spill.row[b] != r) continue;
      const int64_t at = b * c.spill.room;
      count += decide<T>(p, c, r, c.spill.score + at, c.spill.index + at, c.spill.count[b], centred,
                         scratch);
    }
    p.row_offsets[n + 1] = count;
  }
  count_rows<T>(p, n_again, row_at, scratch);
}

void threshold_decide(const ThresholdEncodeParams& p, const EncodeChunk& c, int64_t r0, int64_t r1,
                      float* scratch) {
  with_dtype(p.dtype,
             [&](auto tag) { decide_rows<typename decltype(tag)::type>(p, c, r0, r1, scratch); });
}

void threshold_count(const ThresholdEncodeParams& p, int64_t row0, int64_t row1, float* scratch) {
  const auto row_at = [row0](int64_t i) { return row0 + i; };
  with_dtype(p.dtype, [&](auto tag) {
    count_rows<typename decltype(tag)::type>(p, row1 - row0, row_at, scratch);
  });
}

void threshold_fill(const ThresholdEncodeParams& p, int64_t row0, int64_t row1, float* scratch) {
  with_dtype(p.dtype,
             [&](auto tag) { fill_rows<typename decltype(tag)::type>(p, row0, row1, scratch); });
}

}  // namespace

void threshold_encode_table(Kernels& t) {
  t.threshold_count = threshold_count;
  t.threshold_decide = threshold_decide;
  t.threshold_fill = threshold_fill;
}

}  // namespace ksae::cpu::KSAE_ISA
