// SPDX-License-Identifier: Apache-2.0
// A row of sums in L1 to which gathered rows are added: what the passes over latents share.
#pragma once

#include "gate.h"

namespace ksae::cpu::KSAE_ISA {

template <class T>
KSAE_INLINE Vec load_part(const T* p, int64_t c, int64_t d) {
  return c + kWidth <= d ? load(p + c) : load_n(p + c, int(d - c));
}
template <class T>
KSAE_INLINE void store_part(T* p, Vec v, int64_t c, int64_t d) {
  if (c + kWidth <= d) {
    store(p + c, v);
  } else {
    store_n(p + c, v, int(d - c));
  }
}

KSAE_INLINE void clear(float* p, int64_t n) {
  for (int64_t c = 0; c < n; ++c) p[c] = 0;
}

// acc[c] += coefficient * (row[c] - centre[c])
template <class Row>
KSAE_INLINE void add_row(float* acc, float coefficient, const Row* row, const Row* centre,
                         int64_t d) {
  const Vec a = splat(coefficient);
  int64_t c = 0;
  if (centre) {
    for (; c + kWidth <= d; c += kWidth)
      store(acc + c, fma(a, load(row + c) - load(centre + c), load(acc + c)));
  } else {
    for (; c + kWidth <= d; c += kWidth) store(acc + c, fma(a, load(row + c), load(acc + c)));
  }
  if (c < d) {
    Vec r = load_n(row + c, int(d - c));
    if (centre) r = r - load_n(centre + c, int(d - c));
    store(acc + c, fma(a, r, load(acc + c)));
  }
}

}  // namespace ksae::cpu::KSAE_ISA
