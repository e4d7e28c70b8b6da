// SPDX-License-Identifier: Apache-2.0
// Tokens grouped by latent (CSC): count, scan, place in any order, sort each segment by position.
//
// Integer atomics decide only where an entry waits before its segment is sorted, so the result is
// the stable one on every run. Nothing waits for the device and no size depends on data.
// Bytes: two readings of the code, 8 N k of positions, 12 F of counters. Limits: a segment of L
// entries is sorted by one block in about log(L)^2 / 2 passes over it.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSortThreads = 128;

// kPlace = false: counts entries a latent. True: writes each at its latent's cursor.
template <class T, bool kPlace>
__global__ void __launch_bounds__(kThreads) entries_kernel(GroupParams p, int32_t* counters) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.N * p.k || load(static_cast<const T*>(p.values) + at) == 0) return;  // NaN counts
  const int64_t i = index_at(p.indices64, p.indices32, at);
  const int32_t slot = atomicAdd(counters + i, 1);
  if (kPlace) p.order[slot] = static_cast<int32_t>(at);
}

// offsets = exclusive sum of the counters, which become cursors. One block; a thread owns a run.
__global__ void __launch_bounds__(kThreads) scan_kernel(GroupParams p, int32_t* counters) {
  KSAE_SHARED_BYTES(shared);
  auto* sums = reinterpret_cast<int32_t*>(shared);
  const int64_t run = (p.F + kThreads - 1) / kThreads, first = threadIdx.x * run;
  const int64_t last = first + run < p.F ? first + run : p.F;
  int32_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += counters[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  int32_t before = 0;
  for (unsigned t = 0; t < threadIdx.x; ++t) before += sums[t];
  if (threadIdx.x == kThreads - 1) p.offsets[p.F] = before + sum;
  for (int64_t i = first; i < last; ++i) {
    const int32_t count = counters[i];
    p.offsets[i] = counters[i] = before;
    before += count;
  }
}

// Ascending sort of each segment. Every comparison puts the smaller number first, so what lies past
// the segment acts as infinity and never moves.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(GroupParams p) {
  int32_t* x = p.order + p.offsets[blockIdx.x];
  const int n = p.offsets[blockIdx.x + 1] - p.offsets[blockIdx.x];
  for (int64_t width = 2; width < 2 * int64_t(n); width *= 2)
    for (int64_t step = width / 2; step > 0; step /= 2) {
      for (int64_t t = threadIdx.x; t < n; t += kSortThreads) {
        const int64_t other = step == width / 2 ? (t ^ (width - 1)) : (t ^ step);
        if (other > t && other < n && x[t] > x[other]) {
          const int32_t swap = x[t];
          x[t] = x[other];
          x[other] = swap;
        }
      }
      __syncthreads();
    }
}

}  // namespace

size_t group_by_latent_workspace(const GroupParams& p) { return p.F * sizeof(int32_t); }

cudaError_t group_by_latent(const GroupParams& p, void* workspace, cudaStream_t stream) {
  const int64_t entries = p.N * p.k;
  if (entries == 0) return cudaMemsetAsync(p.offsets, 0, (p.F + 1) * sizeof(int32_t), stream);
  auto* counters = static_cast<int32_t*>(workspace);
  cudaError_t error = cudaMemsetAsync(counters, 0, p.F * sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(p.order, 0xff, entries * sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>((entries + kThreads - 1) / kThreads);
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KSAE_LAUNCH((entries_kernel<T, false>), blocks, kThreads, 0, stream, p, counters);
    KSAE_LAUNCH(scan_kernel, 1, kThreads, kThreads * sizeof(int32_t), stream, p, counters);
    KSAE_LAUNCH((entries_kernel<T, true>), blocks, kThreads, 0, stream, p, counters);
    KSAE_LAUNCH(sort_kernel, static_cast<unsigned>(p.F), kSortThreads, 0, stream, p);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
