// SPDX-License-Identifier: Apache-2.0
// topk_encode and grad_topk_encode, threaded part (the kernels and their mathematics:
// isa/topk_encode.cpp, isa/grad_topk_encode.cpp).
// Rows that screening gives up on are collected and scored again in float32.
#include <algorithm>
#include <cmath>

#include "encode_chunk.h"

namespace ksae::cpu {
namespace {

// Pruning pays up to this many expected candidates a row (see bench/studies/grad_encode.py): in
// float32 on two threads of a Zen 5, d=768, F=24576, k=32, it took 1.5 times plain topk_encode at
// 450 and 2.1 to 2.2 times at 1480, the dual product 2.1 times.
constexpr int64_t kPrunedCandidates = 1000;

double norm(const float* row, int64_t d) {
  double squares = 0;
  for (int64_t j = 0; j < d; ++j) squares += double(row[j]) * row[j];
  return std::sqrt(squares);
}

// How many latents of a row the gradient could lift over the k-th, from a sample of norms, were the
// pre-activations normal: F Q(z / (1 + beta |g| |w|)) where F Q(z) = k.
int64_t expected_candidates(const GradEncodeParams& p) {
  const EncodeParams& e = p.encode;
  double g = 0, w = 0;
  const int64_t rows = std::min<int64_t>(e.N, 64), latents = std::min<int64_t>(e.F, 64);
  for (int64_t i = 0; i < rows; ++i)
    g += norm(static_cast<const float*>(p.grad) + i * (e.N / rows) * p.d_out, p.d_out) / rows;
  for (int64_t i = 0; i < latents; ++i)
    w +=
        norm(static_cast<const float*>(p.W_dec) + i * (e.F / latents) * p.d_out, p.d_out) / latents;
  const auto above = [&e](double z) { return double(e.F) / 2 * std::erfc(z / std::sqrt(2.0)); };
  double low = -40, high = 40;
  while (high - low > 1e-6) (above((low + high) / 2) > double(e.k) ? low : high) = (low + high) / 2;
  const double lifted = low > 0 ? above(low / (1 + double(p.beta) * g * w)) : double(e.F);
  return lifted < double(e.F) ? int64_t(lifted) : e.F;  // NaN: all
}

// Workspace: ids, list of rows to redo, then the plan's pieces. The redo reuses the plan's bytes.
struct Layout {
  int32_t* ids;
  int32_t* redo;
  size_t rest;  // where the plan's pieces begin
};
Layout layout(const EncodeParams& p, bool certified, Arena& arena) {
  Layout l{};
  if (p.mask) l.ids = static_cast<int32_t*>(arena.take(p.F * 4));
  if (certified) l.redo = static_cast<int32_t*>(arena.take(p.N * 4));
  l.rest = arena.used;
  return l;
}

// What the arguments alone decide.
struct Choice {
  Scoring scoring;
  Second second;
  bool certified;  // rows may have to be redone: the second plan is needed
};
Choice choose(const EncodeParams& p, const GradEncodeParams* grad) {
  Choice c{scoring_of(p), {grad, false, 0}, false};
  if (grad) {
    const bool can_prune = p.dtype == Dtype::kFloat32 && grad->mode != GradMode::kMultiplicative;
    if (can_prune && grad->route != GradRoute::kDual) {
      c.second.candidates = expected_candidates(*grad);
      c.second.pruned =
          grad->route == GradRoute::kPruned || c.second.candidates <= kPrunedCandidates;
    }
    if (!c.second.pruned) c.second.candidates = 0;
  }
  c.certified = c.scoring == Scoring::kScreen || c.second.pruned;
  return c;
}

size_t workspace_bytes(const EncodeParams& p, const GradEncodeParams* grad, int threads) {
  const Choice choice = choose(p, grad);
  Arena arena{nullptr, 0};
  const Layout l = layout(p, choice.certified, arena);
  plan_chunk(p, choice.second, choice.scoring, p.F, p.N, threads, arena);
  size_t bytes = arena.used;
  if (choice.certified) {
    arena.used = l.rest;
    plan_chunk(p, {grad, false, 0}, Scoring::kFloat, p.F, p.N, threads, arena);
    bytes = std::max(bytes, arena.used);
  }
  return bytes;
}

// Rows [row0, row0 + R) of the batch, or of the list `rows`.
void run_rows(Plan& plan, const int32_t* rows, int64_t row0, int64_t R, int threads,
              EncodeStats* stats) {
  EncodeChunk& c = plan.chunk;
  c.rows = rows;
  c.row0 = row0;
  c.R = R;
  if (plan.grad.p) {
    EncodeChunk& a = plan.grad.a;
    a.p = &plan.second;
    a.M = c.M;
    a.rows = rows;
    a.row0 = row0;
    a.R = R;
    c.grad = &plan.grad;
  }
  run_chunk(c, plan, threads, stats);
}

void run(const EncodeParams& p, const GradEncodeParams* grad, void* workspace, int threads) {
  if (p.N == 0) return;
  const Choice choice = choose(p, grad);
  Arena arena{static_cast<char*>(workspace), 0};
  const Layout l = layout(p, choice.certified, arena);
  int64_t M = p.F;
  if (p.mask) {
    M = 0;
    for (int64_t i = 0; i < p.F; ++i)
      if (p.mask[i]) l.ids[M++] = int32_t(i);
  }
  EncodeStats stats{};
  // Sizes come from F, as in the query; only M of the candidates are then visited.
  Plan main = plan_chunk(p, choice.second, choice.scoring, p.F, p.N, threads, arena);
  main.chunk.M = M;
  main.chunk.ids = p.mask ? l.ids : nullptr;
  int64_t redone = 0;
  for (int64_t row0 = 0; row0 < p.N; row0 += main.chunk_rows) {
    const int64_t R = std::min(main.chunk_rows, p.N - row0);
    run_rows(main, nullptr, row0, R, threads, &stats);
    main.grad.has_norms = choice.second.pruned;
    if (!choice.certified) continue;
    for (int64_t r = 0; r < R; ++r)
      if (main.chunk.redo[r]) l.redo[redone++] = int32_t(row0 + r);
  }
  if (redone) {
    arena.used = l.rest;
    Plan full = plan_chunk(p, {grad, false, 0}, Scoring::kFloat, p.F, p.N, threads, arena);
    full.chunk.M = M;
    full.chunk.ids = main.chunk.ids;
    for (int64_t at = 0; at < redone; at += full.chunk_rows)
      run_rows(full, l.redo + at, 0, std::min(full.chunk_rows, redone - at), threads, &stats);
  }
  if (p.stats) {
    p.stats->screened_rows += stats.screened_rows;
    p.stats->survivors += stats.survivors;
    p.stats->redone_rows += stats.redone_rows;
    p.stats->candidates += stats.candidates;
  }
}

}  // namespace

size_t encode_scratch(int64_t d, int64_t capacity) {
  const int64_t bytes = (d + kVectorPad) * 4 + capacity * 4 + 8 + capacity * 16;
  return size_t(round_up(bytes, 64));
}

size_t topk_encode_workspace(const EncodeParams& p, int threads) {
  return workspace_bytes(p, nullptr, threads);
}

void topk_encode(const EncodeParams& p, void* workspace, int threads) {
  run(p, nullptr, workspace, threads);
}

size_t grad_topk_encode_workspace(const GradEncodeParams& p, int threads) {
  return workspace_bytes(p.encode, &p, threads);
}

void grad_topk_encode(const GradEncodeParams& p, void* workspace, int threads) {
  run(p.encode, &p, workspace, threads);
}

}  // namespace ksae::cpu
