// SPDX-License-Identifier: Apache-2.0
// The order of selection, as integers, and what a block does with it in shared memory.
//
// A key is the ordered score and the complement of the column: larger keys come first, and equal
// scores by their column. No two keys of a row are equal.
#pragma once

#include "common.h"

namespace ksae::cuda {

constexpr int kSelectThreads = 256;
constexpr int kHistograms = 4 * 256;  // one for each byte of a score
constexpr uint32_t kOrderedMinusInfinity = 0x007fffff;
constexpr int kMostGroups = 4096;  // of consecutive columns of a row

// Threads a group, up to 32, as a power of two: by shifts, for every thread asks.
__host__ __device__ __forceinline__ int log_lanes_of(int64_t width, int64_t k) {
  int log = 5;
  while (log > 0 && width >> (log + 2) < 4 * k && width >> (log + 1) <= kMostGroups) --log;
  return log;
}

__host__ __device__ __forceinline__ int groups_of(int64_t width, int log_lanes) {
  return static_cast<int>((width + (4 << log_lanes) - 1) >> (log_lanes + 2));
}

// Larger means earlier; every NaN is one number, -0 is +0.
__device__ __forceinline__ uint32_t ordered(float s) {
  if (s != s) return 0xffffffffu;
  const uint32_t b = __float_as_uint(s + 0.0f);
  return (b >> 31) ? ~b : b | 0x80000000u;
}

// The score of an ordered number.
__device__ __forceinline__ float unordered(uint32_t u) {
  if (u == 0xffffffffu) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(u >> 31 ? u & 0x7fffffffu : ~u);
}

__device__ __forceinline__ uint64_t key_of(uint32_t u, int64_t i) {
  return uint64_t(u) << 32 | static_cast<uint32_t>(~i);
}

// A number that at least k of n numbers reach, and unless they share all bytes of it, at most k / 4
// more; 0 if n < k. One byte a round. histograms: zeros.
__device__ __forceinline__ uint32_t bound_of(const uint32_t* x, int n, int64_t k,
                                             uint32_t* histograms) {
  if (n < k) return 0;
  uint32_t prefix = 0, rest = static_cast<uint32_t>(k);
  for (int shift = 24; shift >= 0; shift -= 8, histograms += 256) {
    for (int g = threadIdx.x; g < n; g += kSelectThreads)
      if (shift == 24 || x[g] >> (shift + 8) == prefix >> (shift + 8))
        atomicAdd(&histograms[(x[g] >> shift) & 255], 1u);
    __syncthreads();
    // Each warp finds the digit for itself. A lane owns 8 digits, lane 0 the largest.
    const int lane = threadIdx.x % 32;
    const auto counts = reinterpret_cast<const Packed<uint32_t, 4>*>(histograms + 248 - 8 * lane);
    const Packed<uint32_t, 4> low = counts[0], high = counts[1];
    uint32_t own = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) own += low.x[b] + high.x[b];
    uint32_t before = own;
    for (int o = 1; o < 32; o <<= 1) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, before, o);
      if (lane >= o) before += other;
    }
    before -= own;
    const bool here = before < rest && rest <= before + own;
    const int owner = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, here))) - 1;
    uint32_t left = rest - before, digit = 255 - 8 * lane, count = 0;
#pragma unroll
    for (int b = 7; b >= 0; --b) {
      const uint32_t next = b < 4 ? low.x[b % 4] : high.x[b % 4];
      if (count < left) {  // not found yet
        left -= count;
        count = next;
        digit = 248 - 8 * lane + b;
      }
    }
    prefix |= __shfl_sync(0xffffffffu, digit, owner) << shift;
    rest = __shfl_sync(0xffffffffu, left, owner);
    count = __shfl_sync(0xffffffffu, count, owner);
    if (count - rest <= k / 4) break;
  }
  return prefix;
}

// Bitonic sort of keys[0, count), largest first; the buffer is filled with 0 up to a power of two.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  int n = 1;
  while (n < count) n *= 2;
  for (int i = count + threadIdx.x; i < n; i += kSelectThreads) keys[i] = 0;
  __syncthreads();
  for (int width = 2; width <= n; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      for (int t = threadIdx.x; t < n / 2; t += kSelectThreads) {
        const int i = 2 * t - (t & (step - 1)), j = i + step;
        const uint64_t a = keys[i], b = keys[j];
        if ((a < b) == ((i & width) == 0)) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      __syncthreads();
    }
}

// write(slot, i) for slots [count, k): the smallest columns i that are not among the `count` keys.
// They all lie below k. chosen: a bit for each of these.
template <class Write>
__device__ __forceinline__ void fill_rest(int64_t k, const uint64_t* keys, int count,
                                          uint32_t* chosen, Write write) {
  const auto words = static_cast<int>((k + 31) / 32);
  for (int w = threadIdx.x; w < words; w += kSelectThreads) chosen[w] = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < count; j += kSelectThreads) {
    const auto i = static_cast<uint32_t>(~keys[j]);
    if (i < k) atomicOr(&chosen[i / 32], 1u << i % 32);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int run = (words + 31) / 32, first = threadIdx.x * run;
  const int last = first + run < words ? first + run : words;
  int own = 0;
  for (int w = first; w < last; ++w) own += 32 - __popc(chosen[w]);
  int slot = own;
  for (int o = 1; o < 32; o <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, slot, o);
    if (static_cast<int>(threadIdx.x) >= o) slot += other;
  }
  slot += count - own;
  for (int w = first; w < last; ++w)
    for (uint32_t rest = ~chosen[w]; rest && slot < k; rest &= rest - 1, ++slot)
      write(slot, 32 * w + __ffs(static_cast<int>(rest)) - 1);
}

}  // namespace ksae::cuda
