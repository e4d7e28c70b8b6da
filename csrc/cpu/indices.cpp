// SPDX-License-Identifier: Apache-2.0
// indices_in_range: one pass over the indices without a branch. The sign bit of i | (F - 1 - i) is
// set where i is outside of [0, F), so an OR of them all tells, whatever the instruction set.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "ksae/cpu.h"

namespace ksae::cpu {
namespace {

template <class Index>
bool all_in_range(const Index* indices, int64_t n, int64_t F) {
  using Bits = std::make_unsigned_t<Index>;
  const Bits last = Bits(std::min<int64_t>(F, std::numeric_limits<Index>::max()) - 1);
  Bits outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= Bits(indices[i]) | (last - Bits(indices[i]));
  return Index(outside) >= 0;
}

}  // namespace

bool indices_in_range(const int64_t* indices64, const int32_t* indices32, int64_t n, int64_t F) {
  if (F <= 0) return n == 0;
  return indices64 ? all_in_range(indices64, n, F) : all_in_range(indices32, n, F);
}

}  // namespace ksae::cpu
