// SPDX-License-Identifier: Apache-2.0
// What one instruction-set level offers to the threaded code: serial functions over row or latent
// ranges, in a table. Plain structs and pointers only, no inline functions: this header is included
// by files compiled with AVX-512 (see isa/simd.h).
#pragma once

#include "ksae/cpu.h"

namespace ksae::cpu {

// How the dense scores of topk_encode are computed.
enum class Scoring : int {
  kFloat,   // storage widened to float32, one fused multiply-add chain over d a score
  kDot,     // bfloat16 pairs, float32 accumulators (levels with BF16 dot instructions)
  kScreen,  // kDot on rounded float32, survivors of the error bound rescored as kFloat would
};

struct GradChunk;

// Where rows with many candidates of a chunk put them, a block of `room` at a time.
struct Spill {
  int32_t* used;  // blocks asked for
  int32_t blocks;
  int64_t room;
  int32_t* row;    // [blocks] of the chunk
  int32_t* count;  // [blocks]
  float* score;    // [blocks][room]
  int32_t* index;  // [blocks][room]
};

// One chunk of rows on its way through topk_encode. "Candidate" m is the m-th latent that may be
// chosen: latent m itself, or ids[m] under a mask. Candidates come in panels of the level's width.
struct EncodeChunk {
  const EncodeParams* p;
  Scoring scoring;
  const int32_t* ids;   // [M] ascending, or null: every latent
  const int32_t* rows;  // [R] rows of x, or null: row0, row0 + 1, ...
  int64_t M, row0, R;
  int64_t panels;       // of a group: packed together, they stay in L2 while rows go by
  int slots;            // packed groups that exist at a time: group g is in slot g % slots
  void* x_pack;         // [tiles][d][tile_rows] float32, or [tiles][d/2][tile_rows] bf16 pairs
  void* w_pack;         // [slots][panels][d][panel_width], or bf16 pairs
  float* bias;          // [M padded]
  float* bound_w;       // kScreen: [M padded / width][3][width] |w - w^|, |w^|, bias term
  float* bound_panel;   // kScreen: [M padded / width][4] the largest of these three and of |w|
  float* bound_x;       // kScreen: [R][2] factors of the first two, rounding slack included
  float* score;         // [R][capacity] candidates that passed the gate
  int32_t* index;       // [R][capacity] ascending
  int32_t* count;       // [R]
  float* tau;           // [R] the gate: a proven lower bound of the k-th score; NaN passes all
  float* margin;        // [R] kScreen: the largest bound that the row has met
  uint8_t* redo;        // [R] set when the row must be scored again with more room
  uint32_t* pairs;      // [R][pair_stride] certified: survivors in the order of rescoring
  int64_t pair_stride;  // capacity, or a packed row's numbers where pairs lie over x_pack
  int64_t capacity;
  const GradChunk* grad;  // grad_topk_encode: what else it needs; null for topk_encode
  float gate;             // where tau starts: NaN, or the threshold of the batch
  bool fixed;             // batch_topk_encode, threshold_encode: tau stays; a row without room
                          // spills, or is marked
  const float* theta;     // [F] threshold_encode: scores are those above theta; else null
  Spill spill;            // with `fixed`
  bool unfinished;        // the candidates are the result
};

// The gradient's half of a chunk. `a` is the product grad @ W_dec.T over the same rows, latents and
// candidates; its score [R][capacity] holds a, or while pruning an upper bound of s.
struct GradChunk {
  EncodeChunk a;
  const GradEncodeParams* p;
  bool pruned;     // a is computed for candidates only
  uint8_t* plain;  // [R] rows that are selected by u
  float* norm_g;   // [R] pruned: upper bounds of |grad[n]|
  float* norm_w;   // [M padded] pruned: upper bounds of |W_dec[i]|
  bool has_norms;  // pruned: norm_w is there from an earlier chunk
};

// The steps of topk_encode and of grad_topk_encode. `scratch` holds encode_scratch(d, capacity)
// bytes, one for each thread.
struct EncodeSteps {
  void (*pack_x)(const EncodeChunk& c, int64_t tile0, int64_t tile1, void* scratch);
  void (*pack_w)(const EncodeChunk& c, int64_t group, int64_t panel);
  void (*score)(const EncodeChunk& c, int64_t group, int64_t tile0, int64_t tile1, int rank,
                int size, void* scratch);
  void (*finish)(const EncodeChunk& c, int64_t row0, int64_t row1, void* scratch,
                 EncodeStats* stats);
};

// What batch_topk_encode has found so far: candidates of all rows, by row and latent.
struct BatchList {
  int64_t n, capacity;
  float* score;     // [capacity] screened, or float32
  int32_t* latent;  // [capacity]
  int32_t* row;     // [capacity] of x
  uint32_t* keys;   // [capacity] for a moment; the order of rescoring at the end
  float* bound_x;   // [N][2] kScreen
  uint8_t* exact;   // [N] kScreen: rows whose scores are float32 already
};

// The steps of batch_topk_encode after a chunk was scored. Proofs: isa/batch_topk_encode.cpp.
struct BatchSteps {
  // Appends lower bounds of the scores of row r of a sample.
  void (*sample)(const EncodeChunk& c, int64_t r, BatchList& list);
  // Appends n scores of row r of the chunk, but what is <= tau.
  void (*collect)(const EncodeChunk& c, int64_t r, const float* score, const int32_t* index,
                  int64_t n, float tau, BatchList& list);
  // The wanted-th largest score.
  float (*threshold)(const BatchList& list, int64_t wanted);
  // kScreen: drops what cannot be among the `wanted` best; returns a proven bound of the last one.
  float (*prune)(const EncodeChunk& c, BatchList& list, int64_t wanted);
  // Keeps the `wanted` best, equal ones in order; returns what a later one must exceed.
  float (*keep)(BatchList& list, int64_t wanted);
  // kScreen: float32 scores of the entries at places [from, to) of the order of rescoring.
  void (*rescore)(const EncodeChunk& c, BatchList& list, int64_t from, int64_t to);
  void (*write)(const BatchList& list, const BatchEncodeParams& p);
};

struct Kernels {
  int tile_rows, panel_width;
  bool has_dot;
  EncodeSteps encode, grad_encode;
  BatchSteps batch_encode;
  // The rest, over rows [row0, row1) or latents [i0, i1).
  void (*topk)(const TopkParams& p, int64_t row0, int64_t row1, void* scratch);
  void (*threshold_count)(const ThresholdEncodeParams& p, int64_t row0, int64_t row1,
                          float* scratch);
  // Marks and counts rows [r0, r1) of a screened chunk, whose candidates may be above.
  void (*threshold_decide)(const ThresholdEncodeParams& p, const EncodeChunk& c, int64_t r0,
                           int64_t r1, float* scratch);
  void (*threshold_fill)(const ThresholdEncodeParams& p, int64_t row0, int64_t row1,
                         float* scratch);
  void (*decode)(const DecodeParams& p, int64_t row0, int64_t row1);
  void (*residual)(const ResidualParams& p, int64_t row0, int64_t row1, float* scratch);
  void (*prefix_residual)(const PrefixResidualParams& p, int64_t row0, int64_t row1,
                          float* scratch);
  void (*backward_values)(const DecodeBackwardValuesParams& p, int64_t row0, int64_t row1);
  void (*backward_weight)(const DecodeBackwardWeightParams& p, const int32_t* offsets,
                          const int32_t* order, int64_t i0, int64_t i1, float* scratch);
};

const Kernels& plain_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
const Kernels& kernels();  // of the current level

// Declares a function `name` of each level, of the function type `Type`, which a file of isa/
// defines, and `name_here()`: that of the current level. What one op alone calls needs no place in
// the table. For namespace ksae::cpu.
#ifdef KSAE_HAVE_X86
#define KSAE_EACH_LEVEL(Type, name)                                                          \
  namespace plain {                                                                          \
  Type name;                                                                                 \
  }                                                                                          \
  namespace avx2 {                                                                           \
  Type name;                                                                                 \
  }                                                                                          \
  namespace avx512 {                                                                         \
  Type name;                                                                                 \
  }                                                                                          \
  namespace avx512bf16 {                                                                     \
  Type name;                                                                                 \
  }                                                                                          \
  static Type* name##_here() {                                                               \
    static Type* const levels[] = {plain::name, avx2::name, avx512::name, avx512bf16::name}; \
    return levels[current_level()];                                                          \
  }
#else
#define KSAE_EACH_LEVEL(Type, name) \
  namespace plain {                 \
  Type name;                        \
  }                                 \
  static Type* name##_here() { return plain::name; }
#endif

constexpr int64_t kVectorPad = 64;      // elements past the end that a whole-vector store may touch
constexpr int64_t kThresholdRows = 32;  // rows of x that go by a row of W_enc together
size_t encode_scratch(int64_t d, int64_t capacity);
void sort_descending(uint64_t* keys, int64_t n);
bool is_nonzero(Dtype dtype, const void* values, int64_t i);
bool all_finite(const float* scales, int n);

// Bump allocator over a caller's workspace; with base = null it only counts.
struct Arena {
  char* base;
  size_t used;
  void* take(size_t bytes);
};

}  // namespace ksae::cpu
