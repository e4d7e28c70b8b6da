// SPDX-License-Identifier: Apache-2.0
// The k largest float32 scores of each row, found among the scores of bf16 copies; one block a row.
//
// With s^ the given score and m the margin of norms.h, a latent's float32 score lies in
// [s^ - m, s^ + m].
// 1. One read of the row gives the maximum of each group of consecutive columns. With the largest
//    margin of the group, maximum - margin is a lower end of one of its latents. A number that k of
//    these reach bounds the k-th score from below.
// 2. Groups whose maximum + margin reaches the bound are read again; a latent of theirs whose upper
//    end reaches it is appended, its lower end beside it. The lower ends of these bound the k-th
//    score once more, and more tightly.
// 3. What still reaches the bound, some 2 k, is scored in float32, a warp a latent, and sorted.
// A row that appends more than there is room for is listed; screened_redo scores it in full.
//
// Bytes a row: 4 F once, about k groups again, and 4 d for each of the 2 k. Groups' norms are made
// once a call, 12 F bytes; a latent's own are read in step 2 alone.
// Limits: k <= kMostScreened, F < 2^31.
#include "norms.h"
#include "screen.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kBatch = 4;

struct Plan {
  int log, groups, capacity;
  size_t bytes;  // of shared memory
};

Plan plan_of(const ScreenedSelectParams& p) {
  Plan plan{};
  plan.log = log_lanes_of(p.F, p.k);
  while (groups_of(p.F, plan.log) > kMostGroups) ++plan.log;
  plan.groups = groups_of(p.F, plan.log);
  plan.capacity = 512;
  while (plan.capacity < 4 * p.k) plan.capacity *= 2;
  if (p.capacity) plan.capacity = p.capacity;
  plan.bytes = plan.capacity * (sizeof(uint64_t) + sizeof(uint32_t)) + 4 * (kHistograms + 8) +
               8 * static_cast<size_t>(plan.groups);
  return plan;
}

struct Args {
  ScreenedSelectParams p;
  Plan plan;
};

// The largest norms and biases of each group: [3, groups].
__global__ void __launch_bounds__(kThreads) groups_kernel(Args args) {
  const ScreenedSelectParams& p = args.p;
  const int width = 4 << args.plan.log, lane = threadIdx.x % 32;
  const int64_t g = int64_t(blockIdx.x) * kScreenWarps + threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.listed = 0;  // for the selections that follow
  if (g >= args.plan.groups) return;
  float lost = 0, rounded = 0, size = 0;
  for (int64_t i = g * width + lane; i < (g + 1) * width && i < p.F; i += 32) {
    const float b = fabsf(p.b_enc[i]);
    lost = fmaxf(lost, p.w_norms[p.F + i]);
    rounded = fmaxf(rounded, p.w_norms[2 * p.F + i]);
    size = fmaxf(size, b < 1e37f ? b : INFINITY);  // a NaN as well
  }
  for (int o = 16; o > 0; o >>= 1) {
    lost = fmaxf(lost, __shfl_xor_sync(0xffffffffu, lost, o));
    rounded = fmaxf(rounded, __shfl_xor_sync(0xffffffffu, rounded, o));
    size = fmaxf(size, __shfl_xor_sync(0xffffffffu, size, o));
  }
  if (lane == 0) {
    p.group_norms[g] = lost;
    p.group_norms[args.plan.groups + g] = rounded;
    p.group_norms[2 * args.plan.groups + g] = size;
  }
}

// maxima[g] = the largest ordered score of group g; maxima: zeros.
template <bool kAligned>
__device__ __forceinline__ void group_maxima(const Args& args, const float* row, uint32_t* maxima) {
  const ScreenedSelectParams& p = args.p;
  const int log = args.plan.log, lanes = log < 5 ? 1 << log : 32;
  for (int64_t c0 = 0; c0 < p.F; c0 += 4 * kBatch * kThreads) {
    Four z[kBatch], b[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t c = c0 + 4 * (u * kThreads + threadIdx.x);
      z[u] = load4(row + c, p.F - c, kAligned);
      b[u] = load4(p.b_enc + c, p.F - c, kAligned);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t c = c0 + 4 * (u * kThreads + threadIdx.x);
      float most = -INFINITY;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < p.F && (!p.mask || p.mask[c + e])) most = max_nan(most, z[u].x[e] + b[u].x[e]);
      for (int o = 1; o < lanes; o <<= 1)
        most = max_nan(most, __shfl_xor_sync(0xffffffffu, most, o));
      if ((threadIdx.x & (lanes - 1)) == 0 && c < p.F)
        atomicMax(&maxima[c >> (log + 2)], ordered(most));
    }
  }
}

__device__ __forceinline__ uint32_t lower_end(float s, float m) {
  const float low = s - m;
  return low == low ? ordered(low) : kOrderedMinusInfinity;  // nothing is certain
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) screen_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  const ScreenedSelectParams& p = args.p;
  const Plan& plan = args.plan;
  const int64_t n = p.first + blockIdx.x;
  auto* keys = reinterpret_cast<uint64_t*>(shared);
  auto* lows = reinterpret_cast<uint32_t*>(keys + plan.capacity);
  uint32_t* histograms = lows + plan.capacity;
  uint32_t* state = histograms + kHistograms;  // listed groups, appended latents
  uint32_t* maxima = state + 8;                // then the lower ends of groups, then bits of k
  uint32_t* list = maxima + plan.groups;
  const float* row = p.scores + blockIdx.x * p.F;
  const RowMargin margin(p.x_norms, p.N, n, p.d);

  for (int i = threadIdx.x; i < kHistograms; i += kThreads) histograms[i] = 0;
  for (int g = threadIdx.x; g < plan.groups; g += kThreads) maxima[g] = 0;
  if (threadIdx.x < 2) state[threadIdx.x] = 0;
  __syncthreads();
  group_maxima<kAligned>(args, row, maxima);
  __syncthreads();
  for (int g = threadIdx.x; g < plan.groups; g += kThreads) {  // list holds upper ends for now
    const float s = unordered(maxima[g]);
    const float m = margin.with(p.group_norms[g], p.group_norms[plan.groups + g],
                                p.group_norms[2 * plan.groups + g]);
    list[g] = ordered(s + m);
    maxima[g] = lower_end(s, m);
  }
  __syncthreads();
  const uint32_t bound = bound_of(maxima, plan.groups, p.k, histograms);
  __syncthreads();
  uint32_t* chosen = maxima;  // their numbers take the place of the lower ends
  for (int g = threadIdx.x; g < plan.groups; g += kThreads)
    if (list[g] >= bound && list[g] != kOrderedMinusInfinity)
      chosen[atomicAdd(&state[0], 1u)] = g;  // any order gives the same keys
  for (int i = threadIdx.x; i < kHistograms; i += kThreads) histograms[i] = 0;
  __syncthreads();

  const int64_t quads = int64_t(state[0]) << plan.log;
  for (int64_t q = threadIdx.x; q < quads; q += kThreads) {
    const int64_t in_group = q & ((int64_t(1) << plan.log) - 1);
    const int64_t i = ((int64_t(chosen[q >> plan.log]) << plan.log) + in_group) * 4;
    const Four z = load4(row + i, p.F - i, kAligned), b = load4(p.b_enc + i, p.F - i, kAligned);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e >= p.F || (p.mask && !p.mask[i + e])) continue;
      const float s = z.x[e] + b.x[e];
      const float m = margin.with(p.w_norms[p.F + i + e], p.w_norms[2 * p.F + i + e], b.x[e]);
      const uint32_t u = ordered(s + m);
      if (u < bound || u == kOrderedMinusInfinity) continue;
      const auto at = static_cast<int>(atomicAdd(&state[1], 1u));
      if (at >= plan.capacity) continue;
      keys[at] = key_of(u, i + e);
      lows[at] = lower_end(s, m);
    }
  }
  __syncthreads();
  const auto count = static_cast<int>(state[1]);
  if (count > plan.capacity) {
    if (threadIdx.x == 0) {
      p.bounds[n] = bound;
      p.list[atomicAdd(p.listed, 1)] = static_cast<int32_t>(n);  // any order: rows are apart
    }
    return;
  }
  const uint32_t closer = bound_of(lows, count, p.k, histograms);
  const float* x = p.x + n * p.d;
  for (int j = threadIdx.x / 32; j < count; j += kScreenWarps) {
    const uint64_t key = keys[j];
    uint64_t scored = 0;
    if (key >> 32 >= closer) scored = scored_key<kAligned>(p, x, static_cast<uint32_t>(~key));
    if (threadIdx.x % 32 == 0) keys[j] = scored;
    __syncwarp();
  }
  write_first(p, n, keys, count, maxima);  // a barrier comes first
}

cudaError_t checked(const ScreenedSelectParams& p, const Plan& plan) {
  const bool fits = p.k <= kMostScreened && p.F < (int64_t(1) << 31) && p.N < (int64_t(1) << 31) &&
                    (p.k + 31) / 32 <= 2 * int64_t(plan.groups);
  return fits && grid_fits(p.rows) ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

int64_t screened_groups(const ScreenedSelectParams& p) { return plan_of(p).groups; }

cudaError_t screened_begin(const ScreenedSelectParams& p, cudaStream_t stream) {
  const Args args{p, plan_of(p)};
  const unsigned blocks = (args.plan.groups + kScreenWarps - 1) / kScreenWarps;
  KSAE_LAUNCH(groups_kernel, blocks, kThreads, 0, stream, args);
  return cudaGetLastError();
}

cudaError_t screened_select(const ScreenedSelectParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const Args args{p, plan_of(p)};
  cudaError_t error = checked(p, args.plan);
  if (error != cudaSuccess) return error;
  const bool aligned = rows_aligned(p) && aligned4(p.scores, p.F) && aligned4(p.b_enc, p.F);
  return with_alignment(aligned, [&](auto is) {
    if (args.plan.bytes > 48 * 1024) {
      error =
          cudaFuncSetAttribute(screen_kernel<is.value>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(args.plan.bytes));
      if (error != cudaSuccess) return forgotten(error);
    }
    KSAE_LAUNCH((screen_kernel<is.value>), static_cast<unsigned>(p.rows), kThreads, args.plan.bytes,
                stream, args);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
