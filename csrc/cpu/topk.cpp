// SPDX-License-Identifier: Apache-2.0
// topk of stored rows, threaded over rows (the kernel: isa/topk.cpp).
#include <algorithm>
#include <functional>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

size_t scratch_bytes(int64_t k) {
  const int64_t capacity = k + std::max<int64_t>(k, 256);
  return size_t(16 * k + 2 * 4 * (capacity + kVectorPad) + 4 * capacity + 64) & ~size_t(63);
}

}  // namespace

void sort_descending(uint64_t* keys, int64_t n) { std::sort(keys, keys + n, std::greater<>()); }

size_t topk_workspace(const TopkParams& p, int threads) {
  return scratch_bytes(p.k) * size_t(std::max(threads, 1));
}

void topk(const TopkParams& p, void* workspace, int threads) {
  const size_t bytes = scratch_bytes(p.k);
  parallel_blocks(p.N, 8, threads, [&](int64_t row0, int64_t row1, int rank) {
    kernels().topk(p, row0, row1, static_cast<char*>(workspace) + bytes * rank);
  });
}

}  // namespace ksae::cpu
