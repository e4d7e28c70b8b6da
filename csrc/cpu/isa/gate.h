// SPDX-License-Identifier: Apache-2.0
// Exact selection with a running threshold, shared by topk and topk_encode.
//
// A row keeps a small buffer of (score, index), indices ascending. A score enters if it is not
// <= tau; when the buffer is full, refine() keeps the k best and raises tau to the k-th score. A
// later score equal to tau has a larger index, so it loses: the strict gate is exact, in one pass,
// for any data; NaN passes every gate. tau starts as NaN, which lets everything in.
// Cost on random scores: k (1 + ln(F / k)) entries a row and a refine every capacity - k of them.
// Worst case (scores ascending): every score enters.
#pragma once

#include "../isa.h"
#include "simd.h"

namespace ksae::cpu::KSAE_ISA {

// The k-th largest of n keys, by bisection on its bits: counting passes over L1, fewer once a cut
// with exactly k above it is found.
inline uint32_t kth_key(const uint32_t* keys, int64_t n, int64_t k) {
  uint32_t cut = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = cut | 1u << bit;
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= candidate;
    if (count >= k) cut = candidate;
    if (count == k) break;
  }
  uint32_t kth = 0xffffffffu;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = keys[i] >= cut ? keys[i] : 0xffffffffu;
    kth = key < kth ? key : kth;
  }
  return kth;
}

// Moves the entries that are not < least to the front, in order; returns their number. Reads and
// writes whole vectors: the buffers are padded.
inline int64_t keep_from(float* score, int32_t* index, int64_t n, float least) {
  const Vec t = splat(least);
  int64_t out = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec s = load(score + i);
    uint32_t mask = not_lt(s, t);
    if (n - i < kWidth) mask &= (1u << (n - i)) - 1;
    compress(index + out, mask, index + i);
    out += compress(score + out, mask, s);
  }
  return out;
}

// Keeps the k largest (equal: first) of n entries in their order; returns the new tau.
inline float refine(float* score, int32_t* index, int64_t n, int64_t k, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score[i]);
  const uint32_t kth = kth_key(keys, n, k);
  int64_t larger = 0, equal = 0;
  for (int64_t i = 0; i < n; ++i) larger += keys[i] > kth;
  for (int64_t i = 0; i < n; ++i) equal += keys[i] == kth;
  if (larger + equal == k && kth != 0xffffffffu) {
    keep_from(score, index, n, order_score(kth));
    return order_score(kth);
  }
  equal = k - larger;
  for (int64_t i = 0, out = 0; i < n; ++i) {
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

// Sorts n distinct keys, largest first; `spare` holds n more. Up to 128, counting the larger ones
// of each is branch-free.
inline void sort_keys(uint64_t* keys, int64_t n, uint64_t* spare) {
  if (n > 128) return sort_descending(keys, n);
  for (int64_t i = 0; i < n; ++i) spare[i] = keys[i];
  for (int64_t i = 0; i < n; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += spare[j] > spare[i];
    keys[rank] = spare[i];
  }
}

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
