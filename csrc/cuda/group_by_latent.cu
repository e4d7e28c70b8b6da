// SPDX-License-Identifier: Apache-2.0
// Tokens grouped by latent (CSC): a stable radix sort of the entries by latent.
//
// The key of an entry is its latent. A pass sorts by one digit of the key: each block counts the
// digits of its tile, a warp a digit turns the counts of all tiles into their starts, and the
// blocks move their entries, ranked by their place in the tile. Offsets are then found by
// bisection. There is no atomic and no wait for the device, and to sort, a latent that every token
// selects is one key among others: few long segments cost what many short ones cost. Entries of
// value 0, nearly all of AuxK's where little is dead, are left behind by the first pass; how many
// are left only the device knows, and blocks without any leave at once.
//
// Bytes for N k values of which M are not 0, and p passes of b bits (2 of 9 where F is 2^18): two
// readings of the values and of the M indices, 8 M p + 12 M (p - 1) of keys and positions, 2^b M p
// / 128 of counts, 4 N k for the unused tail at most, F bisections of log2(M) steps. No flops.
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
  int32_t* used;    // [1] entries that are sorted: written by the first pass, for later ones
  int64_t entries, tiles;
  int shift, bins;
  bool last;
};

// The entry at a place of a pass. T: of the values, in the first pass; void in later ones.
template <class T>
__device__ __forceinline__ int32_t position_at(const Pass& pass, int64_t at) {
  return std::is_void_v<T> ? pass.positions[at] : static_cast<int32_t>(at);
}

// How many entries a pass finds.
template <class T>
__device__ __forceinline__ int64_t entries_of(const Pass& pass) {
  return std::is_void_v<T> ? *pass.used : pass.entries;
}

// The first entry of a thread; it has every 32nd from there on.
__device__ __forceinline__ int64_t first_entry() {
  return int64_t(blockIdx.x) * kTile + threadIdx.x / 32 * (kTile / kWarps) + threadIdx.x % 32;
}

// The keys of a thread's entries, -1 for those that are left out; all on their way at once.
template <class T>
__device__ __forceinline__ void read_keys(const GroupParams& p, const Pass& pass,
                                          int32_t (&keys)[kRounds]) {
  const int64_t first = first_entry(), count = entries_of<T>(pass);
  bool used[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) used[r] = first + 32 * r < count;
  if constexpr (!std::is_void_v<T>) {
    T values[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r)
      if (used[r]) values[r] = static_cast<const T*>(p.values)[first + 32 * r];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) used[r] = used[r] && load(&values[r]) != 0;  // NaN counts
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    keys[r] = -1;
    if (!used[r]) continue;
    if constexpr (std::is_void_v<T>)
      keys[r] = pass.keys[first + 32 * r];
    else
      keys[r] = static_cast<int32_t>(index_at(p.indices64, p.indices32, first + 32 * r));
  }
}

__device__ __forceinline__ int digit_of(const Pass& pass, int32_t key) {
  return key < 0 ? -1 : key >> pass.shift & (pass.bins - 1);
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
  if (int64_t(blockIdx.x) * kTile >= entries_of<T>(pass)) return;
  clear(counters, pass.bins);
  int32_t keys[kRounds];
  read_keys<T>(p, pass, keys);
#pragma unroll
  for (int r = 0; r < kRounds; ++r)
    count_digit(counters + threadIdx.x / 32 * pass.bins, digit_of(pass, keys[r]));
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
template <class T>
__global__ void __launch_bounds__(kThreads) tiles_kernel(Pass pass) {
  const int digit = blockIdx.x * kWarps + threadIdx.x / 32;
  if (digit >= pass.bins) return;
  const int64_t tiles = (entries_of<T>(pass) + kTile - 1) / kTile;
  int32_t* counts = pass.counts + digit * pass.tiles;
  int64_t tile = threadIdx.x % 32;
  int32_t before = 0, next = tile < tiles ? counts[tile] : 0;
  for (int64_t done = 0; done < tiles; done += 32, tile += 32) {
    const int32_t count = next;
    next = tile + 32 < tiles ? counts[tile + 32] : 0;  // on its way during the sum
    const int32_t sum = sum_to_here(count);
    if (tile < tiles) counts[tile] = before + sum - count;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (threadIdx.x % 32 == 0) pass.totals[digit] = before;
}

// starts[digit] = entries with smaller digits; returns the entries with any. A thread owns a run of
// digits.
__device__ __forceinline__ int32_t digit_starts(const Pass& pass, int32_t* starts, int32_t* sums) {
  const int run = (pass.bins + kThreads - 1) / kThreads, from = threadIdx.x * run;
  const int to = from + run < pass.bins ? from + run : pass.bins;
  int32_t own = 0;
  for (int digit = from; digit < to; ++digit) own += pass.totals[digit];
  const int32_t sum = sum_to_here(own);
  if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  int32_t before = sum - own, all = 0;
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w < threadIdx.x / 32) before += sums[w];
    all += sums[w];
  }
  for (int digit = from; digit < to; ++digit) {
    starts[digit] = before;
    before += pass.totals[digit];
  }
  return all;
}

// Moves the entries of a tile to their places; the last pass also writes the unused tail.
template <class T>
__global__ void __launch_bounds__(kThreads) move_kernel(GroupParams p, Pass pass) {
  KSAE_SHARED_BYTES(shared);
  auto* counters = reinterpret_cast<int32_t*>(shared);  // [warps, bins]
  int32_t* starts = counters + kWarps * pass.bins;      // [bins]
  const int64_t begin = int64_t(blockIdx.x) * kTile, found = entries_of<T>(pass);
  if (!pass.last && begin >= found) return;
  int32_t keys[kRounds];
  read_keys<T>(p, pass, keys);
  clear(counters, pass.bins);
  const int32_t used = digit_starts(pass, starts, starts + pass.bins);
  if constexpr (!std::is_void_v<T>) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *pass.used = used;
  }
  if (pass.last) {
    for (int64_t at = begin + threadIdx.x; at < begin + kTile && at < pass.entries; at += kThreads)
      if (at >= used) pass.positions_out[at] = -1;
    if (begin >= found) return;
  }
  int32_t* mine = counters + threadIdx.x / 32 * pass.bins;
  int32_t ranks[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) ranks[r] = count_digit(mine, digit_of(pass, keys[r]));
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
    if (keys[r] < 0) continue;
    const int32_t at = mine[digit_of(pass, keys[r])] + ranks[r];
    pass.keys_out[at] = keys[r];
    pass.positions_out[at] = position_at<T>(pass, first_entry() + 32 * r);
  }
}

// offsets[i] = sorted entries with a latent before i.
__global__ void __launch_bounds__(kThreads) offsets_kernel(GroupParams p, Pass pass) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i > p.F) return;
  int64_t low = 0, high = *pass.used;
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
    int all = 1;  // of the keys 0 to F - 1
    while ((p.F - 1) >> all) ++all;
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
  KSAE_LAUNCH((tiles_kernel<T>), static_cast<unsigned>((pass.bins + kWarps - 1) / kWarps), kThreads,
              0, stream, pass);
  KSAE_LAUNCH((move_kernel<T>), tiles, kThreads, bytes + (pass.bins + kWarps) * sizeof(int32_t),
              stream, p, pass);
}

}  // namespace

// Keys twice, positions once (`order` is the other copy), counts, totals and the number used.
size_t group_by_latent_workspace(const GroupParams& p) {
  const Plan plan(p);
  return (3 * plan.padded() + ((plan.tiles + 1) << plan.bits) + 1) * sizeof(int32_t);
}

cudaError_t group_by_latent(const GroupParams& p, void* workspace, cudaStream_t stream) {
  const Plan plan(p);
  if (plan.entries == 0)
    return forgotten(cudaMemsetAsync(p.offsets, 0, (p.F + 1) * sizeof(int32_t), stream));
  auto* keys = static_cast<int32_t*>(workspace);
  int32_t* positions = keys + 2 * plan.padded();
  Pass pass{};
  pass.entries = plan.entries;
  pass.tiles = plan.tiles;
  pass.bins = 1 << plan.bits;
  pass.counts = positions + plan.padded();
  pass.totals = pass.counts + plan.tiles * pass.bins;
  pass.used = pass.totals + pass.bins;
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
