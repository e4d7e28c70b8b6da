// SPDX-License-Identifier: Apache-2.0
// Long segments, cut: what lets many blocks sum the entries of one latent, in a fixed order.
//
// Unit u of a group is entries [kCut u, kCut (u + 1)) of its `order`, whatever latents these fall
// in. A segment of more than kCut entries is long. At most two long segments meet a unit: the one
// that its first entry is in (slot 0) and one that begins later in it (slot 1). Blocks or warps sum
// these pieces first; the owner of a latent then adds its pieces in their order. Cuts depend on
// the code alone, so sums do not depend on scheduling, and the workspace on N k alone.
#pragma once

#include "common.h"

namespace ksae::cuda {

constexpr int kCut = 256;
constexpr int kMaxGroups = 4;

// What the latent passes share about a group: units are numbered through all groups.
struct Units {
  int64_t first[kMaxGroups + 1];

  __device__ __forceinline__ int group_of(int64_t unit) const {
    int g = 0;
    while (unit >= first[g + 1]) ++g;
    return g;
  }
};

inline int64_t units_of(int64_t entries) { return (entries + kCut - 1) / kCut; }

struct Piece {
  int32_t from, to;  // entries; none where from == to
};

// The piece of a long segment in a slot of unit u of a group.
__device__ __forceinline__ Piece piece_of(const int32_t* offsets, int64_t F, int64_t u, int slot) {
  const int32_t used = offsets[F];
  const int64_t from = u * kCut;
  if (from >= used) return {0, 0};
  const int64_t to = used - from < kCut ? used : from + kCut;
  const int64_t entry = slot == 0 ? from : to - 1;
  int64_t low = 0, high = F;  // offsets[low] <= entry < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= entry ? low : high) = middle;
  }
  const int32_t begin = offsets[low], end = offsets[low + 1];
  if (end - begin <= kCut || (slot == 1 && begin <= from)) return {0, 0};
  return {begin > from ? begin : static_cast<int32_t>(from),
          end < to ? end : static_cast<int32_t>(to)};
}

// Where the piece of unit u lies for a segment that begins at `begin`: 2 * unit + slot.
__device__ __forceinline__ int64_t slot_of(int64_t first_unit, int64_t u, int32_t begin) {
  return 2 * (first_unit + u) + (u * kCut < begin ? 1 : 0);
}

// Sums of the values of each latent: value_sum [F] in the values' dtype.
struct ValueSumsParams {
  int64_t F;
  Dtype dtype;
  const int32_t* offsets;  // [F + 1]
  const int32_t* order;    // [entries]
  const void* values;      // [entries]
  int64_t entries;
  void* value_sum;
};
size_t value_sums_workspace(int64_t entries);
cudaError_t value_sums(const ValueSumsParams& p, void* workspace, cudaStream_t stream);

}  // namespace ksae::cuda
