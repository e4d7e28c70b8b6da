// SPDX-License-Identifier: Apache-2.0
// threshold_encode, threaded over rows (the kernels: isa/threshold_encode.cpp).
//
// Screened, chunks of rows go through topk_encode's product behind the gate "above its threshold".
// A row with more candidates than it has room for spills into blocks that the chunk shares; when
// these run out, it is counted without screening. Where most rows of a chunk are such rows, so are
// all that follow.
#include <algorithm>

#include "encode_chunk.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

constexpr int64_t kUnpacked = 2;    // rows for which packing the weights would cost more
constexpr int64_t kRoom = 96;       // a row has room for some four times as many candidates
constexpr int64_t kSpillShare = 4;  // rows of a chunk for one more room

int64_t scratch_floats(const ThresholdEncodeParams& p) {
  return kThresholdRows * (p.d + kVectorPad);
}

EncodeParams product_of(const ThresholdEncodeParams& p) {
  EncodeParams e{};
  e.N = p.N;
  e.d = p.d;
  e.F = p.F;
  e.k = std::min(p.F, kRoom);
  e.dtype = p.dtype;
  e.x = p.x;
  e.W_enc = p.W_enc;
  e.b_enc = p.b_enc;
  e.b_dec = p.b_dec;
  e.screen = p.screen;
  e.slack = p.slack;
  return e;
}

// A product of bfloat16 pairs is not the sum that decides: it is a screen too.
bool screened(const ThresholdEncodeParams& p) {
  return p.screen && p.N > kUnpacked && kernels().has_dot && p.dtype != Dtype::kFloat16;
}

size_t scratch_bytes(const ThresholdEncodeParams& p, int threads) {
  return size_t(round_up(std::max(threads, 1) * scratch_floats(p) * 4, 64));
}

float* scratch_of(const ThresholdEncodeParams& p, void* workspace, int rank) {
  return static_cast<float*>(workspace) + rank * scratch_floats(p);
}

void count_from(const ThresholdEncodeParams& p, int64_t first, void* workspace, int threads) {
  parallel_blocks(p.N - first, kThresholdRows, threads, [&](int64_t r0, int64_t r1, int rank) {
    kernels().threshold_count(p, first + r0, first + r1, scratch_of(p, workspace, rank));
  });
}

Plan plan_screened(const ThresholdEncodeParams& p, const EncodeParams& e, int threads,
                   Arena& arena) {
  Plan plan = plan_chunk(e, {}, Scoring::kScreen, p.F, p.N, threads, arena);
  take_spill(plan.chunk, plan.chunk_rows / kSpillShare + 1, arena);
  return plan;
}

// Returns how many rows are counted.
int64_t count_screened(const ThresholdEncodeParams& p, void* workspace, int threads) {
  const EncodeParams e = product_of(p);
  if (!screened(p)) return 0;
  Arena arena{static_cast<char*>(workspace), scratch_bytes(p, threads)};
  Plan plan = plan_screened(p, e, threads, arena);
  EncodeChunk& c = plan.chunk;
  c.theta = p.theta;
  c.gate = 0;
  c.fixed = c.unfinished = true;
  EncodeStats unused{};
  for (c.row0 = 0; c.row0 < p.N; c.row0 += c.R) {
    c.R = std::min(plan.chunk_rows, p.N - c.row0);
    *c.spill.used = 0;
    run_chunk(c, plan, threads, &unused);
    if (2 * std::count(c.redo, c.redo + c.R, uint8_t(1)) > c.R) return c.row0;
    parallel_blocks(c.R, kThresholdRows, threads, [&](int64_t r0, int64_t r1, int rank) {
      kernels().threshold_decide(p, c, r0, r1, scratch_of(p, workspace, rank));
    });
  }
  return p.N;
}

}  // namespace

size_t threshold_encode_workspace(const ThresholdEncodeParams& p, int threads) {
  Arena arena{nullptr, scratch_bytes(p, threads)};
  const EncodeParams e = product_of(p);
  if (screened(p)) plan_screened(p, e, threads, arena);
  return arena.used;
}

void threshold_encode_count(const ThresholdEncodeParams& p, void* workspace, int threads) {
  p.row_offsets[0] = 0;
  const int64_t counted = count_screened(p, workspace, threads);
  if (counted < p.N) count_from(p, counted, workspace, threads);
  for (int64_t n = 0; n < p.N; ++n) p.row_offsets[n + 1] += p.row_offsets[n];
}

void threshold_encode_fill(const ThresholdEncodeParams& p, void* workspace, int threads) {
  parallel_blocks(p.N, kThresholdRows, threads, [&](int64_t row0, int64_t row1, int rank) {
    kernels().threshold_fill(p, row0, row1, scratch_of(p, workspace, rank));
  });
}

}  // namespace ksae::cpu
