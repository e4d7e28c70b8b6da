// SPDX-License-Identifier: Apache-2.0
// Token-major decoder products, threaded over tokens (the kernels: isa/decode.cpp).
#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {

constexpr int64_t kTokenBlock = 16;

void sparse_decode(const DecodeParams& p, int threads) {
  parallel_blocks(p.N, kTokenBlock, threads,
                  [&](int64_t row0, int64_t row1, int) { kernels().decode(p, row0, row1); });
}

void sparse_residual(const ResidualParams& p, int threads) {
  parallel_blocks(p.decode.N, kTokenBlock, threads,
                  [&](int64_t row0, int64_t row1, int) { kernels().residual(p, row0, row1); });
}

void sparse_decode_backward_values(const DecodeBackwardValuesParams& p, int threads) {
  parallel_blocks(p.N, kTokenBlock, threads, [&](int64_t row0, int64_t row1, int) {
    kernels().backward_values(p, row0, row1);
  });
}

}  // namespace ksae::cpu
