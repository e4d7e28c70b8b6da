// SPDX-License-Identifier: Apache-2.0
// Exact selection with a running threshold, shared by topk and topk_encode.
//
// A row keeps a small buffer of (score, index), indices ascending. A score enters if it is not
// <= tau; when the buffer is full, refine() keeps the k best and raises tau to the k-th score. A
// later score equal to tau has a larger index, so it loses: the strict gate is exact, in one pass,
// for any data; NaN passes every gate. tau starts as NaN, which lets everything in.
// Cost on random scores: k (1 + ln(F / k)) entries a row and a refine every capacity - k of them.
// Worst case (scores ascending): every score enters.
// Tried: nth_element instead of bisection in refine(): 1.5 us a call against 0.2.
#pragma once

#include "../isa.h"
#include "simd.h"

namespace ksae::cpu::KSAE_ISA {

// The k-th largest of n keys, by bisection on its bits: 32 counting passes over L1.
inline uint32_t kth_key(const uint32_t* keys, int64_t n, int64_t k) {
  uint32_t kth = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = kth | 1u << bit;
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= candidate;
    if (count >= k) kth = candidate;
  }
  return kth;
}

// Keeps the k largest (equal: first) of n entries in their order; returns the new tau.
inline float refine(float* score, int32_t* index, int64_t n, int64_t k, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score[i]);
  const uint32_t kth = kth_key(keys, n, k);
  int64_t larger = 0;
  for (int64_t i = 0; i < n; ++i) larger += keys[i] > kth;
  int64_t equal = k - larger, out = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] > kth || (keys[i] == kth && equal-- > 0)) {
      score[out] = score[i];
      index[out++] = index[i];
    }
  }
  // k NaNs are in, with the smallest indices: nothing can follow, and only NaN will still pass.
  return kth == 0xffffffffu ? __builtin_inff() : order_score(kth);
}

// One 64-bit key a candidate: larger score first, then smaller index.
KSAE_INLINE uint64_t sort_key(float score, int32_t index) {
  return uint64_t(order_key(score)) << 32 | uint32_t(~index);
}
KSAE_INLINE float key_score(uint64_t key) { return order_score(uint32_t(key >> 32)); }
KSAE_INLINE int32_t key_index(uint64_t key) { return int32_t(~uint32_t(key)); }

// Calls f with the storage type as a tag: `using T = typename decltype(tag)::type`.
template <class T>
struct Tag {
  using type = T;
};
template <class Fn>
KSAE_INLINE void with_dtype(Dtype dtype, Fn f) {
  if (dtype == Dtype::kFloat32) {
    f(Tag<float>{});
  } else if (dtype == Dtype::kBFloat16) {
    f(Tag<BF16>{});
  } else {
    f(Tag<F16>{});
  }
}

}  // namespace ksae::cpu::KSAE_ISA
