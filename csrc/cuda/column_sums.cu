// SPDX-License-Identifier: Apache-2.0
// Partial sums of rows, added. Bytes: 4 a partial sum.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 1024;

// A lane a column, a warp every 32nd row; warps in their order.
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const float* sums, int64_t rows, int64_t d, float* out) {
  KSAE_SHARED_BYTES(shared);
  auto* partial = reinterpret_cast<float*>(shared);  // [warps, 32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (c < d) {
#pragma unroll 8
    for (int64_t r = warp; r < rows; r += kThreads / 32) sum += sums[r * d + c];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || c >= d) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += partial[32 * w + lane];
  out[c] = sum;
}

}  // namespace

cudaError_t column_sums(const float* sums, int64_t rows, int64_t d, float* out,
                        cudaStream_t stream) {
  KSAE_LAUNCH(column_sums_kernel, static_cast<unsigned>((d + 31) / 32), kThreads,
              kThreads * sizeof(float), stream, sums, rows, d, out);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
