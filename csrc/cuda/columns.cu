// SPDX-License-Identifier: Apache-2.0
// The columns of a mask, as a list that the selection reads. Bytes: F read twice, 4 a column found.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// The columns of a mask in ascending order, and how many. One block; a warp owns a run of columns
// and takes 32 of them at a time.
__global__ void __launch_bounds__(kThreads)
    list_kernel(int64_t F, const uint8_t* __restrict__ mask, int32_t* __restrict__ columns) {
  KSAE_SHARED_BYTES(shared);
  auto* warps = reinterpret_cast<int32_t*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t run = (F + kThreads - 1) / kThreads * 32, first = warp * run;
  const int64_t last = first + run < F ? first + run : F;
  int32_t own = 0;
#pragma unroll 8
  for (int64_t i = first + lane; i < last; i += 32) own += mask[i] != 0;
  own = warp_sum(own);
  if (lane == 0) warps[warp] = own;
  __syncthreads();
  int32_t at = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) at = all;
    all += warps[w];
  }
  if (threadIdx.x == 0) columns[F] = all;
#pragma unroll 8
  for (int64_t i0 = first; i0 < last; i0 += 32) {
    const int64_t i = i0 + lane;
    const bool found = i < last && mask[i];
    const unsigned all_found = __ballot_sync(0xffffffffu, found);
    if (found) columns[at + __popc(all_found & ((1u << lane) - 1))] = static_cast<int32_t>(i);
    at += __popc(all_found);
  }
}

}  // namespace

cudaError_t list_columns(int64_t F, const uint8_t* mask, int32_t* columns, cudaStream_t stream) {
  if (F > 0x7fffffff) return cudaErrorInvalidValue;
  KSAE_LAUNCH(list_kernel, 1, kThreads, kWarps * sizeof(int32_t), stream, F, mask, columns);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
