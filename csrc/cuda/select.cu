// SPDX-License-Identifier: Apache-2.0
// Exact TopK of rows of scores, one block a row.
//
// 1. One read of the row gives the maximum of each group of 4 * lanes consecutive columns. The k-th
//    largest of these maxima bounds the k-th largest score from below.
// 2. Groups whose maximum reaches the bound are read again, in rounds. Keys that pass are appended
//    to a buffer with room for k keys and one whole round; where the next round might not fit, the
//    buffer is sorted, its first k stay, and the last of them is the new bound. So the result is
//    exact for any data, and rows of equal scores append nothing after the first k.
// 3. The buffer is sorted by a 64-bit key (ordered score, ~index): order of appending is forgotten.
//
// With a list of columns, positions of the list stand for columns: what is not listed costs
// nothing, and the length of the list is read on the device, so nobody waits for it. Scores of -inf
// and columns that are not listed are equal: where the listed ones do not fill k slots, the
// smallest columns that were not chosen do.
//
// Bytes a row: F * sizeof(score) once, about k groups again, k * (8 + sizeof(value)) written.
// Limits: none on k <= F < 2^32 (2^31 with a list). Where the buffer exceeds kSharedKeys it lies in
// the workspace. With fewer groups than k the bound is empty and every column is sorted: right, but
// slow.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRound = 4 * kThreads;  // columns that one round of the second reading covers
constexpr int kSharedKeys = 8192;
constexpr int kMaxGroups = 4096;

constexpr int kListThreads = 1024;
constexpr uint32_t kOrderedMinusInfinity = 0x007fffff;

// Threads a group, a power of two up to 32.
__host__ __device__ __forceinline__ int lanes_of(int64_t width, int64_t k) {
  int lanes = 32;
  while (lanes > 1 && width / (4 * lanes) < 4 * k && width / (2 * lanes) <= kMaxGroups) lanes /= 2;
  return lanes;
}

__host__ __device__ __forceinline__ int groups_of(int64_t width, int lanes) {
  return static_cast<int>((width + 4 * lanes - 1) / (4 * lanes));
}

struct Plan {
  int groups;    // room for so many groups a row, and for k bits
  int capacity;  // keys, a power of two
  bool shared;   // keys in shared memory
  size_t bytes;  // of shared memory
};

Plan plan_of(const SelectParams& s) {
  Plan p{};
  p.groups = groups_of(s.F, lanes_of(s.F, s.k));
  if (s.columns) {  // of the numbers of columns up to F, one with fewer lanes may have most groups
    const int64_t fewer_lanes = 8 * s.k < kMaxGroups + 1 ? 8 * s.k : kMaxGroups + 1;
    const int64_t bits = (s.k + 63) / 64;  // a group's room is 64 bits
    for (const int64_t least : {fewer_lanes, bits})
      if (p.groups < least) p.groups = static_cast<int>(least);
  }
  int64_t capacity = 1;
  while (capacity < s.k + kRound) capacity *= 2;
  p.capacity = static_cast<int>(capacity);
  p.shared = capacity <= kSharedKeys;
  p.bytes = (p.shared ? capacity * sizeof(uint64_t) : 0) + 8 * size_t(p.groups) + 4 * (256 + 8);
  return p;
}

struct Args {
  SelectParams p;
  Plan plan;
  uint64_t* keys;  // [rows, capacity] where not in shared memory
  bool aligned;
};

// Larger means earlier; every NaN is one number, -0 is +0.
__device__ __forceinline__ uint32_t ordered(float s) {
  if (s != s) return 0xffffffffu;
  const uint32_t b = __float_as_uint(s + 0.0f);
  return (b >> 31) ? ~b : b | 0x80000000u;
}

template <class B>
__device__ __forceinline__ float preactivation(const SelectParams& p, float score, int64_t i) {
  return p.bias ? score + load(static_cast<const B*>(p.bias) + i) : score;
}

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
  const int64_t valid = width - i;
  Four z{}, a{};
  if (kListed) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < valid) {
        const int64_t c = args.p.columns[i + e];
        z.x[e] = load(row + c);
        if (second) a.x[e] = load(second + c);
      }
  } else {
    z = load4(row + i, valid, args.aligned);
    if (second) a = load4(second + i, valid, args.aligned);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    u[e] = 0;
    if (e >= valid) continue;
    const int64_t c = column_of<kListed>(args.p, i + e);
    u[e] = ordered(score_of(args.p, second, preactivation<B>(args.p, z.x[e], c), a.x[e], c));
    if (kListed && u[e] == kOrderedMinusInfinity) u[e] = 0;
  }
}

// The k-th largest of n numbers, one byte a round; 0 if there are fewer.
__device__ __forceinline__ uint32_t kth_largest(const uint32_t* x, int n, int64_t k,
                                                uint32_t* histogram, uint32_t* found) {
  if (n < k) return 0;
  uint32_t prefix = 0, rest = static_cast<uint32_t>(k);
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int g = threadIdx.x; g < n; g += kThreads)
      if (shift == 24 || x[g] >> (shift + 8) == prefix >> (shift + 8))
        atomicAdd(&histogram[(x[g] >> shift) & 255], 1u);
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane owns 8 digits, lane 0 the largest
      const int top = 255 - 8 * threadIdx.x;
      uint32_t own = 0;
      for (int b = 0; b < 8; ++b) own += histogram[top - b];
      uint32_t before = own;
      for (int o = 1; o < 32; o <<= 1) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, before, o);
        if (static_cast<int>(threadIdx.x) >= o) before += other;
      }
      before -= own;
      if (before < rest && rest <= before + own) {
        int b = 0;
        while (before + histogram[top - b] < rest) before += histogram[top - b++];
        found[0] = static_cast<uint32_t>(top - b);
        found[1] = rest - before;
      }
    }
    __syncthreads();
    prefix |= found[0] << shift;
    rest = found[1];
    __syncthreads();
  }
  return prefix;
}

// Bitonic sort of keys[0, count), largest first; the buffer is filled with 0 up to a power of two.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  int n = 1;
  while (n < count) n *= 2;
  for (int i = count + threadIdx.x; i < n; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int width = 2; width <= n; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      for (int t = threadIdx.x; t < n / 2; t += kThreads) {
        const int i = 2 * t - (t & (step - 1)), j = i + step;
        const uint64_t a = keys[i], b = keys[j];
        if ((a < b) == ((i & width) == 0)) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      __syncthreads();
    }
}

// Slots [count, k) of row n: the smallest columns that are not among the `count` keys. They all lie
// below k. chosen: a bit for each of these.
template <class B>
__device__ __forceinline__ void fill_rest(const SelectParams& p, int64_t n, const uint64_t* keys,
                                          int count, uint32_t* chosen) {
  const auto words = static_cast<int>((p.k + 31) / 32);
  for (int w = threadIdx.x; w < words; w += kThreads) chosen[w] = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < count; j += kThreads) {
    const auto i = static_cast<uint32_t>(~keys[j]);
    if (i < p.k) atomicOr(&chosen[i / 32], 1u << i % 32);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int run = (words + 31) / 32, first = threadIdx.x * run;
  const int last = first + run < words ? first + run : words;
  int own = 0;
  for (int w = first; w < last; ++w) own += 32 - __popc(chosen[w]);
  int slot = own;
  for (int o = 1; o < 32; o <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, slot, o);
    if (static_cast<int>(threadIdx.x) >= o) slot += other;
  }
  slot += count - own;
  for (int w = first; w < last; ++w)
    for (uint32_t rest = ~chosen[w]; rest && slot < p.k; rest &= rest - 1, ++slot) {
      store(static_cast<B*>(p.values) + n * p.k + slot, p.relu ? 0.0f : -INFINITY);
      p.indices[n * p.k + slot] = 32 * w + __ffs(static_cast<int>(rest)) - 1;
    }
}

template <class S, class B, bool kListed>
__global__ void __launch_bounds__(kThreads, 4) select_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  const SelectParams& p = args.p;
  const Plan& plan = args.plan;
  const int64_t n = blockIdx.x;
  auto* own = reinterpret_cast<uint64_t*>(shared);
  uint64_t* keys = plan.shared ? own : args.keys + n * plan.capacity;
  auto* maxima = reinterpret_cast<uint32_t*>(own + (plan.shared ? plan.capacity : 0));
  uint32_t* list = maxima + plan.groups;
  uint32_t* histogram = list + plan.groups;
  uint32_t* state = histogram + 256;  // two of kth_largest, listed groups, keys
  const S* row = static_cast<const S*>(p.scores) + n * p.F;
  const bool informed = p.mode != Mode::kPlain && (!p.informed || p.informed[n]);
  const S* second = informed ? static_cast<const S*>(p.second) + n * p.F : nullptr;
  const int64_t width = kListed ? p.columns[p.F] : p.F;
  const int lanes = lanes_of(width, p.k), groups = groups_of(width, lanes);
  const int lane = threadIdx.x & (lanes - 1);
  const int first = threadIdx.x / lanes, stride = kThreads / lanes;

#pragma unroll 4
  for (int g0 = 0; g0 < groups; g0 += stride) {
    const int g = g0 + first;
    uint32_t u[4];
    ordered4<kListed, S, B>(args, row, second, width, (int64_t(g) * lanes + lane) * 4, u);
    uint32_t m = max(max(u[0], u[1]), max(u[2], u[3]));
    for (int o = 1; o < lanes; o <<= 1) m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
    if (lane == 0 && g < groups) maxima[g] = m;
  }
  if (threadIdx.x == 0) state[2] = state[3] = 0;
  __syncthreads();
  const uint32_t bound = kth_largest(maxima, groups, p.k, histogram, state);
  for (int g = threadIdx.x; g < groups; g += kThreads)
    if (maxima[g] >= bound) list[atomicAdd(&state[2], 1u)] = g;  // any order gives the same keys
  __syncthreads();

  const int listed = static_cast<int>(state[2]);
  uint64_t least = uint64_t(bound) << 32;  // keys from here on are appended
  for (int l0 = 0; l0 < listed; l0 += stride) {
    if (l0 + first < listed) {
      const int64_t i = (int64_t(list[l0 + first]) * lanes + lane) * 4;
      uint32_t u[4];
      ordered4<kListed, S, B>(args, row, second, width, i, u);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!u[e]) continue;
        const auto low = static_cast<uint32_t>(~column_of<kListed>(p, i + e));
        const uint64_t key = uint64_t(u[e]) << 32 | low;
        if (key >= least) keys[atomicAdd(&state[3], 1u)] = key;
      }
    }
    __syncthreads();
    const int count = static_cast<int>(state[3]);
    __syncthreads();
    if (count + kRound > plan.capacity && l0 + stride < listed) {
      sort_keys(keys, count);
      least = keys[p.k - 1] + 1;  // capacity is at least k + kRound, so count > k
      if (threadIdx.x == 0) state[3] = static_cast<uint32_t>(p.k);
      __syncthreads();
    }
  }
  const int count = static_cast<int>(state[3]);
  sort_keys(keys, count);
  for (int64_t j = threadIdx.x; j < p.k && (!kListed || j < count); j += kThreads) {
    const int64_t i = static_cast<uint32_t>(~keys[j]);
    float z = preactivation<B>(p, load(row + i), i);
    if (p.relu && z <= 0) z = 0;
    store(static_cast<B*>(p.values) + n * p.k + j, z);
    p.indices[n * p.k + j] = i;
  }
  if (kListed && count < p.k) fill_rest<B>(p, n, keys, count, maxima);
}

// The columns of a mask in ascending order, and how many. One block; a thread owns a run.
__global__ void __launch_bounds__(kListThreads)
    list_kernel(int64_t F, const uint8_t* mask, int32_t* columns) {
  KSAE_SHARED_BYTES(shared);
  auto* warps = reinterpret_cast<int32_t*>(shared);
  const int64_t run = (F + kListThreads - 1) / kListThreads, first = threadIdx.x * run;
  const int64_t last = first + run < F ? first + run : F;
  int32_t own = 0;
  for (int64_t i = first; i < last; ++i) own += mask[i] != 0;
  int32_t at = own;
  for (int o = 1; o < 32; o <<= 1) {
    const int32_t other = __shfl_up_sync(0xffffffffu, at, o);
    if (static_cast<int>(threadIdx.x % 32) >= o) at += other;
  }
  if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = at;
  __syncthreads();
  for (unsigned w = 0; w < threadIdx.x / 32; ++w) at += warps[w];
  if (threadIdx.x == kListThreads - 1) columns[F] = at;
  at -= own;
  for (int64_t i = first; i < last; ++i)
    if (mask[i]) columns[at++] = static_cast<int32_t>(i);
}

template <class S, class B, bool kListed>
cudaError_t launch(const SelectParams& p, void* workspace, cudaStream_t stream) {
  Args args{p, plan_of(p), static_cast<uint64_t*>(workspace), false};
  args.aligned = aligned4(static_cast<const S*>(p.scores), p.F) &&
                 (!p.second || aligned4(static_cast<const S*>(p.second), p.F));
  if (!grid_fits(p.rows)) return cudaErrorInvalidConfiguration;
  if (args.plan.bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(select_kernel<S, B, kListed>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(args.plan.bytes));
    if (error != cudaSuccess) return error;
  }
  KSAE_LAUNCH((select_kernel<S, B, kListed>), static_cast<unsigned>(p.rows), kThreads,
              args.plan.bytes, stream, args);
  return cudaGetLastError();
}

}  // namespace

size_t select_workspace(const SelectParams& p) {
  const Plan plan = plan_of(p);
  return plan.shared ? 0 : size_t(p.rows) * plan.capacity * sizeof(uint64_t);
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

cudaError_t list_columns(int64_t F, const uint8_t* mask, int32_t* columns, cudaStream_t stream) {
  if (F > 0x7fffffff) return cudaErrorInvalidValue;
  KSAE_LAUNCH(list_kernel, 1, kListThreads, kListThreads / 32 * sizeof(int32_t), stream, F, mask,
              columns);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
