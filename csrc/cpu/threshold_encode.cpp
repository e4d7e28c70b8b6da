// SPDX-License-Identifier: Apache-2.0
// threshold_encode, threaded over rows (the kernels: isa/threshold_encode.cpp).
#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

int64_t scratch_floats(const ThresholdEncodeParams& p) {
  return kThresholdRows * (p.d + kVectorPad);
}

}  // namespace

size_t threshold_encode_workspace(const ThresholdEncodeParams& p, int threads) {
  return size_t(std::max(threads, 1) * scratch_floats(p) * 4);
}

void threshold_encode_count(const ThresholdEncodeParams& p, void* workspace, int threads) {
  p.row_offsets[0] = 0;
  parallel_blocks(p.N, kThresholdRows, threads, [&](int64_t row0, int64_t row1, int rank) {
    kernels().threshold_count(p, row0, row1,
                              static_cast<float*>(workspace) + rank * scratch_floats(p));
  });
  for (int64_t n = 0; n < p.N; ++n) p.row_offsets[n + 1] += p.row_offsets[n];
}

void threshold_encode_fill(const ThresholdEncodeParams& p, void* workspace, int threads) {
  parallel_blocks(p.N, kThresholdRows, threads, [&](int64_t row0, int64_t row1, int rank) {
    kernels().threshold_fill(p, row0, row1,
                             static_cast<float*>(workspace) + rank * scratch_floats(p));
  });
}

}  // namespace ksae::cpu
