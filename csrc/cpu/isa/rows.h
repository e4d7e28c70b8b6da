// SPDX-License-Identifier: Apache-2.0
// Which entries a row of a code has: k a row, or those between two row offsets.
#pragma once

#include "simd.h"

namespace ksae::cpu::KSAE_ISA {

struct FixedRows {
  int64_t k;
  KSAE_INLINE int64_t begin(int64_t n) const { return n * k; }
  KSAE_INLINE int64_t count(int64_t) const { return k; }
};

struct OffsetRows {
  const int64_t* offsets;  // [N + 1]
  KSAE_INLINE int64_t begin(int64_t n) const { return offsets[n]; }
  KSAE_INLINE int64_t count(int64_t n) const { return offsets[n + 1] - offsets[n]; }
};

// Calls f with the rows of p, so that k entries a row keep a loop of their own.
template <class Params, class Fn>
KSAE_INLINE void with_rows(const Params& p, Fn f) {
  if (p.row_offsets) {
    f(OffsetRows{p.row_offsets});
  } else {
    f(FixedRows{p.k});
  }
}

// The row of an entry in a group of entries or a code: a table, or k entries a row.
template <class Group>
KSAE_INLINE int64_t row_of(const Group& group, int32_t entry) {
  return group.row_of ? group.row_of[entry] : entry / group.k;
}

}  // namespace ksae::cpu::KSAE_ISA
