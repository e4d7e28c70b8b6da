// SPDX-License-Identifier: Apache-2.0
// The counters of a step: tokens since each latent fired, and how many of them are dead. It
// replaces ten launches on small tensors. One block where there are few latents; else each block
// counts its run of them, and one adds the counts. Bytes: 20 a latent.
#include "common.h"
#include "ksae/op.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kFew = 32768, kRun = 4096;  // latents of a block

struct Counts {
  double dead, soon;  // whole numbers
};

__device__ __forceinline__ void store_counts(const CountTokensParams& p, const Counts& counts,
                                             bool taken) {
  *p.l0 = static_cast<float>(p.offsets[p.F]) / static_cast<float>(p.tokens);
  *p.dead = static_cast<float>(counts.dead) / static_cast<float>(p.F);
  *p.soon = static_cast<int64_t>(counts.soon);
  *p.t += taken;
}

__global__ void __launch_bounds__(kThreads)
    count_latents_kernel(CountTokensParams p, int64_t run, Counts* counts) {
  KSAE_SHARED_BYTES(shared);
  auto* scratch = reinterpret_cast<double*>(shared);
  const bool taken = *p.taken;
  const int64_t first = blockIdx.x * run, last = first + run < p.F ? first + run : p.F;
  int dead = 0, soon = 0;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const int64_t before = p.since[i];
    const bool fired = p.offsets[i] < p.offsets[i + 1];
    const int64_t after = !taken ? before : fired ? 0 : before + p.tokens;
    p.since[i] = after;
    dead += before > p.dead_after;
    soon += after > p.dead_after - p.within;
  }
  const Counts all{block_sum(dead, scratch), block_sum(soon, scratch)};
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    store_counts(p, all, taken);
  else
    counts[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kThreads)
    add_counts_kernel(CountTokensParams p, int64_t blocks, const Counts* counts) {
  KSAE_SHARED_BYTES(shared);
  auto* scratch = reinterpret_cast<double*>(shared);
  Counts sum{};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum.dead += counts[i].dead;
    sum.soon += counts[i].soon;
  }
  sum = {block_sum(sum.dead, scratch), block_sum(sum.soon, scratch)};
  if (threadIdx.x == 0) store_counts(p, sum, *p.taken);
}

int64_t run_of(const CountTokensParams& p) { return p.F <= kFew ? kFew : kRun; }
int64_t blocks_of(const CountTokensParams& p) { return (p.F + run_of(p) - 1) / run_of(p); }

}  // namespace

size_t count_tokens_workspace(const CountTokensParams& p) { return blocks_of(p) * sizeof(Counts); }

cudaError_t count_tokens(const CountTokensParams& p, void* workspace, cudaStream_t stream) {
  const int64_t blocks = blocks_of(p);
  if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
  auto* counts = static_cast<Counts*>(workspace);
  constexpr size_t kBytes = kThreads / 32 * sizeof(double);
  KSAE_LAUNCH(count_latents_kernel, static_cast<unsigned>(blocks), kThreads, kBytes, stream, p,
              run_of(p), counts);
  if (blocks > 1) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    KSAE_LAUNCH(add_counts_kernel, 1u, kThreads, kBytes, stream, p, blocks, counts);
  }
  return cudaGetLastError();
}

namespace {

using P = CountTokensParams;
const Field kFields[] = {
    KSAE_FIELD(P, F),  KSAE_FIELD(P, taken),  KSAE_FIELD(P, offsets),    KSAE_FIELD(P, since),
    KSAE_FIELD(P, t),  KSAE_FIELD(P, tokens), KSAE_FIELD(P, dead_after), KSAE_FIELD(P, within),
    KSAE_FIELD(P, l0), KSAE_FIELD(P, dead),   KSAE_FIELD(P, soon),
};
const OpOf<cudaStream_t, P, count_tokens, count_tokens_workspace> op("count_tokens", kFields);

}  // namespace

}  // namespace ksae::cuda
