// SPDX-License-Identifier: Apache-2.0
// Rows of W_dec that a token names, gathered and summed: what the token-major decoders share.
#pragma once

#include "gate.h"
#include "rows.h"

namespace ksae::cpu::KSAE_ISA {

#if defined(__AVX512F__)
constexpr int kSlice = 24;  // sums of 32 registers
#else
constexpr int kSlice = 12;  // of 16
#endif
constexpr int kAhead = 16;  // rows between the fetch and the use (8: bfloat16 1.2 times slower)
constexpr int kRows = 64;   // rows of a token in one list
constexpr int64_t kNear = 512 * 1024;  // bytes of two tokens' rows that L2 holds

KSAE_INLINE int64_t index_at(const int64_t* i64, const int32_t* i32, int64_t i) {
  return i64 ? i64[i] : i32[i];
}

// Some rows of W_dec of a token. Those beyond count point at a row as well: they can be fetched.
template <class T>
struct Gathered {
  const T* w[kRows];
  float value[kRows];
  int32_t at[kRows];  // position among the entries of the token
  int count;
};

// The next rows of token n from position j on whose latents keep(latent) takes, without those of
// value 0; returns the next j.
template <class T, class Rows, class Keep>
KSAE_INLINE int64_t take_if(const DecodeParams& p, const Rows& code, int64_t n, int64_t j, int most,
                            Gathered<T>& rows, Keep keep) {
  const int64_t first = code.begin(n), k = code.count(n);
  const T* values = static_cast<const T*>(p.values) + first;
  const T* W = static_cast<const T*>(p.W_dec);
  rows.count = 0;
  for (; j < k && rows.count < most; ++j) {
    const float v = to_float(values[j]);
    if (v == 0) continue;
    const int64_t latent = index_at(p.indices64, p.indices32, first + j);
    if (!keep(latent)) continue;
    rows.w[rows.count] = W + latent * p.d;
    rows.value[rows.count] = v;
    rows.at[rows.count++] = int32_t(j);
  }
  for (int r = rows.count; r < kAhead; ++r) rows.w[r] = W;
  return j;
}

template <class T, class Rows>
KSAE_INLINE int64_t take(const DecodeParams& p, const Rows& code, int64_t n, int64_t j, int most,
                         Gathered<T>& rows) {
  return take_if<T>(p, code, n, j, most, rows, [](int64_t) { return true; });
}

// sums += values * columns [c, c + S vectors) of the rows, one row after the other; fetches as
// many columns of `next` from next_c on.
template <int S, class T>
void add_slice(float* sums, const Gathered<T>& rows, int64_t c, const T* const* next,
               int64_t next_c) {
  Vec acc[S];
#pragma GCC unroll 24
  for (int s = 0; s < S; ++s) acc[s] = load(sums + s * kWidth);
  for (int r = 0; r < rows.count; ++r) {
    const int ahead = r + kAhead;
    const T* to_come = ahead < rows.count ? rows.w[ahead] + c : next[ahead - rows.count] + next_c;
#pragma GCC unroll 24
    for (int s = 0; s < S * kWidth; s += int(64 / sizeof(T))) __builtin_prefetch(to_come + s);
    const T* w = rows.w[r] + c;
    const Vec v = splat(rows.value[r]);
#pragma GCC unroll 24
    for (int s = 0; s < S; ++s) acc[s] = fma(v, load(w + s * kWidth), acc[s]);
  }
#pragma GCC unroll 24
  for (int s = 0; s < S; ++s) store(sums + s * kWidth, acc[s]);
}

template <class T>
void add_part(float* sums, const Gathered<T>& rows, int64_t c, int lanes) {
  Vec acc = load(sums);
  for (int r = 0; r < rows.count; ++r)
    acc = fma(splat(rows.value[r]), load_n(rows.w[r] + c, lanes), acc);
  store(sums, acc);
}

// sums += the rows' columns [c, end). `next` are rows to come, from column next_c on.
template <class T>
KSAE_INLINE void add_rows(float* sums, const Gathered<T>& rows, int64_t c, int64_t end,
                          const T* const* next, int64_t next_c) {
  while (end - c >= kWidth) {
    const int64_t left = (end - c) / kWidth;
    const int s = left >= kSlice ? kSlice : left >= 12 ? 12 : left >= 8 ? 8 : left >= 4 ? 4 : 1;
    const bool last = end - c < (s + 1) * kWidth;
    const T* const* then = last ? next : rows.w;
    const int64_t then_c = last ? next_c : c + s * kWidth;
    switch (s) {
      case kSlice:
        add_slice<kSlice>(sums, rows, c, then, then_c);
        break;
#if defined(__AVX512F__)
      case 12:
        add_slice<12>(sums, rows, c, then, then_c);
        break;
#endif
      case 8:
        add_slice<8>(sums, rows, c, then, then_c);
        break;
      case 4:
        add_slice<4>(sums, rows, c, then, then_c);
        break;
      default:
        add_slice<1>(sums, rows, c, then, then_c);
    }
    c += s * kWidth;
    sums += s * kWidth;
  }
  if (c < end) add_part(sums, rows, c, int(end - c));
}

}  // namespace ksae::cpu::KSAE_ISA
