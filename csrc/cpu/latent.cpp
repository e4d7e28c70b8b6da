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
constexpr int64_t kPartials = 64;

int64_t latent_block(int64_t F) { return std::max<int64_t>((F + kPartials - 1) / kPartials, 16); }
int64_t padded(int64_t d) { return d + kVectorPad; }

bool finite(const float* scales, int n) {
  return std::all_of(scales, scales + n, [](float s) { return std::isfinite(s); });
}

struct RowWork {
  float* partial;  // [blocks][d padded], with grad_b_dec
  float* scratch;  // [threads][columns padded]
};
RowWork row_work(const RowUpdateParams& p, int threads, Arena& arena) {
  RowWork w{};
  const int64_t blocks = (p.F + latent_block(p.F) - 1) / latent_block(p.F);
  if (p.grad_b_dec) w.partial = static_cast<float*>(arena.take(blocks * padded(p.d) * 4));
  w.scratch = static_cast<float*>(arena.take(std::max(threads, 1) * padded(p.columns) * 4));
  return w;
}

void row_pass(const RowUpdateParams& p, void* workspace, int threads, bool update) {
  Arena arena{static_cast<char*>(workspace), 0};
  const RowWork w = row_work(p, threads, arena);
  const int64_t block = latent_block(p.F), blocks = (p.F + block - 1) / block, row = padded(p.d);
  if (p.grad_b_dec) std::memset(p.grad_b_dec, 0, size_t(p.d) * 4);
  if (!finite(p.scales, p.n_groups)) return;
  if (p.grad_b_dec) std::memset(w.partial, 0, size_t(blocks * row) * 4);
  parallel_blocks(blocks, 1, threads, [&](int64_t b0, int64_t b1, int rank) {
    for (int64_t b = b0; b < b1; ++b)
      kernels().row_update(p, b * block, std::min(p.F, (b + 1) * block),
                           w.scratch + rank * padded(p.columns),
                           p.grad_b_dec ? w.partial + b * row : nullptr, update);
  });
  for (int64_t b = 0; p.grad_b_dec && b < blocks; ++b)
    for (int64_t c = 0; c < p.d; ++c) p.grad_b_dec[c] += w.partial[b * row + c];
}

}  // namespace

void latent_sums(const LatentSumsParams& p, int threads) {
  if (!finite(p.scales, p.n_groups)) return;
  parallel_blocks(p.F, 1024, threads,
                  [&](int64_t i0, int64_t i1, int) { kernels().latent_sums(p, i0, i1); });
}

size_t row_update_workspace(const RowUpdateParams& p, int threads) {
  Arena arena{nullptr, 0};
  row_work(p, threads, arena);
  return arena.used;
}

void row_update(const RowUpdateParams& p, void* workspace, int threads) {
  row_pass(p, workspace, threads, true);
}

void row_grad_sq(const RowUpdateParams& p, void* workspace, int threads) {
  std::memset(p.grad_sq, 0, size_t(p.F) * 8);
  row_pass(p, workspace, threads, false);
}

size_t sparse_decode_backward_weight_workspace(const DecodeBackwardWeightParams& p, int threads) {
  Arena arena{nullptr, 0};
  arena.take((p.F + 1) * 4);
  arena.take(p.N * p.k * 4);
  arena.take(group_by_latent_workspace(
      {p.N, p.F, p.k, p.dtype, p.values, p.indices64, p.indices32, nullptr, nullptr}, threads));
  arena.take(std::max(threads, 1) * padded(p.d) * 4);
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
  auto* scratch = static_cast<float*>(arena.take(std::max(threads, 1) * padded(p.d) * 4));
  group_by_latent(group, counts, threads);
  parallel_blocks(p.F, kWeightBlock, threads, [&](int64_t i0, int64_t i1, int rank) {
    kernels().backward_weight(p, offsets, order, i0, i1, scratch + rank * padded(p.d));
  });
}

}  // namespace ksae::cpu
