// SPDX-License-Identifier: Apache-2.0
// Gradient of W_dec: entries are grouped by latent, then threaded over latents (the kernel:
// isa/sparse_decode_backward_weight.cpp).
#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {

constexpr int64_t kWeightBlock = 64;

size_t sparse_decode_backward_weight_workspace(const DecodeBackwardWeightParams& p, int threads) {
  Arena arena{nullptr, 0};
  arena.take((p.F + 1) * 4);
  arena.take(p.N * p.k * 4);
  arena.take(group_by_latent_workspace(
      {p.N, p.F, p.k, p.dtype, p.values, p.indices64, p.indices32, nullptr, nullptr}, threads));
  arena.take(std::max(threads, 1) * (p.d + kVectorPad) * 4);
  return arena.used;
}

void sparse_decode_backward_weight(const DecodeBackwardWeightParams& p, void* workspace,
                                   int threads) {
  Arena arena{static_cast<char*>(workspace), 0};
  auto* offsets = static_cast<int32_t*>(arena.take((p.F + 1) * 4));
  auto* order = static_cast<int32_t*>(arena.take(p.N * p.k * 4));
  const GroupParams group{p.N,         p.F,         p.k,     p.dtype, p.values,
                          p.indices64, p.indices32, offsets, order};
  void* counts = arena.take(group_by_latent_workspace(group, threads));
  auto* scratch = static_cast<float*>(arena.take(std::max(threads, 1) * (p.d + kVectorPad) * 4));
  group_by_latent(group, counts, threads);
  parallel_blocks(p.F, kWeightBlock, threads, [&](int64_t i0, int64_t i1, int rank) {
    kernels().backward_weight(p, offsets, order, i0, i1, scratch + rank * (p.d + kVectorPad));
  });
}

}  // namespace ksae::cpu
