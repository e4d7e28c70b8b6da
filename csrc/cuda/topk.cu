// SPDX-License-Identifier: Apache-2.0
// Exact TopK of rows of scores, one block a row.
//
// 1. One read of the row gives the maximum of each group of 4 * lanes consecutive columns. A number
//    that at least k of these maxima reach, and few more than k, bounds the k-th largest score from
//    below.
// 2. Groups whose maximum reaches the bound are read again. Keys that pass are appended to a buffer
//    with room for k keys and one whole round. Where they do not fit, the groups are read in
//    rounds: where the next round might not fit, the buffer is sorted, its first k stay, and the
//    last of them is the new bound. So the result is exact for any data, and rows of equal scores
//    append nothing after the first k.
// 3. The buffer is ordered by a 64-bit key (ordered score, ~index): order of appending is
// forgotten.
//
// With a list of columns, positions of the list stand for columns: what is not listed costs
// nothing, and the length of the list is read on the device, so nobody waits for it. Scores of -inf
// and columns that are not listed are equal: where the listed ones do not fill k slots, the
// smallest columns that were not chosen do.
//
// Bytes a row: F * sizeof(score) once, about k groups again, k * (8 + sizeof(value)) written.
// Limits: none on k <= F < 2^32 (2^31 with a list). Where the buffer exceeds kSharedKeys it lies in
// the workspace, and so do the groups of some millions of columns. With fewer groups than k the
// bound is empty and every column is sorted: right, but slow.
#include "keys.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kRound = 4 * kThreads;  // columns that one round of the second reading covers
constexpr int kSharedKeys = 8192;
constexpr size_t kMostShared = 96 * 1024;  // what every device has for a block

struct Plan {
  int groups;    // room for so many groups a row, and for k bits
  int capacity;  // keys, a power of two
  bool shared;   // keys in shared memory
  bool inside;   // groups in shared memory
  size_t bytes;  // of shared memory

  __host__ __device__ size_t outside_keys() const {
    return shared ? 0 : capacity * sizeof(uint64_t);
  }  // a row
  __host__ __device__ size_t outside() const {
    return outside_keys() + (inside ? 0 : 8 * size_t(groups));
  }
};

Plan plan_of(const SelectParams& s) {
  Plan p{};
  p.groups = groups_of(s.F, log_lanes_of(s.F, s.k));
  if (s.columns) {  // of the numbers of columns up to F, one with fewer lanes may have most groups
    const int64_t fewer_lanes = 8 * s.k < kMostGroups + 1 ? 8 * s.k : kMostGroups + 1;
    const int64_t bits = (s.k + 63) / 64;  // a group's room is 64 bits
    for (const int64_t least : {fewer_lanes, bits})
      if (p.groups < least) p.groups = static_cast<int>(least);
  }
  int64_t capacity = 1;
  while (capacity < s.k + kRound) capacity *= 2;
  p.capacity = static_cast<int>(capacity);
  p.shared = capacity <= kSharedKeys;
  p.bytes = (p.shared ? capacity * sizeof(uint64_t) : 0) + 4 * (kHistograms + 8);
  p.inside = p.bytes + 8 * size_t(p.groups) <= kMostShared;
  if (p.inside) p.bytes += 8 * size_t(p.groups);
  return p;
}

struct Args {
  SelectParams p;
  Plan plan;
  char* workspace;  // [rows] of the keys and groups that are not in shared memory
  int chunk;        // columns that a thread may read at once: 8 (of 16 bits), 4 or 1
};

__device__ __forceinline__ float score_of(const SelectParams& p, bool informed, float z, float a,
                                          int64_t i) {
  if (informed && z > 0) {
    const float gain = p.mode == Mode::kSigned ? (a >= 0 ? 0.0f : -a) : fabsf(a);  // NaN stays
    z = p.mode == Mode::kMultiplicative ? z * gain : z * fmaf(p.beta, gain, 1.0f);
  }
  return p.scale ? z * p.scale[i] : z;
}

template <bool kListed>
__device__ __forceinline__ int64_t column_of(const SelectParams& p, int64_t i) {
  return kListed ? p.columns[i] : i;
}

// Ordered scores at positions [i, i + 4) of `width`; 0, which no score has, past the end and, with
// a list, for -inf.
template <bool kListed, class S, class B>
__device__ __forceinline__ void ordered4(const Args& args, const S* row, const S* second,
                                         int64_t width, int64_t i, uint32_t (&u)[4]) {
  const SelectParams& p = args.p;
  const B* biases = static_cast<const B*>(p.bias);
  const int64_t valid = width - i;
  Four z{}, a{}, bias{};
  int64_t c[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] = kListed ? p.columns[e < valid ? i + e : width - 1] : i + e;
  if (kListed) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      z.x[e] = load(row + c[e]);
      if (second) a.x[e] = load(second + c[e]);
      if (biases) bias.x[e] = load(biases + c[e]);
    }
  } else {
    z = load4(row + i, valid, args.chunk > 1);
    if (second) a = load4(second + i, valid, args.chunk > 1);
    if (biases) bias = load4(biases + i, valid, args.chunk > 1);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    u[e] = 0;
    if (e >= valid) continue;
    const float score = biases ? z.x[e] + bias.x[e] : z.x[e];
    u[e] = ordered(score_of(p, second, score, a.x[e], c[e]));
    if (kListed && u[e] == kOrderedMinusInfinity) u[e] = 0;
  }
}

// use(u, c, score) for the kChunk scores from each column at[u] on, or from the row's last chunk if
// at[u] is past the end. All loads are on their way before the first number is used: a row comes at
// the rate of the memory, not at its latency.
template <int kChunk, int kBatch, bool kScored, class S, class B, class Use>
__device__ __forceinline__ void for_scores(const SelectParams& p, const S* row, const S* second,
                                           const int64_t (&at)[kBatch], Use use) {
  const bool biased = p.bias && (kScored || sizeof(S) == sizeof(float));
  Packed<S, kChunk> z[kBatch], a[kBatch];
  Packed<B, kChunk> bias[kBatch];
  uint32_t from[kBatch];
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
    from[u] = static_cast<uint32_t>(at[u] < p.F ? at[u] : p.F - kChunk);
    z[u] = *reinterpret_cast<const Packed<S, kChunk>*>(row + from[u]);
  }
  if (kScored && second) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      a[u] = *reinterpret_cast<const Packed<S, kChunk>*>(second + from[u]);
  }
  if (biased) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      bias[u] =
          *reinterpret_cast<const Packed<B, kChunk>*>(static_cast<const B*>(p.bias) + from[u]);
  }
#pragma unroll
  for (int u = 0; u < kBatch; ++u)
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      float s = number(z[u], e);
      if (biased) s += number(bias[u], e);
      if (kScored) s = score_of(p, second, s, second ? number(a[u], e) : 0.0f, from[u] + e);
      use(u, from[u] + e, s);
    }
}

// maxima[g] = the largest ordered score of group g of a row that may be read in chunks.
template <int kChunk, int kBatch, bool kScored, class S, class B>
__device__ __forceinline__ void group_maxima(const SelectParams& p, const S* row, const S* second,
                                             int log_lanes, uint32_t* maxima) {
  const int lanes = (4 << log_lanes) / kChunk;
  for (int64_t c0 = 0; c0 < p.F; c0 += kBatch * kThreads * kChunk) {
    int64_t at[kBatch];
    float m[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      at[u] = c0 + (u * kThreads + threadIdx.x) * kChunk;
      m[u] = -INFINITY;
    }
    // a group that the row's end cuts holds the row's last chunk: no column counts in vain
    for_scores<kChunk, kBatch, kScored, S, B>(
        p, row, second, at, [&](int u, uint32_t, float s) { m[u] = max_nan(m[u], s); });
    for (int o = 1; o < lanes; o <<= 1) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) m[u] = max_nan(m[u], __shfl_xor_sync(0xffffffffu, m[u], o));
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if ((threadIdx.x & (lanes - 1)) == 0 && at[u] < p.F)
        maxima[at[u] >> (log_lanes + 2)] = ordered(m[u]);
  }
}

__device__ __forceinline__ void append(const Args& args, uint32_t u, int64_t c, uint64_t least,
                                       uint64_t* keys, uint32_t* count) {
  const uint64_t key = uint64_t(u) << 32 | static_cast<uint32_t>(~c);
  if (key < least) return;
  const uint32_t at = atomicAdd(count, 1u);
  if (at < static_cast<uint32_t>(args.plan.capacity)) keys[at] = key;
}

// Appends the keys from `least` on at positions [i, i + 4), while there is room; counts them all.
template <bool kListed, class S, class B>
__device__ __forceinline__ void append4(const Args& args, const S* row, const S* second,
                                        int64_t width, int64_t i, uint64_t least, uint64_t* keys,
                                        uint32_t* count) {
  uint32_t u[4];
  ordered4<kListed, S, B>(args, row, second, width, i, u);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (u[e]) append(args, u[e], column_of<kListed>(args.p, i + e), least, keys, count);
}

template <class B>
__device__ __forceinline__ void write(const SelectParams& p, int64_t n, int64_t slot, float score,
                                      int64_t i) {
  float z = p.bias ? score + load(static_cast<const B*>(p.bias) + i) : score;
  if (p.relu && z <= 0) z = 0;
  store(static_cast<B*>(p.values) + n * p.k + slot, z);
  p.indices[n * p.k + slot] = i;
}

template <class S, class B, bool kListed>
__global__ void __launch_bounds__(kThreads, 4) select_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  const SelectParams& p = args.p;
  const Plan& plan = args.plan;
  const int64_t n = blockIdx.x;
  auto* own = reinterpret_cast<uint64_t*>(shared);
  char* outside = args.workspace + n * plan.outside();
  uint64_t* keys = plan.shared ? own : reinterpret_cast<uint64_t*>(outside);
  auto* histograms = reinterpret_cast<uint32_t*>(own + (plan.shared ? plan.capacity : 0));
  uint32_t* state = histograms + kHistograms;  // listed groups, keys
  uint32_t* maxima =
      plan.inside ? state + 8 : reinterpret_cast<uint32_t*>(outside + plan.outside_keys());
  uint32_t* list = maxima + plan.groups;
  const S* row = static_cast<const S*>(p.scores) + n * p.F;
  const bool informed = p.mode != Mode::kPlain && (!p.informed || p.informed[n]);
  const S* second = informed ? static_cast<const S*>(p.second) + n * p.F : nullptr;
  const int64_t width = kListed ? p.columns[p.F] : p.F;
  const int log = log_lanes_of(width, p.k), lanes = 1 << log, groups = groups_of(width, log);
  const int lane = threadIdx.x & (lanes - 1);
  const int first = threadIdx.x >> log, stride = kThreads >> log;
  // 16-bit scores are selected as they are, but for callers who give more; products are float32
  const bool scored = second || p.scale || (sizeof(S) == 2 && p.bias);

  for (int i = threadIdx.x; i < kHistograms; i += kThreads) histograms[i] = 0;
  if (threadIdx.x < 2) state[threadIdx.x] = 0;
  if (kListed || args.chunk == 1) {
    for (int g0 = 0; g0 < groups; g0 += stride) {
      const int g = g0 + first;
      uint32_t u[4];
      ordered4<kListed, S, B>(args, row, second, width, (int64_t(g) * lanes + lane) * 4, u);
      uint32_t m = max(max(u[0], u[1]), max(u[2], u[3]));
      for (int o = 1; o < lanes; o <<= 1) m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
      if (lane == 0 && g < groups) maxima[g] = m;
    }
  } else if (scored) {
    group_maxima<4, 2, true, S, B>(p, row, second, log, maxima);
  } else if (sizeof(S) == 2 && args.chunk == 8 && log > 0) {
    group_maxima<16 / sizeof(S), 4, false, S, B>(p, row, second, log, maxima);
  } else {
    group_maxima<4, 4, false, S, B>(p, row, second, log, maxima);
  }
  __syncthreads();
  const uint32_t bound = bound_of(maxima, groups, p.k, histograms);
  for (int g = threadIdx.x; g < groups; g += kThreads)
    if (maxima[g] >= bound) list[atomicAdd(&state[0], 1u)] = g;  // any order gives the same keys
  __syncthreads();

  const int listed = static_cast<int>(state[0]);
  uint64_t least = uint64_t(bound) << 32;  // keys from here on are appended
  if (kListed || args.chunk == 1 || scored) {
    for (int l = first; l < listed; l += stride) {
      const int64_t i = (int64_t(list[l]) * lanes + lane) * 4;
      append4<kListed, S, B>(args, row, second, width, i, least, keys, &state[1]);
    }
  } else {
    constexpr int kBatch = 4;
    for (int l0 = first; l0 < listed; l0 += kBatch * stride) {
      int64_t at[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int l = l0 + u * stride;
        at[u] = l < listed ? (int64_t(list[l]) * lanes + lane) * 4 : p.F;
      }
      for_scores<4, kBatch, false, S, B>(p, row, second, at, [&](int u, uint32_t c, float s) {
        if (at[u] < p.F) append(args, ordered(s), c, least, keys, &state[1]);
      });
    }
  }
  __syncthreads();
  if (state[1] > static_cast<uint32_t>(plan.capacity)) {  // they did not fit: in rounds
    __syncthreads();
    if (threadIdx.x == 0) state[1] = 0;
    __syncthreads();
    for (int l0 = 0; l0 < listed; l0 += stride) {
      if (l0 + first < listed) {
        const int64_t i = (int64_t(list[l0 + first]) * lanes + lane) * 4;
        append4<kListed, S, B>(args, row, second, width, i, least, keys, &state[1]);
      }
      __syncthreads();
      const int count = static_cast<int>(state[1]);
      __syncthreads();
      if (count + kRound > plan.capacity && l0 + stride < listed) {
        sort_keys(keys, count);
        least = keys[p.k - 1] + 1;  // capacity is at least k + kRound, so count > k
        if (threadIdx.x == 0) state[1] = static_cast<uint32_t>(p.k);
        __syncthreads();
      }
    }
  }
  const int count = static_cast<int>(state[1]);
  if (count <= kThreads) {  // a key's slot is the number of larger keys
    if (static_cast<int>(threadIdx.x) < count) {
      const uint64_t key = keys[threadIdx.x];
      int slot = 0;
#pragma unroll 8
      for (int j = 0; j < count; ++j) slot += keys[j] > key;
      const int64_t i = static_cast<uint32_t>(~key);
      if (slot < p.k) write<B>(p, n, slot, load(row + i), i);
    }
  } else {
    sort_keys(keys, count);
    for (int64_t j = threadIdx.x; j < p.k && (!kListed || j < count); j += kThreads) {
      const int64_t i = static_cast<uint32_t>(~keys[j]);
      write<B>(p, n, j, load(row + i), i);
    }
  }
  if (kListed && count < p.k)
    fill_rest(p.k, keys, count, maxima, [&](int64_t slot, int64_t i) {
      store(static_cast<B*>(p.values) + n * p.k + slot, p.relu ? 0.0f : -INFINITY);
      p.indices[n * p.k + slot] = i;
    });
}

template <class S, class B, bool kListed>
cudaError_t launch(const SelectParams& p, void* workspace, cudaStream_t stream) {
  Args args{p, plan_of(p), static_cast<char*>(workspace), 1};
  const auto* scores = static_cast<const S*>(p.scores);
  const auto* second = static_cast<const S*>(p.second);
  const auto* bias = static_cast<const B*>(p.bias);
  if (packed<4>(scores, p.F) && packed<4>(second, p.F) && packed<4>(bias, p.F)) {
    const bool wide = sizeof(S) == 2 && packed<8>(scores, p.F) && packed<8>(bias, p.F);
    args.chunk = wide ? 8 : 4;
  }
  if (!grid_fits(p.rows)) return cudaErrorInvalidConfiguration;
  if (args.plan.bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(select_kernel<S, B, kListed>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(args.plan.bytes));
    if (error != cudaSuccess) return forgotten(error);
  }
  KSAE_LAUNCH((select_kernel<S, B, kListed>), static_cast<unsigned>(p.rows), kThreads,
              args.plan.bytes, stream, args);
  return cudaGetLastError();
}

}  // namespace

size_t select_workspace(const SelectParams& p) {
  const Plan plan = plan_of(p);
  return size_t(p.rows) * plan.outside();
}

cudaError_t select(const SelectParams& p, void* workspace, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return with_type(p.dtype, [&](auto* type) {
    using B = std::remove_pointer_t<decltype(type)>;
    if (p.score_dtype != p.dtype && p.score_dtype != Dtype::kFloat32) return cudaErrorInvalidValue;
    if (p.columns)  // only products are selected from lists
      return p.score_dtype == Dtype::kFloat32 ? launch<float, B, true>(p, workspace, stream)
                                              : cudaErrorInvalidValue;
    return p.score_dtype == Dtype::kFloat32 ? launch<float, B, false>(p, workspace, stream)
                                            : launch<B, B, false>(p, workspace, stream);
  });
}

}  // namespace ksae::cuda
