// SPDX-License-Identifier: Apache-2.0
// ksae's CPU kernels: raw pointers, sizes, a workspace and a thread count. No torch, no Python.
//
// N tokens (rows), d model width, F latents, k active latents a token. W_enc and W_dec are [F, d],
// row-contiguous. Storage is float32, bfloat16 or float16; arithmetic and comparison are float32.
// Every function gives the same bits for every thread count. Sizes are trusted: callers check them.
// `workspace` must hold the bytes that the function's `_workspace` query returned for the same
// parameters and thread count, aligned to 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ksae::cpu {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// ---- instruction set -------------------------------------------------------------------------
// Levels, lowest first: "plain", "avx2", "avx512", "avx512bf16". The best one is chosen by cpuid.
constexpr int kLevels = 4;
const char* level_name(int level);
bool level_available(int level);  // compiled in and supported by this CPU
int current_level();
bool set_level(int level);  // false if not available; not to be called while kernels run
int openmp_threads();       // what OpenMP would use; 0 in a build without OpenMP

// ---- topk: the k largest of each row, larger first, equal: smaller index, NaN first ----------
struct TopkParams {
  int64_t N, F, k;
  Dtype dtype;
  const void* x;     // [N, F]
  void* values;      // [N, k]
  int64_t* indices;  // [N, k]
};
size_t topk_workspace(const TopkParams& p, int threads);
void topk(const TopkParams& p, void* workspace, int threads);

// ---- topk_encode: relu(topk((x - b_dec) W_enc^T + b_enc)) without the N x F matrix -----------
struct EncodeStats {
  int64_t screened_rows;  // rows that went through certified screening
  int64_t survivors;      // latents rescored in float32, summed over those rows
  int64_t redone_rows;    // rows whose bound let too many through and that were scored in full
  int64_t candidates;     // grad_topk_encode, pruned: latents whose a was computed
};
struct EncodeParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* x;        // [N, d]
  const void* W_enc;    // [F, d]
  const void* b_enc;    // [F]
  const void* b_dec;    // [d] or null: subtracted from x, rounded to dtype
  const uint8_t* mask;  // [F] or null: latents with 0 have score -inf
  void* values;         // [N, k]
  int64_t* indices;     // [N, k]
  bool screen;          // float32 only: screen in bf16 under a proven bound, rescore in float32
  float slack;          // multiplies the proven bound; 1 but in tests
  EncodeStats* stats;   // null, or counters that are added to
  bool product_only;    // benchmarks: the product without selection; nothing is written
  float* scores;        // [N, k] or null: what was compared, in the order of selection
};
bool can_screen();  // the current level has BF16 dot instructions
size_t topk_encode_workspace(const EncodeParams& p, int threads);
void topk_encode(const EncodeParams& p, void* workspace, int threads);

// ---- grad_topk_encode: topk_encode whose k latents have the largest scores ---------------------
// s = u where u <= 0; else with a = grad W_dec^T: u (1 + beta |a|), u |a| or u (1 + beta relu(-a)).
// Rows of grad that are zero or not finite are selected by u. Values are relu(u), by score.
enum class GradMode : int { kAdditive = 0, kMultiplicative = 1, kSigned = 2 };
enum class GradRoute : int {
  kAuto = 0,    // what is expected to be faster; the result is the same
  kDual = 1,    // both products in full
  kPruned = 2,  // float32, not multiplicative: a for those latents only that it can still lift
};
struct GradEncodeParams {
  EncodeParams encode;  // mask null
  int64_t d_out;
  const void* grad;   // [N, d_out]
  const void* W_dec;  // [F, d_out]
  GradMode mode;
  float beta;  // finite, >= 0
  GradRoute route;
};
size_t grad_topk_encode_workspace(const GradEncodeParams& p, int threads);
void grad_topk_encode(const GradEncodeParams& p, void* workspace, int threads);

// ---- batch_topk_encode: relu of the N k largest of a batch's pre-activations --------------------
// No limit a row. Equal: the earlier row, then the smaller index; NaN first. Entries by row, then
// latent. mask null; values and indices are [N k].
struct BatchEncodeParams {
  EncodeParams encode;
  int64_t* row_offsets;  // [N + 1]
};
size_t batch_topk_encode_workspace(const BatchEncodeParams& p, int threads);
void batch_topk_encode(const BatchEncodeParams& p, void* workspace, int threads);

// ---- threshold_encode: pre-activations above their latent's threshold, a variable number a row --
// Entries of a row are in the order of latents. Two calls: `count` marks what is above and writes
// row_offsets, from which the caller knows E; `fill` writes the entries.
struct ThresholdEncodeParams {
  int64_t N, d, F;
  Dtype dtype;
  const void* x;         // [N, d]
  const void* W_enc;     // [F, d]
  const void* b_enc;     // [F]
  const void* b_dec;     // [d] or null: subtracted from x, rounded to dtype
  const float* theta;    // [F] positive
  uint32_t* above;       // [N, (F + 31) / 32] a bit a latent, from count to fill
  int64_t* row_offsets;  // [N + 1]
  void* values;          // [E] fill only
  int64_t* latents;      // [E] fill only
  bool screen = false;   // as in EncodeParams; the result is the same
  float slack = 1;
};
size_t threshold_encode_workspace(const ThresholdEncodeParams& p, int threads);
void threshold_encode_count(const ThresholdEncodeParams& p, void* workspace, int threads);
void threshold_encode_fill(const ThresholdEncodeParams& p, void* workspace, int threads);

// ---- sparse_decode and its backward products -------------------------------------------------
// Slots with value 0 contribute nothing. Exactly one of indices64 and indices32 is not null.
//
// A code has k entries a row, or E entries and row_offsets [N + 1]: row n has the entries from
// row_offsets[n] to row_offsets[n + 1], k is not read and [N, k] below is [E]. What goes by latent
// takes such a code as E rows of one entry (N = E, k = 1) with row_of [E], the row of each entry.
//
// The two halves of sparse_residual, for shards of the latents: sparse_decode with out_float, whose
// results are added, and sparse_decode_backward_values with grad_float. Their bits are those of
// sparse_residual, but that products of entries of value 0 are not cleared.
struct DecodeParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* values;        // [N, k]
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  const void* W_dec;         // [F, d]
  const void* b_dec;         // [d] or null
  void* out;                 // [N, d]
  const int64_t* row_offsets = nullptr;
  bool out_float = false;  // out is float32: partial sums, not rounded to dtype
};
void sparse_decode(const DecodeParams& p, int threads);

// Residual of the reconstruction, its square, and the gradient of the values before scaling. With
// sq_error = null only the columns are computed: a later slice of the same residual.
struct ResidualParams {
  DecodeParams decode;     // out is unused
  const void* target;      // [N, d] decode.dtype, or float32
  bool target_float;       // target is float32
  int64_t start, columns;  // which columns of the residual are stored
  float* residual;         // [N, columns] reconstruction - target
  double* sq_error;        // [N] sum over all d of residual^2, or null
  float* grad_values;      // [N, k] <residual_n, W_dec[index]> over all d; 0 where the value is 0
};
size_t sparse_residual_workspace(const ResidualParams& p, int threads);
void sparse_residual(const ResidualParams& p, void* workspace, int threads);

// Residuals e_g of the reconstructions by latents below widths[g] alone, and their suffix sums
// r_g = sum over h >= g of shares[h] e_h: what the residual is to entries of the latents in
// [widths[g-1], widths[g]). `residual` holds r [P, N, columns], sq_error those of e [P, N];
// grad_values <r_g, W_dec[index]>.
struct PrefixResidualParams {
  ResidualParams residual;
  const int64_t* widths;  // [P] ascending, the last F
  const float* shares;    // [P]
  int n_prefixes;         // P
};
size_t prefix_residual_workspace(const PrefixResidualParams& p, int threads);
void prefix_residual(const PrefixResidualParams& p, void* workspace, int threads);

struct DecodeBackwardValuesParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* grad;          // [N, d]
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  const void* W_dec;         // [F, d]
  void* grad_values;         // [N, k] <grad_n, W_dec[index]>
  const int64_t* row_offsets = nullptr;
  bool grad_float = false;  // grad and grad_values are float32: a residual completed elsewhere
};
void sparse_decode_backward_values(const DecodeBackwardValuesParams& p, int threads);

struct DecodeBackwardWeightParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* grad;          // [N, d]
  const void* values;        // [N, k]
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  void* grad_W;              // [F, d] sum of value * grad_n over the entries of a latent
  void* value_sum;           // [F] sum of value
  const int32_t* row_of = nullptr;
};
size_t sparse_decode_backward_weight_workspace(const DecodeBackwardWeightParams& p, int threads);
void sparse_decode_backward_weight(const DecodeBackwardWeightParams& p, void* workspace,
                                   int threads);

// ---- group_by_latent: tokens grouped by latent (CSC), stable ---------------------------------
struct GroupParams {
  int64_t N, F, k;
  Dtype dtype;
  const void* values;        // [N, k] entries equal to 0 are left out
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  int32_t* offsets;          // [F + 1]
  int32_t* order;            // [N * k] positions n * k + j by latent; unused tail is -1
};
size_t group_by_latent_workspace(const GroupParams& p, int threads);
void group_by_latent(const GroupParams& p, void* workspace, int threads);

// Whether all of n indices, of either width, are in [0, F); false may be said of F - 1 where it is
// the largest int32.
bool indices_in_range(const int64_t* indices64, const int32_t* indices32, int64_t n, int64_t F);

// ---- latent passes: each latent's gradient row is formed, used and forgotten ------------------
// A group is one term of the loss: its code grouped by latent, and its scale (dL/drecon = scale *
// residual). If a scale is not finite, sums and squares are 0, and nothing else is written.
struct LatentSumsGroup {
  const int32_t* offsets;  // [F + 1]
  const int32_t* order;    // [N * k]
  const void* values;      // [N, k] dtype
  const float* grads;      // [N, k] gradient of the values before scaling
};
struct LatentSumsParams {
  int64_t F;
  Dtype dtype;
  const LatentSumsGroup* groups;
  const float* scales;  // [n_groups]
  int n_groups;
  float* grad_b_enc;  // [F] sum of scale * grad
  float* grad_dot_w;  // [F] sum of scale * value * grad = <dW_dec[i], W_dec[i]>
};
void latent_sums(const LatentSumsParams& p, int threads);

// Adam on the rows of one matrix, with gradient
//   sum over groups and entries of scale * coefficient * (row_n - centre), less its part along W_i.
// Encoder: coefficients are the values' gradients (float32), rows are x (dtype).
// Decoder: coefficients are the values (dtype), rows are columns of the residual (float32).
struct RowGroup {
  const int32_t* offsets;    // [F + 1]
  const int32_t* order;      // [N * k]
  const void* coefficients;  // [N, k]
  const void* rows;          // [N, columns]
  int64_t k;
  const int32_t* row_of = nullptr;
};
struct RowUpdateParams {
  int64_t F, d;
  int64_t start, columns;  // which columns of W are updated
  Dtype dtype;
  Dtype rows_dtype;          // of the groups' rows: dtype, or float32 with coefficients of dtype
  Dtype coefficients_dtype;  // of the groups: dtype (decoder), or float32 (encoder)
  const RowGroup* groups;
  const float* scales;  // [n_groups]
  int n_groups;
  const void* centre;  // [columns] dtype or null: encoder only
  // [F] <gradient, W_i> over all columns, or null: no projection. A slice that starts at 0 and does
  // not span the row divides it by |W_i|^2 in place: the later slices see W half updated.
  float* grad_dot_w;
  const float* grad_b_enc;  // [F] with grad_b_dec
  float* grad_b_dec;        // [d] or null: W^T grad_b_enc with W as it was
  void* W;                  // [F, d] dtype
  float* master;            // [F, d] float32 that W is the rounded copy of, or null
  float *m, *v;             // [F, d] moments
  const float* hyper;  // [8] lr/bc1, sqrt(bc2), beta1, beta2, eps, grad_scale, 1-beta1, 1-beta2
  bool normalize;      // unit rows at the end, over all d columns
  double* grad_sq;     // [F]: row_grad_sq only
};
size_t row_update_workspace(const RowUpdateParams& p, int threads);
void row_update(const RowUpdateParams& p, void* workspace, int threads);
void row_grad_sq(const RowUpdateParams& p, void* workspace, int threads);

}  // namespace ksae::cpu
