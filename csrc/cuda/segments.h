// SPDX-License-Identifier: Apache-2.0
// Long segments, cut: what lets many blocks sum the entries of one latent, in a fixed order.
//
// Unit u of a group is entries [cut u, cut (u + 1)) of its `order`, whatever latents these fall in.
// A segment of more than `cut` entries is long and is cut where units end. At most two pieces of
// long segments lie in a unit, one that starts with it (slot 0) and one that starts later (slot 1),
// so 2 slots a unit hold all sums of pieces. A group of very many entries, as AuxK's is, has longer
// units instead of more of them: that bounds the workspace. A warp finds the pieces of a unit by
// looking up whose its first and its last entry are; each piece is summed in the order of its
// entries; the owner of a latent then adds its pieces in their order. No sum depends on scheduling.
#pragma once

#include "common.h"

namespace ksae::cuda {

constexpr int kLogCut = 8;            // of a group with at most 256 kMostUnits entries
constexpr int64_t kMostUnits = 4096;  // of a group: 32 KB of pieces a column
constexpr int kMaxGroups = 4;

struct Piece {
  int64_t slot;      // 2 * unit + slot, units numbered through all groups
  int group;         // of the loss
  int32_t from, to;  // entries; none where from = to
};

struct Segments {
  int64_t F;
  int groups;
  const int32_t* offsets[kMaxGroups];  // [F + 1] each
  int64_t first_unit[kMaxGroups + 1];
  int log_cut[kMaxGroups];  // of the entries of a unit

  __host__ __device__ int64_t units() const { return first_unit[groups]; }
};

inline int log_cut_of(int64_t entries) {
  int log = kLogCut;
  while (entries > kMostUnits << log) ++log;
  return log;
}

// Units of groups with a member entries.
template <class Group>
int64_t units_of(const Group* groups, int count) {
  int64_t units = 0;
  for (int g = 0; g < count; ++g) {
    const int log = log_cut_of(groups[g].entries);
    units += (groups[g].entries + (int64_t(1) << log) - 1) >> log;
  }
  return units;
}

// Segments of groups with members offsets and entries.
template <class Group>
Segments segments_of(const Group* groups, int count, int64_t F) {
  Segments s{};
  s.F = F;
  s.groups = count;
  for (int g = 0; g < count; ++g) {
    s.offsets[g] = groups[g].offsets;
    s.first_unit[g + 1] = s.first_unit[g] + units_of(groups + g, 1);
    s.log_cut[g] = log_cut_of(groups[g].entries);
  }
  return s;
}

// Where the piece in unit u of a group lies if its segment begins at `begin`.
__device__ __forceinline__ int64_t slot_of(const Segments& s, int group, int32_t u, int32_t begin) {
  return 2 * (s.first_unit[group] + u) + (u << s.log_cut[group] < begin ? 1 : 0);
}

// The latent of an entry: the last whose segment begins at or before it. All 32 lanes call, for the
// same entry; each round leaves a 32nd of the latents.
__device__ __forceinline__ int32_t latent_of(const int32_t* offsets, int64_t F, int32_t entry) {
  int64_t low = 0, high = F;  // offsets[low] <= entry < offsets[high]
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, at = low + (threadIdx.x % 32 + 1) * step;
    const bool before = at < high && offsets[at] <= entry;
    low += __popc(__ballot_sync(0xffffffffu, before)) * step;
    high = low + step < high ? low + step : high;
  }
  return static_cast<int32_t>(low);
}

// The pieces of long segments in a unit: that of its first entry, and another that begins later.
// All 32 lanes call, for the same unit.
__device__ __forceinline__ void pieces_of(const Segments& s, int64_t unit, Piece (&pieces)[2]) {
  int g = 0;
  const int32_t* offsets = s.offsets[0];
  int64_t first = 0;
  int log = s.log_cut[0];
#pragma unroll  // members of s at fixed places: no copy of it in local memory
  for (int n = 1; n < kMaxGroups; ++n) {
    if (n >= s.groups || unit < s.first_unit[n]) continue;
    g = n, offsets = s.offsets[n], first = s.first_unit[n], log = s.log_cut[n];
  }
  const int64_t begin = (unit - first) << log, all = offsets[s.F], cut = int64_t(1) << log;
  const auto from = static_cast<int32_t>(begin);
  const auto to = static_cast<int32_t>(begin + cut < all ? begin + cut : all);
  pieces[0] = {2 * unit, g, 0, 0};
  pieces[1] = {2 * unit + 1, g, 0, 0};
  if (begin >= all) return;
  const int32_t i = latent_of(offsets, s.F, from), start = offsets[i], end = offsets[i + 1];
  if (end - start > cut) pieces[0] = {2 * unit, g, from, end < to ? end : to};
  if (end >= to) return;
  const int32_t j = latent_of(offsets, s.F, to - 1), later = offsets[j];
  if (offsets[j + 1] - later > cut) pieces[1] = {2 * unit + 1, g, later, to};
}

}  // namespace ksae::cuda
