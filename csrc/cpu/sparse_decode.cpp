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

size_t prefix_residual_workspace(const PrefixResidualParams& p, int threads) {
  const size_t row = size_t(p.residual.decode.d + kVectorPad) * 4;
  return row * size_t(p.n_prefixes) * size_t(std::max(threads, 1));
}

void prefix_residual(const PrefixResidualParams& p, void* workspace, int threads) {
  auto* rows = static_cast<float*>(workspace);
  const int64_t own = p.n_prefixes * (p.residual.decode.d + kVectorPad);
  parallel_blocks(p.residual.decode.N, kTokenBlock, threads,
                  [&](int64_t row0, int64_t row1, int rank) {
                    kernels().prefix_residual(p, row0, row1, rows + rank * own);
                  });
}

void sparse_decode_backward_values(const DecodeBackwardValuesParams& p, int threads) {
  parallel_blocks(p.N, kTokenBlock, threads, [&](int64_t row0, int64_t row1, int) {
    kernels().backward_values(p, row0, row1);
  });
}

}  // namespace ksae::cpu
