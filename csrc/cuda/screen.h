// SPDX-License-Identifier: Apache-2.0
// What the kernels of a screened selection share: float32 scores, their keys, and the k first keys.
#pragma once

#include "keys.h"

namespace ksae::cuda {

constexpr int kScreenWarps = kSelectThreads / 32;

// <w, x> of rows of d numbers, for every lane of a warp: the one order of summation in which scores
// are formed, so that which way a row took does not show.
template <bool kAligned>
__device__ __forceinline__ float dot(const float* w, const float* x, int64_t d) {
  Four sum{};
#pragma unroll 4
  for (int64_t c = 4 * (threadIdx.x % 32); c < d; c += 128) {
    const Four a = load4(w + c, d - c, kAligned), b = load4(x + c, d - c, kAligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.x[j] = fmaf(a.x[j], b.x[j], sum.x[j]);
  }
  return warp_sum((sum.x[0] + sum.x[1]) + (sum.x[2] + sum.x[3]));
}

// The key of latent i for row x [d]; 0, which no key is, where the score is -inf.
template <bool kAligned>
__device__ __forceinline__ uint64_t scored_key(const ScreenedSelectParams& p, const float* x,
                                               int64_t i) {
  const uint32_t u = ordered(dot<kAligned>(p.W_enc + i * p.d, x, p.d) + p.b_enc[i]);
  return u == kOrderedMinusInfinity ? 0 : key_of(u, i);
}

// Writes the k first of `count` keys, of which some may be 0, as row n of the result; the smallest
// latents that were not chosen where there are fewer. room: of count rounded up to a power of two.
// chosen: of (k + 31) / 32 words.
__device__ __forceinline__ void write_first(const ScreenedSelectParams& p, int64_t n,
                                            uint64_t* keys, int count, uint32_t* chosen) {
  sort_keys(keys, count);
  int held = 0;
  for (int64_t j0 = 0; j0 < p.k; j0 += kSelectThreads) {
    const int64_t j = j0 + threadIdx.x;
    const uint64_t key = j < p.k && j < count ? keys[j] : 0;
    if (key) {
      const float z = unordered(static_cast<uint32_t>(key >> 32));
      p.values[n * p.k + j] = z <= 0 ? 0.0f : z;
      p.indices[n * p.k + j] = static_cast<uint32_t>(~key);
    }
    held += __syncthreads_count(key != 0);
  }
  if (held < p.k)
    fill_rest(p.k, keys, held, chosen, [&](int64_t slot, int64_t i) {
      p.values[n * p.k + slot] = 0;
      p.indices[n * p.k + slot] = i;
    });
}

inline bool rows_aligned(const ScreenedSelectParams& p) {
  return aligned4(p.x, p.d) && aligned4(p.W_enc, p.d);
}

}  // namespace ksae::cuda
