// SPDX-License-Identifier: Apache-2.0
// topk_encode and grad_topk_encode, threaded part (the kernels and their mathematics:
// isa/topk_encode.cpp, isa/grad_topk_encode.cpp).
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
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "isa.h"
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

// Pruning pays up to this many expected candidates a row (see bench/grad_encode.py): in float32 on
// two threads of a Zen 5, d=768, F=24576, k=32, it took 1.5 times plain topk_encode at 450 and 2.1
// to 2.2 times at 1480, the dual product 2.1 times.
constexpr int64_t kPrunedCandidates = 1000;

Scoring scoring_of(const EncodeParams& p) {
  if (!kernels().has_dot) return Scoring::kFloat;
  if (p.dtype == Dtype::kBFloat16) return Scoring::kDot;
  return p.dtype == Dtype::kFloat32 && p.screen ? Scoring::kScreen : Scoring::kFloat;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// Rows of one chunk and the sizes that follow; pointers are set where the arena has a base.
struct Plan {
  EncodeChunk chunk;
  GradChunk grad;
  EncodeParams second;  // of the product grad @ W_dec.T
  int64_t chunk_rows;
  char* scratch;
  size_t scratch_bytes;  // a thread's
};

// How grad_topk_encode goes about its second product.
struct Second {
  const GradEncodeParams* p;  // null: topk_encode
  bool pruned;
  int64_t candidates;  // pruned: expected a row
};

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

Plan plan(const EncodeParams& p, const Second& second, Scoring scoring, int64_t M, int64_t N,
          int threads, Arena& arena) {
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
  if (certified) {
    c.redo = static_cast<uint8_t*>(arena.take(R));
    c.pairs = static_cast<uint32_t*>(over ? c.x_pack : arena.take(R * c.capacity * 4));
  }
  if (second.p) plan_second(plan, second, arena);
  plan.scratch_bytes = encode_scratch(second.p ? std::max(p.d, second.p->d_out) : p.d, c.capacity);
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
  plan(p, choice.second, choice.scoring, p.F, p.N, threads, arena);
  size_t bytes = arena.used;
  if (choice.certified) {
    arena.used = l.rest;
    plan(p, {grad, false, 0}, Scoring::kFloat, p.F, p.N, threads, arena);
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
  Plan main = plan(p, choice.second, choice.scoring, p.F, p.N, threads, arena);
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
    Plan full = plan(p, {grad, false, 0}, Scoring::kFloat, p.F, p.N, threads, arena);
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
