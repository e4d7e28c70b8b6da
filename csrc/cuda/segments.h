// SPDX-License-Identifier: Apache-2.0
// Long segments, cut: what lets many blocks sum the entries of one latent, in a fixed order.
//
// Unit u of a group is entries [cut u, cut (u + 1)) of its `order`, whatever latents these fall in.
// A segment of more than `cut` entries is long and is cut where units end. At most two pieces of
// long segments lie in a unit, one that starts with it (slot 0) and one that starts later (slot 1),
// so 2 slots a unit hold all sums of pieces. A group of very many entries, as AuxK's is, has longer
// units instead of more of them: that bounds the workspace. A list of the pieces is made first, in
// any order; blocks sum what is listed, each piece in the order of its entries; the owner of a
// latent then adds its pieces in their order. No sum depends on scheduling.
#pragma once

#include "common.h"

namespace ksae::cuda {

constexpr int kLogCut = 8;            // of a group with at most 256 kMostUnits entries
constexpr int64_t kMostUnits = 4096;  // of a group: 32 KB of pieces a column
constexpr int kMaxGroups = 4;

struct Piece {
  int32_t slot;      // 2 * unit + slot, units numbered through all groups
  int32_t group;     // of the loss
  int32_t from, to;  // entries
};

struct Segments {
  int64_t F;
  int groups;
  const int32_t* offsets[kMaxGroups];  // [F + 1] each
  int64_t first_unit[kMaxGroups + 1];
  int log_cut[kMaxGroups];  // of the entries of a unit
  int32_t* count;           // of the pieces listed
  Piece* list;              // [2 * units]
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

// Bytes of count and list, a multiple of 256.
inline size_t list_bytes(int64_t units) {
  return (sizeof(Piece) * (2 * units + 1) + 255) / 256 * 256;
}

// Segments of groups with members offsets and entries, listed in the workspace.
template <class Group>
Segments segments_of(const Group* groups, int count, int64_t F, void* workspace) {
  Segments s{};
  s.F = F;
  s.groups = count;
  for (int g = 0; g < count; ++g) {
    s.offsets[g] = groups[g].offsets;
    s.first_unit[g + 1] = s.first_unit[g] + units_of(groups + g, 1);
    s.log_cut[g] = log_cut_of(groups[g].entries);
  }
  s.count = static_cast<int32_t*>(workspace);
  s.list = static_cast<Piece*>(workspace) + 1;
  return s;
}

cudaError_t list_pieces(const Segments& s, cudaStream_t stream);

// A grid for what is to be done with listed pieces: a block for each of at most `items`, as many as
// the device runs at once. Blocks take every gridDim.x-th; how many there are changes no sum.
cudaError_t grid_for(int64_t items, unsigned* blocks);

// Where the piece in unit u of a group lies if its segment begins at `begin`.
__device__ __forceinline__ int64_t slot_of(const Segments& s, int group, int32_t u, int32_t begin) {
  return 2 * (s.first_unit[group] + u) + (u << s.log_cut[group] < begin ? 1 : 0);
}

}  // namespace ksae::cuda
