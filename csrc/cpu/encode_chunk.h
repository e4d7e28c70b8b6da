// SPDX-License-Identifier: Apache-2.0
// What the threaded parts of the encoders share (encode_chunk.cpp).
#pragma once

#include "isa.h"

namespace ksae::cpu {

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

int64_t round_up(int64_t n, int64_t to);
Scoring scoring_of(const EncodeParams& p);

// Sizes and memory of the chunks of N rows, M latents at most.
Plan plan_chunk(const EncodeParams& p, const Second& second, Scoring scoring, int64_t M, int64_t N,
                int threads, Arena& arena);
// Gives the chunk that many blocks for rows with more candidates than its capacity.
void take_spill(EncodeChunk& c, int64_t blocks, Arena& arena);
void run_chunk(const EncodeChunk& c, const Plan& plan, int threads, EncodeStats* stats);

}  // namespace ksae::cpu
