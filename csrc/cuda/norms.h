// SPDX-License-Identifier: Apache-2.0
// What a bf16 copy of a float32 row lost: bounds of norms, and the margin that they prove.
//
// With s the float32 score of a row x and a latent w, and s^ that of their copies x^ and w^ in
// float32 accumulators, g = (d + 16) 2^-22 bounding what either sum loses,
//   |s - s^| <= |w - w^| |x| (1 + g) + |w^| (|x - x^| + g |x^| + g |x|) + 2^-20 |b| + d 2^-124.
// docs/design/topk_encode.md has the proof.
#pragma once

#include "common.h"

namespace ksae::cuda {

// A thread's part of the sums of squares of a row, of what its copy lost and of the copy.
struct Squares {
  float full, lost, rounded;

  __device__ __forceinline__ void add(float t) {
    const float r = __bfloat162float(__float2bfloat16_rn(t));
    full = fmaf(t, t, full);
    lost = fmaf(t - r, t - r, lost);
    rounded = fmaf(r, r, rounded);
  }
};

// At least the norm of a row of d numbers: 2^-22 is four times a rounding, and the second term is
// more than squares lose to underflow.
__device__ __forceinline__ float norm_above(double squares, int64_t d) {
  const float relative = 1 + static_cast<float>(d + 64) * 0x1p-22f;
  const float lost = static_cast<float>(d) * 0x1p-126f;
  return sqrtf(fmaf(static_cast<float>(squares), relative, lost)) * (1 + 0x1p-18f);
}

// Upper bounds of the norms of row i of `rows` rows of d numbers, in norms [3, rows]; infinite
// where a sum might overflow. All threads of the block call it.
__device__ __forceinline__ void store_norms(float* norms, int64_t rows, int64_t i, int64_t d,
                                            const Squares& squares, double* scratch) {
  const float full = norm_above(block_sum(squares.full, scratch), d);
  const float lost = norm_above(block_sum(squares.lost, scratch), d);
  const float rounded = norm_above(block_sum(squares.rounded, scratch), d);
  const bool safe = full <= 0x1p60f;  // not if it is NaN
  if (threadIdx.x == 0) {
    norms[i] = safe ? full : INFINITY;
    norms[rows + i] = safe ? lost : INFINITY;
    norms[2 * rows + i] = safe ? rounded : INFINITY;
  }
}

// The share of a row x in the margins of all latents.
struct RowMargin {
  float of_lost, of_rounded, floor;

  __device__ __forceinline__ RowMargin(const float* norms, int64_t rows, int64_t n, int64_t d) {
    const float g = static_cast<float>(d + 16) * 0x1p-22f;
    const float full = norms[n], lost = norms[rows + n], rounded = norms[2 * rows + n];
    of_lost = full * (1 + g);
    of_rounded = lost + g * (rounded + full);
    floor = static_cast<float>(d) * 0x1p-124f;
  }

  // Of a latent with bias b, or of a group of them by its largest numbers.
  __device__ __forceinline__ float with(float lost, float rounded, float b) const {
    const float size = fabsf(b);
    const float of_bias = size < 1e37f ? size * 0x1p-20f : INFINITY;  // of a NaN as well
    return fmaf(lost, of_lost, fmaf(rounded, of_rounded, of_bias + floor));
  }
};

}  // namespace ksae::cuda
