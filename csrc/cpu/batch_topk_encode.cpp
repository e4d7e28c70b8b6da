// SPDX-License-Identifier: Apache-2.0
// batch_topk_encode, threaded part: one threshold for the whole batch, guessed from a sample of
// rows and verified by counting (isa/batch_topk_encode.cpp).
//
// Chunks of rows are scored as in topk_encode, behind a gate that stays where it is; what passes is
// collected in a list of a few N k entries. A row with many candidates spills into blocks that the
// chunk shares; when these run out, it is scored again with room for all. A full list is cut to
// what can still win, which raises the gate. A gate that proves too high is lowered, and the batch
// is scored again. Screened ties that do not fit into the list are decided in float32 for the whole
// batch: scores are exact there, the list is cut to N k entries in order, and later equal scores
// lose.
#include <algorithm>
#include <cmath>
#include <vector>

#include "encode_chunk.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

constexpr int64_t kSampleShare = 32;  // a sample is this part of the rows, in whole tiles
constexpr int64_t kLeastTiles = 4, kMostTiles = 32;
constexpr int kRestarts = 8;  // of chunks, where a rising gate may leave fewer rows to score again

int64_t sample_rows(const EncodeParams& p) {
  const int64_t tile = kernels().tile_rows;
  const int64_t least = kLeastTiles * std::max<int64_t>(14 / tile, 1);
  const int64_t tiles = std::clamp(p.N / (kSampleShare * tile), least, kMostTiles);
  return tiles * tile < p.N ? tiles * tile : 0;  // 0: none, all rows are scored with full room
}

struct Job {
  const BatchEncodeParams& p;
  int threads;
  Scoring scoring;
  EncodeParams narrow, roomy, sample;  // a row's room follows from k
  Plan main, wide;
  Plan first;  // of the sample; it lies over the other two
  BatchList list;
  int32_t* rows;  // of the sample, or to be scored with full room
  int64_t wanted;
  size_t bytes;

  Job(const BatchEncodeParams& params, Scoring how, void* workspace, int n_threads)
      : p(params), threads(n_threads), scoring(how), list{}, wanted(p.encode.N * p.encode.k) {
    Arena arena{static_cast<char*>(workspace), 0};
    const EncodeParams& e = p.encode;
    const int64_t n_sample = sample_rows(e), tile = kernels().tile_rows;
    narrow = roomy = sample = e;
    narrow.k = std::min(e.F, e.k + e.k / 2);
    roomy.k = e.F;
    sample.k = std::min(e.F, 4 * e.k);
    const size_t start = (arena.take(0), arena.used);
    first = plan_chunk(sample, {}, how, e.F, n_sample, threads, arena);
    const size_t after_sample = arena.used;
    arena.used = start;
    main = plan_chunk(narrow, {}, how, e.F, e.N, threads, arena);
    const Scoring full = how == Scoring::kScreen ? Scoring::kFloat : how;
    wide = plan_chunk(roomy, {}, full, e.F, tile, 1, arena);
    wide.scratch_bytes = 0;  // serial steps that need it do not run
    // as many candidates as are wanted fit
    const int64_t blocks = std::min<int64_t>(wanted / main.chunk.capacity, 1 << 20) + 1;
    take_spill(main.chunk, blocks, arena);
    arena.used = std::max(arena.used, after_sample);
    list.capacity = std::max({wanted * 5 / 2, wanted + e.F, n_sample * first.chunk.capacity});
    list.score = static_cast<float*>(arena.take(list.capacity * 4));
    list.latent = static_cast<int32_t*>(arena.take(list.capacity * 4));
    list.row = static_cast<int32_t*>(arena.take(list.capacity * 4));
    list.keys = static_cast<uint32_t*>(arena.take(list.capacity * 4));
    list.bound_x = static_cast<float*>(arena.take(e.N * 2 * 4));
    list.exact = static_cast<uint8_t*>(arena.take(e.N));
    rows = static_cast<int32_t*>(arena.take(std::max(n_sample, tile) * 4));
    bytes = arena.used;
  }
};

// Rows [row0, row0 + R), or those of a list, behind a gate or, for a sample, each row behind its
// own.
void score(Plan& plan, const int32_t* rows, int64_t row0, int64_t R, int threads, float gate,
           bool fixed) {
  EncodeChunk& c = plan.chunk;
  c.rows = rows;
  c.row0 = row0;
  c.R = R;
  c.ids = nullptr;
  c.gate = gate;
  c.fixed = fixed;
  c.unfinished = true;
  if (c.spill.used) *c.spill.used = 0;
  EncodeStats unused{};
  run_chunk(c, plan, threads, &unused);
}

// A gate that about 1.3 times as many scores as are wanted pass by their lower bounds; NaN, which
// all do, without rows to guess from. `more`: of a first guess that was too high.
float guess(Job& j, bool more) {
  const EncodeParams& e = j.p.encode;
  const int64_t S = sample_rows(e);
  if (S == 0) return std::nanf("");
  for (int64_t i = 0; i < S; ++i) j.rows[i] = int32_t(i * e.N / S);
  score(j.first, j.rows, 0, S, j.threads, std::nanf(""), false);
  j.list.n = 0;
  const EncodeChunk& c = j.first.chunk;
  for (int64_t r = 0; r < S; ++r)
    if (j.scoring != Scoring::kScreen || !c.redo[r]) kernels().batch_encode.sample(c, r, j.list);
  if (j.list.n == 0) return std::nanf("");
  const int64_t at = std::min((more ? 26 : 13) * S * e.k / 10, j.list.n);
  return std::nextafter(kernels().batch_encode.threshold(j.list, at), -INFINITY);
}

// The next rows of the chunk, from r on, that were not scored to the end: with full room.
int64_t score_wide(Job& j, int64_t r, float gate) {
  const EncodeChunk& c = j.main.chunk;
  int64_t n = 0;
  for (; r < c.R && n < j.wide.chunk_rows; ++r)
    if (c.redo[r]) j.rows[n++] = int32_t(c.row0 + r);
  for (int64_t i = 0; i < n; ++i) j.list.exact[j.rows[i]] = 1;
  score(j.wide, j.rows, 0, n, j.threads, gate, true);
  return n;
}

// Blocks of the chunk's spill in the order of their rows.
std::vector<int32_t> spilled(const EncodeChunk& c) {
  std::vector<int32_t> blocks(std::min(*c.spill.used, c.spill.blocks));
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = int32_t(i);
  std::stable_sort(blocks.begin(), blocks.end(),
                   [&c](int32_t a, int32_t b) { return c.spill.row[a] < c.spill.row[b]; });
  return blocks;
}

int64_t rows_left(const EncodeChunk& c, int64_t r) {
  return std::count(c.redo + r, c.redo + c.R, uint8_t(1));
}

// What is collected of one batch.
struct Collector {
  Job& j;
  float gate;
  EncodeChunk all;  // with the bounds of all rows
  int restarts = kRestarts;

  Collector(Job& job, float first_gate) : j(job), gate(first_gate), all(job.main.chunk) {
    all.bound_x = j.list.bound_x;
  }

  // False: there is no room.
  bool add(const EncodeChunk& c, int64_t r, const float* score, const int32_t* index, int64_t n) {
    const BatchSteps& steps = kernels().batch_encode;
    if (j.list.n + n > j.list.capacity) {
      const float least = j.scoring == Scoring::kScreen
                              ? std::nextafter(steps.prune(all, j.list, j.wanted), -INFINITY)
                              : steps.keep(j.list, j.wanted);
      if (!(gate >= least)) gate = least;
      if (j.list.n + n > j.list.capacity) return false;
    }
    steps.collect(c, r, score, index, n, gate, j.list);
    return true;
  }
  bool add_row(const EncodeChunk& c, int64_t r) {
    return add(c, r, c.score + r * c.capacity, c.index + r * c.capacity, c.count[r]);
  }

  void score_chunk(int64_t row0, int64_t R) {
    EncodeChunk& c = j.main.chunk;
    c.bound_x = j.list.bound_x + 2 * row0;
    if (!std::isnan(gate)) return score(j.main, nullptr, row0, R, j.threads, gate, true);
    c.rows = nullptr;
    c.row0 = row0;
    c.R = R;
    *c.spill.used = 0;
    std::fill(c.redo, c.redo + R, uint8_t(1));
  }

  // Adds the rows of a chunk that begins at row0; returns how many, -1: there is no room.
  int64_t add_chunk(int64_t row0) {
    const EncodeChunk& c = j.main.chunk;
    const int64_t R = std::min(j.main.chunk_rows, j.p.encode.N - row0);
    const float scored = gate;
    score_chunk(row0, R);
    const std::vector<int32_t> blocks = spilled(c);
    auto block = blocks.begin();
    for (int64_t r = 0, next = 0, n_wide = 0; r < R; ++r) {
      const bool wide = c.redo[r];
      if (wide && next == n_wide) {
        // A gate that has risen since may leave fewer rows without room.
        const bool risen = !std::isnan(gate) && gate != scored;
        if (risen && rows_left(c, r) > j.wide.chunk_rows && restarts-- > 0) return r;
        n_wide = score_wide(j, r, gate);
        next = 0;
      }
      for (; block != blocks.end() && c.spill.row[*block] == r; ++block) {
        const int64_t at = *block * c.spill.room;
        if (wide) continue;
        if (!add(c, r, c.spill.score + at, c.spill.index + at, c.spill.count[*block])) return -1;
      }
      if (!(wide ? add_row(j.wide.chunk, next++) : add_row(c, r))) return -1;
    }
    return R;
  }
};

// All scores above the gate are in the list; false: there is no room for what may be among the
// best.
bool collect(Job& j, float gate) {
  j.list.n = 0;
  std::fill(j.list.exact, j.list.exact + j.p.encode.N, uint8_t(0));
  Collector collector(j, gate);
  for (int64_t row0 = 0; row0 < j.p.encode.N;) {
    const int64_t rows = collector.add_chunk(row0);
    if (rows < 0) return false;
    row0 += rows;
  }
  return true;
}

// The places of the list's screened scores in the order of their latents, to within a bucket;
// returns their number.
int64_t order_by_latent(BatchList& list, int64_t F) {
  constexpr int kBuckets = 4096;
  int shift = 0;
  while ((F >> shift) >= kBuckets) ++shift;
  uint32_t first[kBuckets + 1] = {};
  const auto each = [&list](auto f) {
    for (int64_t i = 0; i < list.n; ++i)
      if (!list.exact[list.row[i]]) f(i);
  };
  each([&](int64_t i) { ++first[(list.latent[i] >> shift) + 1]; });
  for (int b = 0; b < kBuckets; ++b) first[b + 1] += first[b];
  const int64_t n = first[kBuckets];
  each([&](int64_t i) { list.keys[first[list.latent[i] >> shift]++] = uint32_t(i); });
  return n;
}

void rescore(Job& j) {
  const EncodeChunk& c = j.main.chunk;
  constexpr int64_t kBlock = 4096;
  parallel_blocks(
      order_by_latent(j.list, c.p->F), kBlock, j.threads,
      [&](int64_t from, int64_t to, int) { kernels().batch_encode.rescore(c, j.list, from, to); });
}

// Leaves the result in the list; false: what may tie does not fit, and screening cannot tell.
bool select(Job& j, EncodeStats& stats) {
  const EncodeParams& e = j.p.encode;
  const BatchSteps& steps = kernels().batch_encode;
  const bool screen = j.scoring == Scoring::kScreen;
  EncodeChunk all = j.main.chunk;
  all.bound_x = j.list.bound_x;
  float gate = guess(j, false);
  for (int attempt = 0;; ++attempt) {
    if (!collect(j, gate)) return false;
    if (j.list.n >= j.wanted) {
      const float least =
          screen ? steps.prune(all, j.list, j.wanted) : steps.keep(j.list, j.wanted);
      if (!(least <= gate)) break;
      gate = std::nextafter(least, -INFINITY);
    } else {
      const float lower = attempt == 0 ? guess(j, true) : std::nanf("");
      gate = lower < gate ? lower : std::nanf("");
    }
  }
  if (!screen) return true;
  stats.screened_rows += e.N;
  stats.redone_rows += std::count(j.list.exact, j.list.exact + e.N, uint8_t(1));
  stats.survivors += j.list.n;
  rescore(j);
  steps.keep(j.list, j.wanted);
  return true;
}

}  // namespace

size_t batch_topk_encode_workspace(const BatchEncodeParams& p, int threads) {
  const Scoring scoring = scoring_of(p.encode);
  const size_t bytes = Job(p, scoring, nullptr, threads).bytes;
  if (scoring != Scoring::kScreen) return bytes;
  return std::max(bytes, Job(p, Scoring::kFloat, nullptr, threads).bytes);
}

void batch_topk_encode(const BatchEncodeParams& p, void* workspace, int threads) {
  EncodeStats stats{};
  Job job(p, scoring_of(p.encode), workspace, threads);
  if (p.encode.N == 0) {
    kernels().batch_encode.write(job.list, p);
    return;
  }
  if (select(job, stats)) {
    kernels().batch_encode.write(job.list, p);
  } else {
    stats = {p.encode.N, 0, p.encode.N, 0};
    Job exact(p, Scoring::kFloat, workspace, threads);
    select(exact, stats);
    kernels().batch_encode.write(exact.list, p);
  }
  if (p.encode.stats) *p.encode.stats = stats;
}

}  // namespace ksae::cpu
