// SPDX-License-Identifier: Apache-2.0
// topk_encode, threaded part (the kernels and their mathematics: isa/encode.cpp).
//
// Rows go through in chunks that bound the workspace; within a chunk each thread owns a share of
// the rows and the threads share W. Groups of panels pass through a ring of packed copies: whoever
// comes first packs a panel, and who has to wait packs ahead. Threads may drift apart by the length
// of the ring, so a thread that loses its core for a while does not stop the others at once.
// Each row meets the latents in ascending order, whatever the number of threads.
// Rows that screening gives up on are collected and scored again in float32.
// Tried: a barrier a group: several times slower where other work shares the cores, for a thread
// that spins keeps the one it waits for from running.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

constexpr int64_t kChunkBytes = int64_t(2500) << 10;  // packed rows and candidates of one chunk
constexpr int64_t kGroupBytes = int64_t(200) << 10;   // packed weights that share L2 with the rows
constexpr int64_t kRingBytes = int64_t(800) << 10;
constexpr int kMaxSlots = 8;

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
  const int64_t wanted =
      screen ? std::max<int64_t>(4 * p.k + 128, 256) : p.k + std::max<int64_t>(p.k, 96);
  c.capacity = round_up(std::min(wanted, panels * width) + 2 * width, 16);
  const int64_t row_bytes = step_bytes + (screen ? 12 : 8) * c.capacity;
  const int64_t unit = t.tile_rows * std::max(threads, 1);
  int64_t rows = std::max<int64_t>(kChunkBytes * std::max(threads / 2, 1) / row_bytes, unit);
  const int64_t chunks = std::max<int64_t>((N + rows - 1) / rows, 1);
  rows = round_up((N + chunks - 1) / chunks, unit);
  plan.chunk_rows = std::min(rows, round_up(std::max<int64_t>(N, 1), t.tile_rows));
  const int64_t panel_bytes = step_bytes * width;
  const int64_t group_bytes = std::max<int64_t>(panel_bytes, 1);
  c.panels = std::clamp<int64_t>(kGroupBytes / group_bytes, 1, std::min<int64_t>(panels, 4));
  c.slots = int(std::clamp<int64_t>(kRingBytes / (group_bytes * c.panels), 2, kMaxSlots));

  const int64_t R = plan.chunk_rows, tiles = (R + t.tile_rows - 1) / t.tile_rows;
  c.x_pack = arena.take(tiles * t.tile_rows * step_bytes + 64);
  c.w_pack = arena.take(c.slots * c.panels * panel_bytes);
  c.bias = static_cast<float*>(arena.take(panels * width * 4));
  c.score = static_cast<float*>(arena.take(R * c.capacity * 4));
  c.index = static_cast<int32_t*>(arena.take(R * c.capacity * 4));
  c.count = static_cast<int32_t*>(arena.take(R * 4));
  c.tau = static_cast<float*>(arena.take(R * 4));
  if (screen) {
    c.bound_w = static_cast<float*>(arena.take(panels * width * 3 * 4));
    c.bound_panel = static_cast<float*>(arena.take(panels * 4 * 4));
    c.bound_x = static_cast<float*>(arena.take(R * 2 * 4));
    c.margin = static_cast<float*>(arena.take(R * 4));
    c.redo = static_cast<uint8_t*>(arena.take(R));
    c.pairs = static_cast<uint32_t*>(arena.take(R * c.capacity * 4));
  }
  plan.scratch_bytes = encode_scratch(p.d, c.capacity);
  plan.scratch = static_cast<char*>(arena.take(plan.scratch_bytes * std::max(threads, 1)));
  return plan;
}

// The ring of packed groups. A panel is packed by the thread that claims it; a slot is free again
// when every thread has finished the group that was in it.
class Ring {
 public:
  Ring(const EncodeChunk& c, int64_t panels, int team)
      : c_(c),
        panels_(panels),
        groups_((panels + c.panels - 1) / c.panels),
        team_(team),
        claimed_(new std::atomic<uint8_t>[panels]()),
        ready_(new std::atomic<int32_t>[groups_]()),
        finished_(new Progress[team]()) {}

  int64_t groups() const { return groups_; }

  // Returns when group g is packed, having packed what nobody else had claimed.
  void prepare(int64_t g, int rank) {
    while (!free(g)) rest();
    while (pack_one(g, rank)) {
    }
    while (ready_[g].load(std::memory_order_acquire) < size(g)) {
      bool packed = false;
      for (int64_t next = g + 1; next < std::min(g + c_.slots, groups_) && !packed; ++next)
        packed = free(next) && pack_one(next, rank);
      if (!packed) rest();
    }
  }
  void finish(int64_t g, int rank) {
    finished_[rank].groups.store(g + 1, std::memory_order_release);
  }

 private:
  struct alignas(64) Progress {
    std::atomic<int64_t> groups{0};
  };

  int64_t size(int64_t g) const { return std::min(c_.panels, panels_ - g * c_.panels); }
  bool free(int64_t g) const {
    for (int t = 0; t < team_; ++t)
      if (finished_[t].groups.load(std::memory_order_acquire) <= g - c_.slots) return false;
    return true;
  }
  bool pack_one(int64_t g, int rank) {
    for (int64_t i = 0, n = size(g); i < n; ++i) {
      const int64_t panel = (i + rank) % n;
      auto& claim = claimed_[g * c_.panels + panel];
      if (claim.load(std::memory_order_relaxed) || claim.exchange(1)) continue;
      kernels().encode_pack_w(c_, g, panel);
      ready_[g].fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }
  // The thread waited for may need this core.
  static void rest() { std::this_thread::yield(); }

  const EncodeChunk& c_;
  const int64_t panels_, groups_;
  const int team_;
  std::unique_ptr<std::atomic<uint8_t>[]> claimed_;
  std::unique_ptr<std::atomic<int32_t>[]> ready_;
  std::unique_ptr<Progress[]> finished_;
};

void run_chunk(const EncodeChunk& c, const Plan& plan, int threads, EncodeStats* stats) {
  const Kernels& t = kernels();
  const int64_t tiles = (c.R + t.tile_rows - 1) / t.tile_rows;
  const int64_t panels = (c.M + t.panel_width - 1) / t.panel_width;
  const int team = int(std::clamp<int64_t>(std::max(tiles, c.panels), 1, std::max(threads, 1)));
  std::vector<EncodeStats> counters(team);
  std::unique_ptr<Ring> ring;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int rank = team_rank(), size = team_size();
#pragma omp single
    ring = std::make_unique<Ring>(c, panels, size);
    const int64_t tile0 = tiles * rank / size, tile1 = tiles * (rank + 1) / size;
    void* scratch = plan.scratch + plan.scratch_bytes * rank;
    t.encode_pack_x(c, tile0, tile1, scratch);
    for (int64_t g = 0; g < ring->groups(); ++g) {
      ring->prepare(g, rank);
      t.encode_score(c, g, tile0, tile1, rank, size, scratch);
      ring->finish(g, rank);
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
  const int64_t bytes = (d + kVectorPad) * 4 + capacity * 4 + 8 + capacity * 16;
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
