// SPDX-License-Identifier: Apache-2.0
// Tokens grouped by latent (CSC): a stable radix sort of the entries by latent.
//
// The key of an entry is its latent, or F where its value is 0, so that what is unused comes last.
// A pass sorts by one digit of the key: each block counts the digits of its tile, a warp a digit
// turns the counts of all tiles into their starts, and the blocks move their entries, ranked by
// their place in the tile. Offsets are then found by bisection. There is no atomic, no wait for the
// device and no step whose cost depends on the data: to sort, a latent that every token selects is
// one key among others. Few long segments cost what many short ones cost.
//
// Bytes for M = N k entries and p passes (2 where F < 2^18): two readings of the code, 16 M p of
// keys and positions, 12 * 2^9 * M / 2048 p of counts, F bisections of log2(M) steps. No flops.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRounds = 8;  // entries a thread
constexpr int kTile = kThreads * kRounds;
constexpr int kMostBits = 9;  // of a digit: the counters of 8 warps take 16 KB

struct Pass {
  const int32_t *keys, *positions;  // null in the first pass: from the code
  int32_t *keys_out, *positions_out;
  int32_t* counts;  // [bins, tiles], starts after the scan
  int32_t* totals;  // [bins]
  int64_t entries, tiles;
  int32_t unused;  // the key of entries that are left out: F
  int shift, bins;
  bool last;
};

// An entry as a pass finds it. T: of the values, in the first pass; void in later ones.
struct Entry {
  int32_t key, position;
};
template <class T>
__device__ __forceinline__ Entry entry_at(const GroupParams& p, const Pass& pass, int64_t at) {
  if constexpr (std::is_void_v<T>) {
    return {pass.keys[at], pass.positions[at]};
  } else {
    const bool used = !(load(static_cast<const T*>(p.values) + at) == 0);  // NaN counts
    const auto latent = static_cast<int32_t>(index_at(p.indices64, p.indices32, at));
    return {used ? latent : pass.unused, static_cast<int32_t>(at)};
  }
}

// Counts one digit a lane into the counters of the warp, and returns how many such digits it has
// counted before: in earlier rounds, and in earlier lanes of this one. digit = -1 is not counted.
__device__ __forceinline__ int32_t count_digit(int32_t* counters, int digit) {
  const unsigned peers = __match_any_sync(0xffffffffu, digit);
  const unsigned earlier = peers & ((1u << threadIdx.x % 32) - 1);
  const int32_t before = digit < 0 ? 0 : counters[digit];
  __syncwarp();  // all have read
  if (digit >= 0 && earlier == 0) counters[digit] = before + __popc(peers);
  __syncwarp();  // written, for the next round
  return before + __popc(earlier);
}

__device__ __forceinline__ void clear(int32_t* counters, int bins) {
  for (int i = threadIdx.x; i < kWarps * bins; i += kThreads) counters[i] = 0;
  __syncthreads();
}

// counts[digit, tile] = entries of the tile with that digit.
template <class T>
__global__ void __launch_bounds__(kThreads) count_kernel(GroupParams p, Pass pass) {
  KSAE_SHARED_BYTES(shared);
  auto* counters = reinterpret_cast<int32_t*>(shared);  // [warps, bins]
  clear(counters, pass.bins);
  const int warp = threadIdx.x / 32;
  const int64_t first = int64_t(blockIdx.x) * kTile + warp * (kTile / kWarps);
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t at = first + 32 * r;
    if (at >= pass.entries) break;  // for the whole warp
    const int64_t own = at + threadIdx.x % 32;
    int digit = -1;
    if (own < pass.entries) digit = entry_at<T>(p, pass, own).key >> pass.shift & (pass.bins - 1);
    count_digit(counters + warp * pass.bins, digit);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < pass.bins; digit += kThreads) {
    int32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += counters[w * pass.bins + digit];
    pass.counts[digit * pass.tiles + blockIdx.x] = sum;
  }
}

// The sum of x over the lanes up to this one.
__device__ __forceinline__ int32_t sum_to_here(int32_t x) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int32_t left = __shfl_up_sync(0xffffffffu, x, o);
    if (static_cast<int>(threadIdx.x % 32) >= o) x += left;
  }
  return x;
}

// Counts of a digit -> its entries in earlier tiles, and in all. One warp a digit.
__global__ void __launch_bounds__(kThreads) tiles_kernel(Pass pass) {
  const int digit = blockIdx.x * kWarps + threadIdx.x / 32;
  if (digit >= pass.bins) return;
  int32_t* counts = pass.counts + digit * pass.tiles;
  int64_t tile = threadIdx.x % 32;
  int32_t before = 0, next = tile < pass.tiles ? counts[tile] : 0;
  for (int64_t done = 0; done < pass.tiles; done += 32, tile += 32) {
    const int32_t count = next;
    next = tile + 32 < pass.tiles ? counts[tile + 32] : 0;  // on its way during the sum
    const int32_t sum = sum_to_here(count);
    if (tile < pass.tiles) counts[tile] = before + sum - count;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (threadIdx.x % 32 == 0) pass.totals[digit] = before;
}

// starts[digit] = entries with smaller digits. A thread owns a run of digits.
__device__ __forceinline__ void digit_starts(const Pass& pass, int32_t* starts, int32_t* sums) {
  const int run = (pass.bins + kThreads - 1) / kThreads, from = threadIdx.x * run;
  const int to = from + run < pass.bins ? from + run : pass.bins;
  int32_t own = 0;
  for (int digit = from; digit < to; ++digit) own += pass.totals[digit];
  const int32_t sum = sum_to_here(own);
  if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  int32_t before = sum - own;
  for (unsigned w = 0; w < threadIdx.x / 32; ++w) before += sums[w];
  for (int digit = from; digit < to; ++digit) {
    starts[digit] = before;
    before += pass.totals[digit];
  }
}

// Moves the entries of a tile to their places.
template <class T>
__global__ void __launch_bounds__(kThreads) move_kernel(GroupParams p, Pass pass) {
  KSAE_SHARED_BYTES(shared);
  auto* counters = reinterpret_cast<int32_t*>(shared);  // [warps, bins]
  int32_t* starts = counters + kWarps * pass.bins;      // [bins]
  clear(counters, pass.bins);
  digit_starts(pass, starts, starts + pass.bins);
  const int warp = threadIdx.x / 32;
  int32_t* mine = counters + warp * pass.bins;
  const int64_t first = int64_t(blockIdx.x) * kTile + warp * (kTile / kWarps);
  Entry entries[kRounds];
  int32_t ranks[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    entries[r] = {-1, -1};
    if (first + 32 * r >= pass.entries) continue;  // for the whole warp
    const int64_t own = first + 32 * r + threadIdx.x % 32;
    if (own < pass.entries) entries[r] = entry_at<T>(p, pass, own);
    const int32_t key = entries[r].key;
    ranks[r] = count_digit(mine, key < 0 ? -1 : key >> pass.shift & (pass.bins - 1));
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < pass.bins; digit += kThreads) {
    int32_t at = starts[digit] + pass.counts[digit * pass.tiles + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {  // counts of the warps -> where each writes first
      const int32_t count = counters[w * pass.bins + digit];
      counters[w * pass.bins + digit] = at;
      at += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const auto [key, position] = entries[r];
    if (key < 0) continue;
    const int32_t at = mine[key >> pass.shift & (pass.bins - 1)] + ranks[r];
    pass.keys_out[at] = key;
    pass.positions_out[at] = pass.last && key == pass.unused ? -1 : position;
  }
}

// offsets[i] = sorted entries with a latent before i.
__global__ void __launch_bounds__(kThreads) offsets_kernel(GroupParams p, Pass pass) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i > p.F) return;
  int64_t low = 0, high = pass.entries;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (pass.keys_out[middle] < i)
      low = middle + 1;
    else
      high = middle;
  }
  p.offsets[i] = static_cast<int32_t>(low);
}

struct Plan {
  int64_t entries, tiles;
  int passes, bits;  // bits of a digit

  explicit Plan(const GroupParams& p)
      : entries(p.N * p.k), tiles((entries + kTile - 1) / kTile), passes(1), bits(0) {
    int all = 1;  // of the keys 0 to F
    while (p.F >> all) ++all;
    passes = (all + kMostBits - 1) / kMostBits;
    bits = (all + passes - 1) / passes;
  }
  size_t padded() const { return (entries + 63) / 64 * 64; }
};

template <class T>
void launch_pass(const GroupParams& p, const Pass& pass, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(pass.tiles);
  const size_t bytes = kWarps * pass.bins * sizeof(int32_t);
  KSAE_LAUNCH((count_kernel<T>), tiles, kThreads, bytes, stream, p, pass);
  KSAE_LAUNCH(tiles_kernel, static_cast<unsigned>((pass.bins + kWarps - 1) / kWarps), kThreads, 0,
              stream, pass);
  KSAE_LAUNCH((move_kernel<T>), tiles, kThreads, bytes + (pass.bins + kWarps) * sizeof(int32_t),
              stream, p, pass);
}

}  // namespace

// Keys twice, positions once (`order` is the other copy), counts and totals.
size_t group_by_latent_workspace(const GroupParams& p) {
  const Plan plan(p);
  return (3 * plan.padded() + ((plan.tiles + 1) << plan.bits)) * sizeof(int32_t);
}

cudaError_t group_by_latent(const GroupParams& p, void* workspace, cudaStream_t stream) {
  const Plan plan(p);
  if (plan.entries == 0) return cudaMemsetAsync(p.offsets, 0, (p.F + 1) * sizeof(int32_t), stream);
  auto* keys = static_cast<int32_t*>(workspace);
  int32_t* positions = keys + 2 * plan.padded();
  Pass pass{};
  pass.entries = plan.entries;
  pass.tiles = plan.tiles;
  pass.unused = static_cast<int32_t>(p.F);
  pass.bins = 1 << plan.bits;
  pass.counts = positions + plan.padded();
  pass.totals = pass.counts + plan.tiles * pass.bins;
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < plan.passes; ++i) {
      const bool to_order = (plan.passes - 1 - i) % 2 == 0;
      pass.shift = i * plan.bits;
      pass.last = i == plan.passes - 1;
      pass.keys_out = keys + (i % 2) * plan.padded();
      pass.positions_out = to_order ? p.order : positions;
      if (i == 0)
        launch_pass<T>(p, pass, stream);
      else
        launch_pass<void>(p, pass, stream);
      pass.keys = pass.keys_out;
      pass.positions = pass.positions_out;
    }
    KSAE_LAUNCH(offsets_kernel, static_cast<unsigned>((p.F + kThreads) / kThreads), kThreads, 0,
                stream, p, pass);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
