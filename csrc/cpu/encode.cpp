// SPDX-License-Identifier: Apache-2.0
// topk_encode, threaded part (the kernels and their mathematics: isa/encode.cpp).
//
// Rows go through in chunks that bound the workspace. Within a chunk the threads share W: each
// packs its share of a group of panels, a barrier, then each scores its own rows against the group
// while the next group's packing goes to a second buffer, so one barrier a group is enough. A
// row's buffer has one owner and latents come in ascending order for every thread count.
// Rows that screening gives up on are collected and scored again in float32.
// Tried: threads splitting F instead of rows: twice the candidate memory and a merge, no gain.
#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

constexpr int64_t kTargetBytes = int64_t(4) << 20;  // packed rows and candidates of one chunk
constexpr int64_t kSubPanelBytes = int64_t(400) << 10;  // packed weights that share L2 with rows
constexpr int64_t kGroupBytes = int64_t(8) << 20;

Scoring scoring_of(const EncodeParams& p) {
  if (!kernels().has_dot) return Scoring::kFloat;
  if (p.dtype == Dtype::kBFloat16) return Scoring::kDot;
  return p.dtype == Dtype::kFloat32 && p.screen ? Scoring::kScreen : Scoring::kFloat;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of one chunk and the sizes that follow; pointers are set where the arena has a base.
struct Plan {
  EncodeChunk chunk;
  int64_t chunk_rows;
  char* scratch;
  size_t scratch_bytes;  // a thread's
};

Plan plan(const EncodeParams& p, Scoring scoring, int64_t M, int64_t N, int threads, Arena& arena) {
  const Kernels& t = kernels();
  Plan plan{};
  EncodeChunk& c = plan.chunk;
  c.p = &p;
  c.scoring = scoring;
  c.M = M;
  const int64_t width = t.panel_width, panels = (M + width - 1) / width;
  const int64_t step_bytes = scoring == Scoring::kFloat ? 4 * p.d : 2 * round_up(p.d, 2);
  const bool screen = scoring == Scoring::kScreen;
  // Enough that refining is rare; never more than all candidates and a vector's slack.
  const int64_t wanted = screen ? std::max<int64_t>(4 * p.k + 128, 256) : p.k + std::max<int64_t>(p.k, 96);
  c.capacity = round_up(std::min(wanted, panels * width) + 2 * width, 16);
  const int64_t row_bytes = step_bytes + 8 * c.capacity;
  const int64_t unit = t.tile_rows * std::max(threads, 1);
  int64_t rows = std::max<int64_t>(kTargetBytes * std::max(threads / 2, 1) / row_bytes, unit);
  const int64_t chunks = std::max<int64_t>((N + rows - 1) / rows, 1);
  rows = round_up((N + chunks - 1) / chunks, unit);
  plan.chunk_rows = std::min(rows, round_up(std::max<int64_t>(N, 1), t.tile_rows));
  const int64_t panel_bytes = step_bytes * width;
  c.sub_panels = std::clamp<int64_t>(kSubPanelBytes / std::max<int64_t>(panel_bytes, 1), 1, 8);
  c.panels = std::max<int64_t>(c.sub_panels, threads);
  c.panels = std::min(c.panels, std::max<int64_t>(kGroupBytes / std::max<int64_t>(panel_bytes, 1), c.sub_panels));
  c.panels = std::min(c.panels, panels);

  const int64_t R = plan.chunk_rows, tiles = (R + t.tile_rows - 1) / t.tile_rows;
  c.x_pack = arena.take(tiles * t.tile_rows * step_bytes + 64);
  for (auto& w : c.w_pack) w = arena.take(c.panels * panel_bytes);
  c.bias = static_cast<float*>(arena.take(panels * width * 4));
  c.score = static_cast<float*>(arena.take(R * c.capacity * 4));
  c.index = static_cast<int32_t*>(arena.take(R * c.capacity * 4));
  c.count = static_cast<int32_t*>(arena.take(R * 4));
  c.tau = static_cast<float*>(arena.take(R * 4));
  if (screen) {
    c.bound_w = static_cast<float*>(arena.take(panels * width * 3 * 4));
    c.bound_panel = static_cast<float*>(arena.take(panels * 4 * 4));
    c.bound_x = static_cast<float*>(arena.take(R * 2 * 4));
    c.redo = static_cast<uint8_t*>(arena.take(R));
  }
  plan.scratch_bytes = encode_scratch(p.d, c.capacity);
  plan.scratch = static_cast<char*>(arena.take(plan.scratch_bytes * std::max(threads, 1)));
  return plan;
}

void run_chunk(const EncodeChunk& c, const Plan& plan, int threads, EncodeStats* stats) {
  const Kernels& t = kernels();
  const int64_t tiles = (c.R + t.tile_rows - 1) / t.tile_rows;
  const int64_t panels = (c.M + t.panel_width - 1) / t.panel_width;
  const int64_t groups = c.panels ? (panels + c.panels - 1) / c.panels : 0;
  const int team = int(std::min<int64_t>(threads, std::max<int64_t>(tiles, c.panels)));
  std::vector<EncodeStats> counters(std::max(team, 1));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int rank = team_rank(), size = team_size();
    const int64_t tile0 = tiles * rank / size, tile1 = tiles * (rank + 1) / size;
    void* scratch = plan.scratch + plan.scratch_bytes * rank;
    t.encode_pack_x(c, tile0, tile1, scratch);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = std::min(c.panels, panels - g * c.panels);
      for (int64_t panel = rank; panel < n; panel += size) t.encode_pack_w(c, g, panel);
#pragma omp barrier
      t.encode_score(c, g, tile0, tile1, rank, size, scratch);
    }
    t.encode_finish(c, tile0 * t.tile_rows, std::min(tile1 * t.tile_rows, c.R), scratch,
                    &counters[rank]);
  }
  for (const EncodeStats& s : counters) {
    stats->screened_rows += s.screened_rows;
    stats->survivors += s.survivors;
    stats->redone_rows += s.redone_rows;
  }
}

// Workspace: ids, list of rows to redo, then the plan's pieces. The redo reuses the plan's bytes.
struct Layout {
  int32_t* ids;
  int32_t* redo;
  size_t rest;  // where the plan's pieces begin
};
Layout layout(const EncodeParams& p, Arena& arena) {
  Layout l{};
  if (p.mask) l.ids = static_cast<int32_t*>(arena.take(p.F * 4));
  if (scoring_of(p) == Scoring::kScreen) l.redo = static_cast<int32_t*>(arena.take(p.N * 4));
  l.rest = arena.used;
  return l;
}

}  // namespace

size_t encode_scratch(int64_t d, int64_t capacity) {
  const int64_t bytes = (d + kVectorPad) * 4 + (capacity + kVectorPad) * 4 + capacity * 4 + 8 + capacity * 16;
  return size_t(round_up(bytes, 64));
}

size_t topk_encode_workspace(const EncodeParams& p, int threads) {
  Arena arena{nullptr, 0};
  const Layout l = layout(p, arena);
  plan(p, scoring_of(p), p.F, p.N, threads, arena);
  size_t bytes = arena.used;
  if (l.redo || scoring_of(p) == Scoring::kScreen) {
    arena.used = l.rest;
    plan(p, Scoring::kFloat, p.F, p.N, threads, arena);
    bytes = std::max(bytes, arena.used);
  }
  return bytes;
}

void topk_encode(const EncodeParams& p, void* workspace, int threads) {
  if (p.N == 0) return;
  Arena arena{static_cast<char*>(workspace), 0};
  const Layout l = layout(p, arena);
  int64_t M = p.F;
  if (p.mask) {
    M = 0;
    for (int64_t i = 0; i < p.F; ++i)
      if (p.mask[i]) l.ids[M++] = int32_t(i);
  }
  EncodeStats stats{};
  const Scoring scoring = scoring_of(p);
  // Sizes come from F, as in the query; only M of the candidates are then visited.
  Plan main = plan(p, scoring, p.F, p.N, threads, arena);
  main.chunk.M = M;
  main.chunk.ids = p.mask ? l.ids : nullptr;
  int64_t redone = 0;
  for (int64_t row0 = 0; row0 < p.N; row0 += main.chunk_rows) {
    EncodeChunk c = main.chunk;
    c.row0 = row0;
    c.R = std::min(main.chunk_rows, p.N - row0);
    run_chunk(c, main, threads, &stats);
    if (scoring != Scoring::kScreen) continue;
    for (int64_t r = 0; r < c.R; ++r)
      if (c.redo[r]) l.redo[redone++] = int32_t(row0 + r);
  }
  if (redone) {
    arena.used = l.rest;
    Plan full = plan(p, Scoring::kFloat, p.F, p.N, threads, arena);
    full.chunk.M = M;
    full.chunk.ids = main.chunk.ids;
    for (int64_t at = 0; at < redone; at += full.chunk_rows) {
      EncodeChunk c = full.chunk;
      c.rows = l.redo + at;
      c.R = std::min(full.chunk_rows, redone - at);
      run_chunk(c, full, threads, &stats);
    }
  }
  if (p.stats) {
    p.stats->screened_rows += stats.screened_rows;
    p.stats->survivors += stats.survivors;
    p.stats->redone_rows += stats.redone_rows;
  }
}

}  // namespace ksae::cpu
