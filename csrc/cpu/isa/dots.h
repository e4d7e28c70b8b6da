// SPDX-License-Identifier: Apache-2.0
// Products of one vector with several rows, while the rows to come are fetched.
#pragma once

#include "simd.h"

namespace ksae::cpu::KSAE_ISA {

#if defined(__AVX512F__)
constexpr int kDots = 4;  // rows in one go, four sums each: 16 of 32 registers
#else
constexpr int kDots = 2;
#endif

// The last vectors of a row, whole or not.
template <class T>
KSAE_INLINE Vec load_some(const T* p, int lanes) {
  return lanes == kWidth ? load(p) : load_n(p, lanes);
}

// out[r] = <a, rows[r]> in float32, each in four chains, so that the bits are the same for any R;
// fetches as many columns of `next` into L1 or, if it is used later, L2.
template <int R, int kLevel, class A, class T>
KSAE_INLINE void dots(const A* a, const T* const* w, int64_t d, const T* const* next, float* out) {
  Vec acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) acc[r][s] = splat(0);
  int64_t c = 0;
  for (; c + 4 * kWidth <= d; c += 4 * kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < 4 * kWidth; l += int(64 / sizeof(T)))
        __builtin_prefetch(next[r] + c + l, 0, kLevel);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const Vec x = load(a + c + s * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][s] = fma(x, load(w[r] + c + s * kWidth), acc[r][s]);
    }
  }
  for (; c < d; c += kWidth) {
    const int lanes = d - c < kWidth ? int(d - c) : kWidth;
    const Vec x = load_some(a + c, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][0] = fma(x, load_some(w[r] + c, lanes), acc[r][0]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out[r] = sum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
}

// Any number of rows.
template <int kLevel, class A, class T>
KSAE_INLINE void dots(int count, const A* a, const T* const* w, int64_t d, const T* const* next,
                      float* out) {
  int r = 0;
  for (; r + kDots <= count; r += kDots) dots<kDots, kLevel>(a, w + r, d, next + r, out + r);
  for (; r < count; ++r) dots<1, kLevel>(a, w + r, d, next + r, out + r);
}

}  // namespace ksae::cpu::KSAE_ISA
