// SPDX-License-Identifier: Apache-2.0
// Latent-major passes, threaded over latents (the kernel: isa/latent.cpp).
//
// Blocks of latents are claimed in turn. The encoder path of db_dec sums over latents: each block
// of a cut that depends on F alone keeps its own partial row, added up in order at the end.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

constexpr int64_t kWeightBlock = 64;
constexpr int64_t kPartials = 128;

int64_t latent_block(int64_t F) { return std::max<int64_t>((F + kPartials - 1) / kPartials, 16); }
int64_t padded(int64_t d) { return d + kVectorPad; }

void latent_pass(const LatentParams& p, void* workspace, int threads, bool update) {
  Arena arena{static_cast<char*>(workspace), 0};
  const int64_t block = latent_block(p.F), blocks = (p.F + block - 1) / block;
  const int64_t row = padded(p.d_in), scratch = padded(p.d_out) + padded(p.d_in);
  auto* partial = static_cast<float*>(arena.take(blocks * row * 4));
  auto* work = static_cast<float*>(arena.take(std::max(threads, 1) * scratch * 4));
  std::memset(p.grad_b_dec, 0, size_t(p.d_in) * 4);
  for (int g = 0; g < p.n_groups; ++g)
    if (!std::isfinite(p.scales[g])) return;
  std::memset(partial, 0, size_t(blocks * row) * 4);
  parallel_blocks(blocks, 1, threads, [&](int64_t b0, int64_t b1, int rank) {
    for (int64_t b = b0; b < b1; ++b)
      kernels().latent(p, b * block, std::min(p.F, (b + 1) * block), work + rank * scratch,
                       partial + b * row, update);
  });
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < p.d_in; ++c) p.grad_b_dec[c] += partial[b * row + c];
}

}  // namespace

size_t latent_workspace(const LatentParams& p, int threads) {
  Arena arena{nullptr, 0};
  const int64_t block = latent_block(p.F), blocks = (p.F + block - 1) / block;
  arena.take(blocks * padded(p.d_in) * 4);
  arena.take(std::max(threads, 1) * (padded(p.d_out) + padded(p.d_in)) * 4);
  return arena.used;
}

void latent_update(const LatentParams& p, void* workspace, int threads) {
  latent_pass(p, workspace, threads, true);
}

void latent_grad_norm(const LatentParams& p, void* workspace, int threads) {
  std::memset(p.grad_sq, 0, size_t(p.F) * 8);
  latent_pass(p, workspace, threads, false);
}

size_t sparse_decode_backward_weight_workspace(const DecodeBackwardWeightParams& p, int threads) {
  Arena arena{nullptr, 0};
  arena.take((p.F + 1) * 4);
  arena.take(p.N * p.k * 4);
  arena.take(group_by_latent_workspace({p.N, p.F, p.k, p.dtype, p.values, p.indices64, p.indices32,
                                        nullptr, nullptr},
                                       threads));
  arena.take(std::max(threads, 1) * padded(p.d) * 4);
  return arena.used;
}

void sparse_decode_backward_weight(const DecodeBackwardWeightParams& p, void* workspace,
                                   int threads) {
  Arena arena{static_cast<char*>(workspace), 0};
  auto* offsets = static_cast<int32_t*>(arena.take((p.F + 1) * 4));
  auto* order = static_cast<int32_t*>(arena.take(p.N * p.k * 4));
  const GroupParams group{p.N, p.F, p.k, p.dtype, p.values, p.indices64, p.indices32, offsets, order};
  void* counts = arena.take(group_by_latent_workspace(group, threads));
  auto* scratch = static_cast<float*>(arena.take(std::max(threads, 1) * padded(p.d) * 4));
  group_by_latent(group, counts, threads);
  parallel_blocks(p.F, kWeightBlock, threads, [&](int64_t i0, int64_t i1, int rank) {
    kernels().backward_weight(p, offsets, order, i0, i1, scratch + rank * padded(p.d));
  });
}

}  // namespace ksae::cpu
