// SPDX-License-Identifier: Apache-2.0
// The list of the pieces of long segments; segments.h says what it is for. Bytes: 4 F a group to
// look for them, 16 a piece.
#include "segments.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;

// One thread a latent. Atomics decide where a piece is listed, not how it is summed.
__global__ void __launch_bounds__(kThreads) list_kernel(Segments s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.F) return;
#pragma unroll  // members of s at fixed places: no copy of it in local memory
  for (int g = 0; g < kMaxGroups; ++g) {
    if (g >= s.groups) break;
    const int32_t begin = s.offsets[g][i], end = s.offsets[g][i + 1];
    const int log = s.log_cut[g];
    if (end - begin <= 1 << log) continue;
    const int32_t first = begin >> log, last = (end - 1) >> log;
    Piece* out = s.list + atomicAdd(s.count, last - first + 1);
    for (int32_t u = first; u <= last; ++u) {
      const int32_t from = u == first ? begin : u << log;
      const int32_t to = u == last ? end : (u + 1) << log;
      *out++ = {static_cast<int32_t>(slot_of(s, g, u, begin)), g, from, to};
    }
  }
}

}  // namespace

cudaError_t list_pieces(const Segments& s, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(s.count, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return forgotten(error);
  KSAE_LAUNCH(list_kernel, static_cast<unsigned>((s.F + kThreads - 1) / kThreads), kThreads, 0,
              stream, s);
  return cudaGetLastError();
}

cudaError_t grid_for(int64_t items, unsigned* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = 8 * multiprocessors;
  *blocks = static_cast<unsigned>(items < most ? items : most);
  return forgotten(error);
}

}  // namespace ksae::cuda
