// SPDX-License-Identifier: Apache-2.0
// row_update and row_grad_sq, threaded over latents (the kernel: isa/row_update.cpp).
//
// Blocks of latents are claimed in turn. The encoder path of db_dec sums over latents: each block
// of a cut that depends on F alone keeps its own partial row, added up in order at the end.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "ksae/op.h"
#include "parallel.h"

namespace ksae::cpu {

// Latents [i0, i1): with `update`, of row_update; else of row_grad_sq.
using RowPass = void(const RowUpdateParams& p, int64_t i0, int64_t i1, float* scratch,
                     float* grad_b_dec, bool update);
KSAE_EACH_LEVEL(RowPass, row_pass)

namespace {

constexpr int64_t kPartials = 64;

int64_t padded(int64_t d) { return d + kVectorPad; }
int64_t latent_block(int64_t F) { return std::max<int64_t>((F + kPartials - 1) / kPartials, 16); }

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

void all_rows(const RowUpdateParams& p, void* workspace, int threads, bool update) {
  Arena arena{static_cast<char*>(workspace), 0};
  const RowWork w = row_work(p, threads, arena);
  const int64_t block = latent_block(p.F), blocks = (p.F + block - 1) / block, row = padded(p.d);
  if (p.grad_b_dec) std::memset(p.grad_b_dec, 0, size_t(p.d) * 4);
  if (!all_finite(p.scales, p.n_groups)) return;
  if (p.grad_b_dec) std::memset(w.partial, 0, size_t(blocks * row) * 4);
  parallel_blocks(blocks, 1, threads, [&](int64_t b0, int64_t b1, int rank) {
    for (int64_t b = b0; b < b1; ++b)
      row_pass_here()(p, b * block, std::min(p.F, (b + 1) * block),
                      w.scratch + rank * padded(p.columns),
                      p.grad_b_dec ? w.partial + b * row : nullptr, update);
  });
  for (int64_t b = 0; p.grad_b_dec && b < blocks; ++b)
    for (int64_t c = 0; c < p.d; ++c) p.grad_b_dec[c] += w.partial[b * row + c];
}

}  // namespace

size_t row_update_workspace(const RowUpdateParams& p, int threads) {
  Arena arena{nullptr, 0};
  row_work(p, threads, arena);
  return arena.used;
}

void row_update(const RowUpdateParams& p, void* workspace, int threads) {
  all_rows(p, workspace, threads, true);
}

void row_grad_sq(const RowUpdateParams& p, void* workspace, int threads) {
  std::memset(p.grad_sq, 0, size_t(p.F) * 8);
  all_rows(p, workspace, threads, false);
}

namespace {

const Field kGroup[] = {
    KSAE_FIELD(RowGroup, offsets), KSAE_FIELD(RowGroup, order), KSAE_FIELD(RowGroup, coefficients),
    KSAE_FIELD(RowGroup, rows),    KSAE_FIELD(RowGroup, k),     KSAE_FIELD(RowGroup, row_of),
};
using P = RowUpdateParams;
const Field kFields[] = {
    KSAE_FIELD(P, grad_sq),  // of row_grad_sq alone
    KSAE_FIELD(P, F),
    KSAE_FIELD(P, d),
    KSAE_FIELD(P, start),
    KSAE_FIELD(P, columns),
    KSAE_FIELD(P, dtype),
    KSAE_FIELD(P, rows_dtype),
    KSAE_FIELD(P, coefficients_dtype),
    KSAE_LIST(P, groups, n_groups, kGroup),
    KSAE_FIELD(P, scales),
    KSAE_FIELD(P, centre),
    KSAE_FIELD(P, grad_dot_w),
    KSAE_FIELD(P, W),
    KSAE_FIELD(P, grad_b_enc),  // from here on, of row_update alone
    KSAE_FIELD(P, grad_b_dec),
    KSAE_FIELD(P, master),
    KSAE_FIELD(P, m),
    KSAE_FIELD(P, v),
    KSAE_FIELD(P, hyper),
    KSAE_FIELD(P, normalize),
};
constexpr size_t kOfNorm = 13, kAll = sizeof(kFields) / sizeof(Field);
const OpOf<int, P, row_grad_sq, row_update_workspace> norm("row_grad_sq", kFields, kOfNorm);
const OpOf<int, P, row_update, row_update_workspace> update("row_update", kFields + 1, kAll - 1);

}  // namespace

}  // namespace ksae::cpu
