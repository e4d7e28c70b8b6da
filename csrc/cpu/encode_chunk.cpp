// SPDX-License-Identifier: Apache-2.0
// A chunk of rows on its way through an encoder: its sizes and memory, the ring of packed weights,
// the threads.
//
// Rows go through in chunks that bound the workspace; within a chunk each thread owns a share of
// the rows and the threads share W. Groups of panels pass through a ring of packed copies: whoever
// comes first packs a panel, and who has to wait packs ahead. Threads may drift apart by the length
// of the ring, so a thread that loses its core for a while does not stop the others at once.
// Each row meets the latents in ascending order, whatever the number of threads.
// Tried: a barrier a group: several times slower where other work shares the cores, for a thread
// that spins keeps the one it waits for from running.
#include "encode_chunk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "parallel.h"

namespace ksae::cpu {
namespace {

// Packed rows and candidates of one chunk: a share of the N x F scores that are not stored, for W
// is packed once a chunk (k=32, F=24576, N=2048, d=768: 4 MB take 0.91 times as long as 2.5 MB).
constexpr int64_t kChunkBytes = int64_t(2500) << 10, kMostChunkBytes = int64_t(32) << 20;
constexpr int64_t kChunkShare = 32;
constexpr int64_t kGroupBytes = int64_t(200) << 10;  // packed weights that share L2 with the rows
constexpr int64_t kRingBytes = int64_t(400) << 10;
constexpr int kMaxSlots = 8;

// The chunk of the second product, which shares rows, latents and candidates with the first.
void plan_second(Plan& plan, const Second& second, Arena& arena) {
  const GradEncodeParams& p = *second.p;
  const Kernels& t = kernels();
  EncodeParams& params = plan.second;
  params = p.encode;
  params.d = p.d_out;
  params.x = p.grad;
  params.W_enc = p.W_dec;
  params.b_enc = params.b_dec = nullptr;
  GradChunk& g = plan.grad;
  EncodeChunk& a = g.a;
  g.p = &p;
  g.pruned = second.pruned;
  a = plan.chunk;
  const int64_t R = plan.chunk_rows, width = t.panel_width,
                tiles = (R + t.tile_rows - 1) / t.tile_rows;
  const int64_t panels = (a.M + width - 1) / width;
  const bool screen = a.scoring == Scoring::kScreen;
  const int64_t step_bytes = a.scoring == Scoring::kFloat ? 4 * p.d_out : 2 * round_up(p.d_out, 2);
  a.score = static_cast<float*>(arena.take(R * a.capacity * 4));
  a.bias = static_cast<float*>(arena.take(panels * width * 4));
  g.plain = static_cast<uint8_t*>(arena.take(R));
  if (g.pruned) {
    g.norm_g = static_cast<float*>(arena.take(R * 4));
    g.norm_w = static_cast<float*>(arena.take(panels * width * 4));
    return;
  }
  a.x_pack = arena.take(tiles * t.tile_rows * step_bytes + 64);
  a.w_pack = arena.take(a.slots * a.panels * step_bytes * width);
  if (screen) {
    a.bound_w = static_cast<float*>(arena.take(panels * width * 3 * 4));
    a.bound_panel = static_cast<float*>(arena.take(panels * 4 * 4));
    a.bound_x = static_cast<float*>(arena.take(R * 2 * 4));
    a.margin = static_cast<float*>(arena.take(R * 4));
  }
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
      (c_.grad ? kernels().grad_encode : kernels().encode).pack_w(c_, g, panel);
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

}  // namespace

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Scoring scoring_of(const EncodeParams& p) {
  if (!kernels().has_dot) return Scoring::kFloat;
  if (p.dtype == Dtype::kBFloat16) return Scoring::kDot;
  return p.dtype == Dtype::kFloat32 && p.screen ? Scoring::kScreen : Scoring::kFloat;
}
Plan plan_chunk(const EncodeParams& p, const Second& second, Scoring scoring, int64_t M, int64_t N,
                int threads, Arena& arena) {
  const Kernels& t = kernels();
  Plan plan{};
  EncodeChunk& c = plan.chunk;
  c.p = &p;
  c.scoring = scoring;
  c.M = M;
  c.gate = std::nanf("");
  const int64_t width = t.panel_width, panels = (M + width - 1) / width;
  const int64_t step_bytes = scoring == Scoring::kFloat ? 4 * p.d : 2 * round_up(p.d, 2);
  const bool screen = scoring == Scoring::kScreen;
  // Enough that refining is rare; never more than all candidates and a vector's slack.
  int64_t wanted =
      screen ? std::max<int64_t>(4 * p.k + 128, 256) : p.k + std::max<int64_t>(p.k, 96);
  const bool certified = screen || second.pruned;
  if (second.p && certified) wanted = 8 * p.k + 256 + 2 * second.candidates;
  c.capacity = round_up(std::min(wanted, panels * width) + 2 * width, 16);
  // The candidates of a pruned row are many, but few of them are touched at a time.
  const int64_t touched = second.pruned ? std::min(c.capacity, 4 * p.k + 128) : c.capacity;
  // The list of survivors lies over the packed rows, which are done with by then, if it fits.
  c.pair_stride = std::max(c.capacity, step_bytes / 4);
  const bool over = c.pair_stride > c.capacity;
  const int64_t row_bytes = step_bytes + (screen && !over ? 12 : 8) * touched;
  const int64_t unit = t.tile_rows * std::max(threads, 1);
  int64_t bytes = std::max(kChunkBytes * std::max(threads / 2, 1),
                           std::min(N * p.F * 4 / kChunkShare, kMostChunkBytes));
  int64_t rows = std::max(bytes / row_bytes, unit);
  const int64_t chunks = std::max<int64_t>((N + rows - 1) / rows, 1);
  rows = round_up((N + chunks - 1) / chunks, unit);
  plan.chunk_rows = std::min(rows, round_up(std::max<int64_t>(N, 1), t.tile_rows));
  const int64_t panel_bytes = step_bytes * width;
  const int64_t group_bytes =
      std::max<int64_t>(second.p && !second.pruned ? 2 * panel_bytes : panel_bytes, 1);
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
  }
  c.redo = static_cast<uint8_t*>(arena.take(R));
  if (certified) {
    c.pairs = static_cast<uint32_t*>(over ? c.x_pack : arena.take(R * c.capacity * 4));
  }
  if (second.p) plan_second(plan, second, arena);
  plan.scratch_bytes = encode_scratch(second.p ? std::max(p.d, second.p->d_out) : p.d, c.capacity);
  plan.scratch = static_cast<char*>(arena.take(plan.scratch_bytes * std::max(threads, 1)));
  return plan;
}

void take_spill(EncodeChunk& c, int64_t blocks, Arena& arena) {
  Spill& s = c.spill;
  s.room = c.capacity;
  s.blocks = int32_t(blocks);
  s.used = static_cast<int32_t*>(arena.take(4));
  s.row = static_cast<int32_t*>(arena.take(blocks * 4));
  s.count = static_cast<int32_t*>(arena.take(blocks * 4));
  s.score = static_cast<float*>(arena.take(blocks * s.room * 4));
  s.index = static_cast<int32_t*>(arena.take(blocks * s.room * 4));
}

void run_chunk(const EncodeChunk& c, const Plan& plan, int threads, EncodeStats* stats) {
  const Kernels& t = kernels();
  const int64_t tiles = (c.R + t.tile_rows - 1) / t.tile_rows;
  const int64_t panels = (c.M + t.panel_width - 1) / t.panel_width;
  const int team = int(std::clamp<int64_t>(std::max(tiles, c.panels), 1, std::max(threads, 1)));
  const EncodeSteps& steps = c.grad ? t.grad_encode : t.encode;
  std::vector<EncodeStats> counters(team);
  std::unique_ptr<Ring> ring;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int rank = team_rank(), size = team_size();
#pragma omp single
    ring = std::make_unique<Ring>(c, panels, size);
    const int64_t tile0 = tiles * rank / size, tile1 = tiles * (rank + 1) / size;
    void* scratch = plan.scratch + plan.scratch_bytes * rank;
    steps.pack_x(c, tile0, tile1, scratch);
    for (int64_t g = 0; g < ring->groups(); ++g) {
      ring->prepare(g, rank);
      steps.score(c, g, tile0, tile1, rank, size, scratch);
      ring->finish(g, rank);
    }
    if (!c.unfinished)
      steps.finish(c, tile0 * t.tile_rows, std::min(tile1 * t.tile_rows, c.R), scratch,
                   &counters[rank]);
  }
  for (const EncodeStats& s : counters) {
    stats->screened_rows += s.screened_rows;
    stats->survivors += s.survivors;
    stats->redone_rows += s.redone_rows;
    stats->candidates += s.candidates;
  }
}

}  // namespace ksae::cpu
