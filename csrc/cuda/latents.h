// SPDX-License-Identifier: Apache-2.0
// What the passes over latents use of each other.
#pragma once

#include "common.h"

namespace ksae::cuda {

// Whether the scales of all groups are finite; null: they are 1.
__device__ __forceinline__ bool all_finite(const float* scales, int groups) {
  for (int g = 0; scales && g < groups; ++g)
    if (!finite(scales[g])) return false;
  return true;
}

// Sums of the values of each latent.
struct ValueSumsParams {
  int64_t F;
  Dtype dtype;
  const int32_t* offsets;  // [F + 1]
  const int32_t* order;    // [entries]
  const void* values;      // [entries]
  int64_t entries;
  void* value_sum;  // [F] dtype
};
size_t value_sums_workspace(const ValueSumsParams& p);
cudaError_t value_sums(const ValueSumsParams& p, void* workspace, cudaStream_t stream);

}  // namespace ksae::cuda
