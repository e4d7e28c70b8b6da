// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding to bfloat16 with counted randomness; the meaning is in reference/rounding.py.
//
// The 16 bits that decide a rounding come from Philox4x32-10 (Salmon et al., SC 2011), keyed by a
// seed and counted by step, latent, group of four columns and purpose: any launch, any slice of
// columns and any order of threads rounds a number in the same way. One call gives two purposes
// four columns each: some 70 integer instructions for 8 roundings.
#pragma once

#include "common.h"

namespace ksae::cuda {

enum Purpose : uint32_t { kRoundMoments = 0, kRoundWeights = 1 };

// Bits for four columns, 16 each, of two purposes: m and v, or the weights and their unit rows.
struct Draws {
  uint64_t first, second;
};

__device__ __forceinline__ Draws philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                        uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xd2511f53) * c0, b = uint64_t(0xcd9e8d57) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9;
    k1 += 0xbb67ae85;
  }
  return {c0 | uint64_t(c1) << 32, c2 | uint64_t(c3) << 32};
}

// For columns [column, column + 4) of a latent, column a multiple of 4. seed: seed and step.
__device__ __forceinline__ Draws draws4(const int64_t* seed, int64_t latent, int64_t column,
                                        Purpose purpose) {
  const auto key = static_cast<uint64_t>(seed[0]);
  return philox(static_cast<uint32_t>(column / 4), static_cast<uint32_t>(latent),
                static_cast<uint32_t>(seed[1]), purpose, static_cast<uint32_t>(key),
                static_cast<uint32_t>(key >> 32));
}

// Rounds to a neighbour in bfloat16, up with the probability of the share below it. Infinities and
// NaN stay.
__device__ __forceinline__ float stochastic(float x, uint32_t bits) {
  return finite(x) ? __uint_as_float((__float_as_uint(x) + bits) & 0xffff0000u) : x;
}

__device__ __forceinline__ Four stochastic4(const Four& x, uint64_t bits) {
  Four r;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    r.x[e] = stochastic(x.x[e], static_cast<uint32_t>(bits >> 16 * e) & 0xffff);
  return r;
}

}  // namespace ksae::cuda
