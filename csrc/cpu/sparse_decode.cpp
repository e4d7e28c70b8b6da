// SPDX-License-Identifier: Apache-2.0
// Token-major decoder products, threaded over tokens (the kernels: isa/sparse_decode.cpp).
#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {

constexpr int64_t kTokenBlock = 16;

void sparse_decode(const DecodeParams& p, int threads) {
  parallel_blocks(p.N, kTokenBlock, threads,
                  [&](int64_t row0, int64_t row1, int) { kernels().decode(p, row0, row1); });
}

size_t sparse_residual_workspace(const ResidualParams& p, int threads) {
  return size_t(p.decode.d + kVectorPad) * 4 * size_t(std::max(threads, 1));
}

void sparse_residual(const ResidualParams& p, void* workspace, int threads) {
  auto* rows = static_cast<float*>(workspace);
  parallel_blocks(p.decode.N, kTokenBlock, threads, [&](int64_t row0, int64_t row1, int rank) {
    kernels().residual(p, row0, row1, rows + rank * (p.decode.d + kVectorPad));
  });
}

void sparse_decode_backward_values(const DecodeBackwardValuesParams& p, int threads) {
  parallel_blocks(p.N, kTokenBlock, threads, [&](int64_t row0, int64_t row1, int) {
    kernels().backward_values(p, row0, row1);
  });
}

}  // namespace ksae::cpu
