// SPDX-License-Identifier: Apache-2.0
// Rows that a screened selection could not prove, scored in full: exact on any data.
//
// The latents are cut into so many parts for each listed row that kPrograms blocks have work. A
// block scores a part, a warp a latent, and appends the keys above the row's bound; where the
// buffer is full its k best stay, and the last of them is the new bound. merge brings the parts of
// a row together. So nothing overflows. The grids are fixed and leave at once if no row is listed.
//
// Bytes a listed row: all of W_enc, 4 F d, spread over the device.
#include "screen.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = kSelectThreads;
#ifdef KSAE_EMULATE
constexpr int kPrograms = 6;
#else
constexpr int kPrograms = 264;  // two for each multiprocessor of an H100
#endif
constexpr int kRound = 64;  // latents that a block scores before it looks at its buffer

struct Args {
  ScreenedSelectParams p;
  uint64_t* parts;  // [kPrograms, k] keys of a part, 0 if there are fewer
  int capacity;
};

int capacity_of(const ScreenedSelectParams& p) {
  int capacity = 256;
  while (capacity < 2 * p.k + kRound) capacity *= 2;
  return capacity;
}

size_t shared_bytes(const ScreenedSelectParams& p) {
  return capacity_of(p) * sizeof(uint64_t) + 4 * (4 + static_cast<size_t>((p.k + 31) / 32));
}

__device__ __forceinline__ int parts_of(int listed) {
  return listed < kPrograms ? kPrograms / (listed < 1 ? 1 : listed) : 1;
}

// Keeps the k best of the buffer; least: no key below it can win.
__device__ __forceinline__ void narrow(uint64_t* keys, uint32_t* count, int64_t k,
                                       uint64_t* least) {
  sort_keys(keys, static_cast<int>(*count));
  *least = keys[k - 1] + 1;
  __syncthreads();
  if (threadIdx.x == 0) *count = static_cast<uint32_t>(k);
  __syncthreads();
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) redo_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  const ScreenedSelectParams& p = args.p;
  auto* keys = reinterpret_cast<uint64_t*>(shared);
  auto* count = reinterpret_cast<uint32_t*>(keys + args.capacity);
  uint32_t* chosen = count + 4;
  const int listed = *p.listed, parts = parts_of(listed);
  const int64_t rounds = (p.F + kRound - 1) / kRound;
  for (int64_t item = blockIdx.x; item < int64_t(listed) * parts; item += gridDim.x) {
    const int64_t n = p.list[item / parts], part = item % parts;
    const float* x = p.x + n * p.d;
    const int64_t first = rounds * part / parts * kRound;
    int64_t last = rounds * (part + 1) / parts * kRound;
    if (last > p.F) last = p.F;
    uint64_t least = uint64_t(p.bounds[n]) << 32;
    __syncthreads();  // the last item's keys are written
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    for (int64_t i0 = first; i0 < last; i0 += kRound) {
      for (int64_t i = i0 + threadIdx.x / 32; i < last && i < i0 + kRound; i += kScreenWarps) {
        if (p.mask && !p.mask[i]) continue;
        const uint64_t key = scored_key<kAligned>(p, x, i);
        if (threadIdx.x % 32 == 0 && key && key >= least) keys[atomicAdd(count, 1u)] = key;
      }
      __syncthreads();
      const bool full = *count + kRound > static_cast<uint32_t>(args.capacity);
      __syncthreads();
      if (full) narrow(keys, count, p.k, &least);  // more than k: the buffer holds 2 k and a round
    }
    const auto held = static_cast<int>(*count);
    if (parts == 1) {
      write_first(p, n, keys, held, chosen);
      continue;
    }
    sort_keys(keys, held);
    for (int64_t j = threadIdx.x; j < p.k; j += kThreads)
      args.parts[item * p.k + j] = j < held ? keys[j] : 0;
  }
}

// The k best of all parts of a row.
__global__ void __launch_bounds__(kThreads) merge_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  const ScreenedSelectParams& p = args.p;
  auto* keys = reinterpret_cast<uint64_t*>(shared);
  auto* count = reinterpret_cast<uint32_t*>(keys + args.capacity);
  uint32_t* chosen = count + 4;
  const int listed = *p.listed, parts = parts_of(listed);
  if (static_cast<int>(blockIdx.x) >= listed || parts == 1) return;
  const uint64_t* own = args.parts + int64_t(blockIdx.x) * parts * p.k;
  uint64_t least = 1;
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  for (int64_t e0 = 0; e0 < parts * p.k; e0 += kRound) {
    const int64_t e = e0 + threadIdx.x;
    if (threadIdx.x < kRound && e < parts * p.k && own[e] >= least)
      keys[atomicAdd(count, 1u)] = own[e];
    __syncthreads();
    const bool full = *count + kRound > static_cast<uint32_t>(args.capacity);
    __syncthreads();
    if (full) narrow(keys, count, p.k, &least);
  }
  write_first(p, p.list[blockIdx.x], keys, static_cast<int>(*count), chosen);
}

}  // namespace

size_t screened_redo_workspace(const ScreenedSelectParams& p) {
  return sizeof(uint64_t) * static_cast<size_t>(kPrograms * p.k);
}

cudaError_t screened_redo(const ScreenedSelectParams& p, void* workspace, cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  if (p.k > kMostScreened) return cudaErrorInvalidValue;
  const Args args{p, static_cast<uint64_t*>(workspace), capacity_of(p)};
  const size_t bytes = shared_bytes(p);
  const cudaError_t error = with_alignment(rows_aligned(p), [&](auto is) {
    KSAE_LAUNCH((redo_kernel<is.value>), kPrograms, kThreads, bytes, stream, args);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  const unsigned blocks = kPrograms / 2;  // more rows have one part each
  KSAE_LAUNCH(merge_kernel, blocks, kThreads, bytes, stream, args);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
