// SPDX-License-Identifier: Apache-2.0
// topk_encode, serial parts: pack (topk_encode_pack.cpp), score a tile of rows x latents, gate it
// while it is in registers, select. The N x F scores are never stored.
//
// Scores: a register tile of kTileRows x kPanel; both operands packed so that the loop over d reads
// them in sequence. A score is one chain over d in order, whatever tile or chunk it sits in, so its
// bits depend on its row and latent alone (the rescoring below repeats that chain).
// Cost a row: 2 F d flops. Bytes: W once per chunk of rows (packed on the fly), the packed rows
// from L2, candidates in L1.
//
// Certified screening (float32, BF16 dot instructions). With w^, x^ rounded to bf16 and
// g = (d + 16) 2^-23 bounding either accumulation (its rounding is at most half of that),
//   |s - s^| <= |w - w^| |x| (1 + g) + |w^| (|x - x^| + g |x^| + g |x|) + 2^-20 |b| + d 2^-124 = m.
// tau = the k-th largest s^ - m so far bounds the k-th score from below; s^ + m <= tau loses. What
// remains (about 2 k a row) is rescored by the float32 chain: the result is the float32 result. A
// row that keeps too many, or whose scores might overflow, is marked and scored in full.
// Norms are computed in float32 and rounded up; a floor of d 2^-126 under each square sum covers
// squares lost to underflow.
#include "topk_encode.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

// kScreen: keeps what may still win; returns tau. With too many left the row is marked.
float screen_refine(const EncodeChunk& c, int64_t r, uint32_t* keys) {
  float* score = c.score + r * c.capacity;
  int32_t* index = c.index + r * c.capacity;
  const int64_t n = c.count[r], k = c.p->k;
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score[i] - margin(c, r, index[i]));
  const float tau = order_score(kth_key(keys, n, k));
  int64_t out = 0;
  for (int64_t i = 0; i < n; ++i) {
    // Equal stays: it may tie with the k-th score and have the smaller index.
    if (!(score[i] + margin(c, r, index[i]) < tau)) {
      score[out] = score[i];
      index[out++] = index[i];
    }
  }
  c.count[r] = int32_t(out);
  return tau;
}

// The same with the largest margin that the row has met for every candidate: looser, but without a
// look at each one's bound.
float coarse_refine(const EncodeChunk& c, int64_t r, uint32_t* keys) {
  float* score = c.score + r * c.capacity;
  int32_t* index = c.index + r * c.capacity;
  const int64_t n = c.count[r];
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(score[i]);
  const float margin = c.margin[r], tau = order_score(kth_key(keys, n, c.p->k)) - margin;
  c.count[r] = int32_t(keep_from(score, index, n, tau - margin));
  return tau;
}

// Empties the buffer of row r into a block of the chunk's spill; false: none is left.
bool spill(const EncodeChunk& c, int64_t r) {
  if (c.spill.blocks == 0) return false;
  const int32_t block = __atomic_fetch_add(c.spill.used, 1, __ATOMIC_RELAXED);
  if (block >= c.spill.blocks) return false;
  const int64_t n = c.count[r], at = block * c.spill.room;
  __builtin_memcpy(c.spill.score + at, c.score + r * c.capacity, size_t(n) * 4);
  __builtin_memcpy(c.spill.index + at, c.index + r * c.capacity, size_t(n) * 4);
  c.spill.row[block] = int32_t(r);
  c.spill.count[block] = int32_t(n);
  c.count[r] = 0;
  return true;
}

template <Scoring kScoring>
void append(const EncodeChunk& c, int64_t r, int64_t m0, uint32_t hits, const float* tile,
            uint32_t* keys) {
  const int64_t full = c.capacity - kPanel - kWidth;  // room for a panel and a whole-vector store
  if (c.count[r] > full) {
    if (c.fixed && !spill(c, r)) {
      c.redo[r] = 1;
      c.tau[r] = __builtin_inff();
      return;
    }
    if (c.fixed) {
    } else if constexpr (kScoring == Scoring::kScreen) {
      c.tau[r] = coarse_refine(c, r, keys);
      if (c.count[r] > full - c.p->k / 2) c.tau[r] = screen_refine(c, r, keys);
      if (c.count[r] > full - c.p->k / 2) c.redo[r] = 1;
      if (c.redo[r]) return;
    } else {
      c.tau[r] =
          refine(c.score + r * c.capacity, c.index + r * c.capacity, c.count[r], c.p->k, keys);
      c.count[r] = int32_t(c.p->k);
    }
  }
  float* score = c.score + r * c.capacity;
  int32_t* index = c.index + r * c.capacity;
  int32_t n = c.count[r];
  if (__builtin_popcount(hits) > 4) {
    constexpr uint32_t kHalf = (1u << kWidth) - 1;
    compress_iota(index + n, hits & kHalf, int32_t(m0));
    n += compress(score + n, hits & kHalf, load(tile));
    compress_iota(index + n, hits >> kWidth, int32_t(m0) + kWidth);
    n += compress(score + n, hits >> kWidth, load(tile + kWidth));
  } else {
    for (; hits; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      if constexpr (kScoring == Scoring::kScreen)  // the gate took the panel's largest margin
        if (tile[lane] + margin(c, r, int32_t(m0) + lane) <= c.tau[r]) continue;
      score[n] = tile[lane];
      index[n++] = int32_t(m0) + lane;
    }
  }
  c.count[r] = n;
}

template <Scoring kScoring>
void score_tile(const EncodeChunk& c, const float* x, const float* w, int64_t n_steps, int64_t at,
                int64_t r0, uint32_t* keys) {
  const int rows = c.R - r0 < kTileRows ? int(c.R - r0) : kTileRows;
  Vec acc[kTileRows][2];
  product<kScoring>(rows, x, w, n_steps, acc);
  // The gate. Appending is left for after the loop, so that the accumulators never spill.
  alignas(64) float tile[kTileRows][kPanel];
  uint32_t hits[kTileRows];
  const int64_t m0 = at * kPanel;
  const uint32_t lanes = lanes_of(c, m0);
  const Vec b0 = load(c.bias + m0), b1 = load(c.bias + m0 + kWidth);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const Vec s0 = acc[r][0] + b0, s1 = acc[r][1] + b1;
    store(tile[r], s0);
    store(tile[r] + kWidth, s1);
    float tau = r < rows ? c.tau[r0 + r] : 0;
    if constexpr (kScoring == Scoring::kScreen)
      if (r < rows) tau -= panel_margin(c, at, r0 + r);
    hits[r] = not_le(s0, splat(tau)) | not_le(s1, splat(tau)) << kWidth;
  }
  if (c.p->product_only) {
    asm volatile("" : : "r"(&tile[0][0]), "r"(hits) : "memory");
    return;
  }
  uint32_t waiting = 0;  // rows with hits
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) break;
    if constexpr (kScoring == Scoring::kScreen)
      if (c.redo[r0 + r]) continue;
    waiting |= uint32_t((hits[r] & lanes) != 0) << r;
  }
  for (; waiting; waiting &= waiting - 1) {
    const int r = __builtin_ctz(waiting);
    append<kScoring>(c, r0 + r, m0, hits[r] & lanes, tile[r], keys);
  }
}

template <Scoring kScoring>
void score_rows(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
                int size, uint32_t* keys) {
  const int64_t n_steps = steps(c), last = (c.M + kPanel - 1) / kPanel - group * c.panels;
  const int64_t n_panels = last < c.panels ? last : c.panels;
  const float* x = static_cast<const float*>(c.x_pack);
  const float* w = packed_group(c, group);
  Ahead ahead(c, group, rank, size, (tile1 - tile0) * n_panels);
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t panel = 0; panel < n_panels; ++panel) {
      score_tile<kScoring>(c, x + tile * n_steps * kTileRows, w + panel * n_steps * kPanel, n_steps,
                           group * c.panels + panel, tile * kTileRows, keys);
      ahead.advance();
    }
}

void score(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank, int size,
           void* scratch) {
  uint32_t* keys = scratch_of(c, scratch).keys;
  switch (c.scoring) {
    case Scoring::kFloat:
      return score_rows<Scoring::kFloat>(c, group, tile0, tile1, rank, size, keys);
#if defined(__AVX512BF16__)
    case Scoring::kDot:
      return score_rows<Scoring::kDot>(c, group, tile0, tile1, rank, size, keys);
    case Scoring::kScreen:
      return score_rows<Scoring::kScreen>(c, group, tile0, tile1, rank, size, keys);
#endif
    default:
      return;
  }
}

// Slots that no candidate above -inf fills carry the smallest latents not chosen, score -inf.
int64_t fill(const EncodeChunk& c, uint64_t* sort, int64_t n, const int32_t* index) {
  const float none = -__builtin_inff();
  int64_t out = n, next = 0;
  for (int64_t i = 0; out < c.p->k; ++i) {
    if (next < n && latent_of(c, index[next]) == i) {
      ++next;
    } else {
      sort[out++] = sort_key(none, int32_t(i));
    }
  }
  return out;
}

void finish(const EncodeChunk& c, int64_t row0, int64_t row1, void* scratch, EncodeStats* stats) {
  if (c.p->product_only) return;
  const Scratch s = scratch_of(c, scratch);
  const int64_t k = c.p->k;
  const bool screen = c.scoring == Scoring::kScreen;
  if (screen) {
    for (int64_t r = row0; r < row1; ++r) {
      if (c.redo[r]) continue;
      if (c.count[r] > 2 * k) coarse_refine(c, r, s.keys);  // leaves fewer bounds to look at
      if (c.count[r] > k) screen_refine(c, r, s.keys);
    }
    rescore(c, row0, row1);
  }
  for (int64_t r = row0; r < row1; ++r) {
    float* score = c.score + r * c.capacity;
    int32_t* index = c.index + r * c.capacity;
    const int64_t n_row = row_of(c, r);
    if (screen) {
      ++stats->screened_rows;
      if (c.redo[r]) {
        ++stats->redone_rows;
        continue;
      }
      stats->survivors += c.count[r];
    }
    int64_t n = c.count[r];
    if (n > k) {
      refine(score, index, n, k, s.keys);
      n = k;
    }
    int64_t kept = 0;  // under a mask, -inf is left to fill(): it may tie with a masked latent
    for (int64_t i = 0; i < n; ++i) {
      if (c.ids && score[i] == -__builtin_inff()) continue;
      index[kept] = index[i];
      s.sort[kept++] = sort_key(score[i], int32_t(latent_of(c, index[i])));
    }
    if (kept < k) fill(c, s.sort, kept, index);
    sort_keys(s.sort, k, s.sort + c.capacity);
    int64_t* indices = c.p->indices + n_row * k;
    for (int64_t j = 0; j < k; ++j) indices[j] = key_index(s.sort[j]);
    if (c.p->scores)
      for (int64_t j = 0; j < k; ++j) c.p->scores[n_row * k + j] = key_score(s.sort[j]);
    with_dtype(c.p->dtype, [&](auto tag) {
      auto* values = static_cast<typename decltype(tag)::type*>(c.p->values) + n_row * k;
      for (int64_t j = 0; j < k; ++j) {
        const float u = key_score(s.sort[j]);
        from_float(u <= 0 ? 0.0f : u, values[j]);
      }
    });
  }
}

}  // namespace

void topk_encode_table(Kernels& t) {
  t.tile_rows = kTileRows;
  t.panel_width = kPanel;
#if defined(__AVX512BF16__)
  t.has_dot = true;
#else
  t.has_dot = false;
#endif
  t.encode = {pack_x, pack_w, score, finish};
}

}  // namespace ksae::cpu::KSAE_ISA
