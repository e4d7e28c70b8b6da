// SPDX-License-Identifier: Apache-2.0
// ksae on CUDA devices: raw pointers, sizes, a workspace and a stream; no torch, no Python. Every
// function returns CUDA's error code, allocates nothing and does not wait for the device.
//
// N tokens (rows), d model width, F latents, k active latents a token. W_enc and W_dec are [F, d],
// row-contiguous. Storage is float32, bfloat16 or float16; arithmetic and comparison are float32.
// No result depends on the order in which blocks run. Sizes are trusted: callers check them. An
// index outside of [0, F) is undefined behaviour. `workspace` must hold the bytes that the
// function's `_workspace` query returned for the same parameters, aligned to 256 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace ksae::cuda {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Version of the runtime that is linked in, as 1000 * major + 10 * minor. Needs no driver.
cudaError_t runtime_version(int* version);

// Newest CUDA version that the driver supports, in the same form; 0 where there is no driver.
cudaError_t driver_version(int* version);

// Number of usable devices. Without a driver this is an error: cudaGetErrorString says which.
cudaError_t device_count(int* count);

// ---- select: the k largest of each row, larger first, equal: smaller index, NaN first --------
enum class Mode : int { kPlain = 0, kAdditive = 1, kMultiplicative = 2, kSigned = 3 };
struct SelectParams {
  int64_t rows, F, k;
  Dtype score_dtype;   // of scores and second: dtype, or float32
  Dtype dtype;         // of bias and values
  const void* scores;  // [rows, F]
  const void* second;  // [rows, F] or null: <W_dec[i], g>, used as `mode` says where z > 0
  Mode mode;           // score s = z, z (1 + beta |a|), z |a|, z (1 + beta relu(-a))
  float beta;
  const uint8_t* informed;  // [rows] or null: where 0, second is not read and s = z
  const void* bias;         // [F] or null: z = score + bias
  const float* scale;       // [F] or null: multiplies s, not the value
  const int32_t* columns;   // [F + 1] of list_columns or null: z of all others is -inf
  bool relu;                // values are relu(z); else z
  void* values;             // [rows, k] z of the selected
  int64_t* indices;         // [rows, k]
};
size_t select_workspace(const SelectParams& p);
cudaError_t select(const SelectParams& p, void* workspace, cudaStream_t stream);

// The columns i with mask[i] != 0, ascending, in columns [F + 1], whose last entry is their number.
cudaError_t list_columns(int64_t F, const uint8_t* mask, int32_t* columns, cudaStream_t stream);

// ---- screened selection: the float32 result of a product of bf16 copies ------------------------
// copy = t in bfloat16; norms: upper bounds of the norms of the rows of t, of t - copy and of copy,
// infinite where the first is above 2^60 or not a number.
struct Bf16CopyParams {
  int64_t rows, d;
  const float* t;  // [rows, d]
  void* copy;      // [rows, d] bfloat16
  float* norms;    // [3, rows]
};
cudaError_t bf16_copy(const Bf16CopyParams& p, cudaStream_t stream);

// screened_begin once, screened_select for each chunk of rows, screened_redo once: then values and
// indices are those of the k largest x_n W_enc^T + b_enc in float32, order and ReLU as of `select`.
constexpr int64_t kMostScreened = 1024;
struct ScreenedSelectParams {
  int64_t N, d, F, k;      // k at most kMostScreened
  int64_t first, rows;     // the chunk
  const float* scores;     // [rows, F] products of the copies of x and W_enc
  const float* x;          // [N, d]
  const float* W_enc;      // [F, d]
  const float* b_enc;      // [F]
  const float* x_norms;    // [3, N] of bf16_copy
  const float* w_norms;    // [3, F] of bf16_copy, as row_update keeps them
  const uint8_t* mask;     // [F] or null: where 0, a latent is not chosen
  float* group_norms;      // [3, screened_groups]
  uint32_t* bounds;        // [N]
  int32_t *list, *listed;  // [N], [1] rows that screened_redo scores in full
  float* values;           // [N, k]
  int64_t* indices;        // [N, k]
  int capacity = 0;        // latents of a row that may be scored; a power of two, or 0: chosen
};
int64_t screened_groups(const ScreenedSelectParams& p);
cudaError_t screened_begin(const ScreenedSelectParams& p, cudaStream_t stream);
cudaError_t screened_select(const ScreenedSelectParams& p, cudaStream_t stream);
size_t screened_redo_workspace(const ScreenedSelectParams& p);
cudaError_t screened_redo(const ScreenedSelectParams& p, void* workspace, cudaStream_t stream);

// ---- sparse_decode and its backward products -------------------------------------------------
// Slots with value 0 contribute nothing. Exactly one of indices64 and indices32 is not null.
struct DecodeParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* values;        // [N, k]
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  const void* W_dec;         // [F, d]
  const void* b_dec;         // [d] or null
  void* out;                 // [N, d]
  // [N + 1] or null: row n has the entries from row_offsets[n] to row_offsets[n + 1], k is not read
  // and [N, k] is [E].
  const int64_t* row_offsets = nullptr;
  bool out_float = false;  // out is float32: partial sums, not rounded to dtype
};
cudaError_t sparse_decode(const DecodeParams& p, cudaStream_t stream);

// As ksae::cpu::ResidualParams. With sq_error = null only the columns are computed.
struct ResidualParams {
  DecodeParams decode;     // out is unused
  const void* target;      // [N, d] decode.dtype, or float32
  bool target_float;       // target is float32
  int64_t start, columns;  // which columns of the residual are stored
  float* residual;         // [N, columns] reconstruction - target
  double* sq_error;        // [N] sum over all d of residual^2, or null
  float* grad_values;      // [N, k] <residual_n, W_dec[index]> over all d; 0 where the value is 0
  float* column_sums;      // [d] sum of the residual over the tokens, or null; with sq_error only
  void* rounded;           // [N, d] decode.dtype, the residual, or null; with sq_error only
};
size_t sparse_residual_workspace(const ResidualParams& p);
cudaError_t sparse_residual(const ResidualParams& p, void* workspace, cudaStream_t stream);

struct DecodeBackwardValuesParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* grad;          // [N, d]
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  const void* W_dec;         // [F, d]
  void* grad_values;         // [N, k] <grad_n, W_dec[index]>
  // [E] or null: the row of each entry, for a code with row offsets; then N = E and k = 1.
  const int32_t* row_of = nullptr;
  bool grad_float = false;  // grad and grad_values are float32: a residual completed elsewhere
};
cudaError_t sparse_decode_backward_values(const DecodeBackwardValuesParams& p, cudaStream_t stream);

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
size_t group_by_latent_workspace(const GroupParams& p);
cudaError_t group_by_latent(const GroupParams& p, void* workspace, cudaStream_t stream);

// ---- latent passes: each latent's gradient row is formed, used and forgotten ------------------
// A group is one term of the loss: its code grouped by latent, and its scale (dL/drecon = scale *
// residual); at most four. If a scale is not finite, sums and squares are 0, and nothing else is
// written. Arrays of groups lie in host memory; everything else is on the device.
struct LatentSumsGroup {
  const int32_t* offsets;  // [F + 1]
  const int32_t* order;    // [N * k]
  const void* values;      // [N, k] dtype
  const float* grads;      // [N, k] gradient of the values before scaling
  int64_t entries;         // N * k
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
size_t latent_sums_workspace(const LatentSumsParams& p);
cudaError_t latent_sums(const LatentSumsParams& p, void* workspace, cudaStream_t stream);

// As ksae::cpu::RowUpdateParams: Adam on the rows of one matrix, with gradient
//   sum over groups and entries of scale * coefficient * (row_n - centre), less its part along W_i.
// Encoder: coefficients are the values' gradients (float32), rows are x (dtype).
// Decoder: coefficients are the values (dtype), rows are columns of the residual (float32).
struct RowGroup {
  const int32_t* offsets;    // [F + 1]
  const int32_t* order;      // [N * k]
  const void* coefficients;  // [N, k]
  const void* rows;          // [N, columns]
  int64_t k;
  int64_t entries;                  // N * k
  const int32_t* row_of = nullptr;  // [entries] or null: instead of k entries a row
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
  const void* centre;       // [columns] dtype or null: encoder only
  float* grad_dot_w;        // [F] or null; divided by |W_i|^2 by a slice that starts at 0
  const float* grad_b_enc;  // [F] with grad_b_dec
  // [d] or null: W^T grad_b_enc with W as it was; whole rows, without grad_dot_w and normalize
  float* grad_b_dec;
  void* W;        // [F, d] dtype
  float* master;  // [F, d] float32 that W is the rounded copy of, or null
  void *m, *v;    // [F, d] moments: float32, or bfloat16 with rng_state
  void* W_bf16;   // [F, d] bfloat16 copy of a float32 W, written with it, or null
  // [3, F] upper bounds of the norms of the rows of W, of W - W_bf16 and of W_bf16, written with
  // W_bf16, or null; infinite where the first is above 2^60 or not a number. All columns then.
  float* norms;
  // [2] seed and step, or null. With them W is bfloat16 without a master, and W, m and v are
  // rounded stochastically, by bits that depend on seed, step, latent and column alone; start % 4
  // is 0.
  const int64_t* rng_state;
  const float* hyper;  // [8] lr/bc1, sqrt(bc2), beta1, beta2, eps, grad_scale, 1-beta1, 1-beta2
  bool normalize;      // unit rows at the end, over all d columns
  double* grad_sq;     // [F]: row_grad_sq only
};
size_t row_update_workspace(const RowUpdateParams& p);
cudaError_t row_update(const RowUpdateParams& p, void* workspace, cudaStream_t stream);
cudaError_t row_grad_sq(const RowUpdateParams& p, void* workspace, cudaStream_t stream);

// The gradient alone, from a code that group_by_latent has grouped.
struct DecodeBackwardWeightParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* grad;                 // [N, d]
  const void* values;               // [N, k]
  const int32_t* offsets;           // [F + 1]
  const int32_t* order;             // [N * k]
  void* grad_W;                     // [F, d] sum of value * grad_n over the entries of a latent
  void* value_sum;                  // [F] sum of value
  const int32_t* row_of = nullptr;  // as in DecodeBackwardValuesParams
};
size_t sparse_decode_backward_weight_workspace(const DecodeBackwardWeightParams& p);
cudaError_t sparse_decode_backward_weight(const DecodeBackwardWeightParams& p, void* workspace,
                                          cudaStream_t stream);

// ---- the small part of a training step ---------------------------------------------------------
constexpr int kMaxTerms = 4;  // of a loss

struct TotalVarianceParams {
  int64_t N, d;
  Dtype dtype;
  const void* y;    // [N, d]
  float* variance;  // [1] sum (y - mean over the rows of y)^2
};
size_t total_variance_workspace(const TotalVarianceParams& p);
cudaError_t total_variance(const TotalVarianceParams& p, void* workspace, cudaStream_t stream);

// A term is error / denominator, where error is the sum of sq_error; loss is the sum of share *
// term. A term after the first whose denominator is not positive counts nothing.
struct LossTerm {
  int64_t N;
  const double* sq_error;    // [N]
  const float* denominator;  // [1]
  float share;
};
struct LossTermsParams {
  const LossTerm* of_terms;  // in host memory, at most kMaxTerms
  int n_terms;
  float* errors;  // [n_terms]
  float* terms;   // [n_terms]
  float* loss;    // [1]
  float* scales;  // [n_terms] dloss/drecon = scale * residual
};
cudaError_t loss_terms(const LossTermsParams& p, cudaStream_t stream);

// The hyper of row_update for step t + 1, and whether it is taken: loss and norm are finite.
struct AdamScalarsParams {
  const float* loss;  // [1]
  const float* norm;  // [1] of all gradients, clipped to clip_norm, or null
  float clip_norm;
  const float* scales;  // [n_scales]
  int n_scales;
  const double* lr;         // [1]
  const double* t;          // [1] steps taken
  const double* constants;  // [3] beta1, beta2, eps
  float decoder_lr;         // the rate of the decoder as a multiple of lr
  bool always;              // gradients are scaled to clip_norm, also smaller ones
  float* hyper;             // [8]
  bool* taken;              // [1]
  float* taken_scales;      // [n_scales] scales, or NaN if the step is not taken
  float* of_decoder;        // [8] hyper of the decoder
};
cudaError_t adam_scalars(const AdamScalarsParams& p, cudaStream_t stream);

// The counters of a step: since = 0 where a latent has entries, else since + tokens; t + 1.
struct CountTokensParams {
  int64_t F;
  const bool* taken;       // [1] nothing is written but what it counts if it is false
  const int32_t* offsets;  // [F + 1] of group_by_latent
  int64_t* since;          // [F]
  double* t;               // [1]
  int64_t tokens, dead_after, within;
  float* l0;      // [1] entries / tokens
  float* dead;    // [1] share of the latents with since > dead_after before the step
  int64_t* soon;  // [1] latents with since > dead_after - within after it
};
size_t count_tokens_workspace(const CountTokensParams& p);
cudaError_t count_tokens(const CountTokensParams& p, void* workspace, cudaStream_t stream);

// Adam with the gradient: sum of scales * grads, less minus.
struct VectorUpdateParams {
  int64_t size;
  Dtype dtype;
  const float* const* grads;  // in host memory, at most kMaxTerms, of [size]
  int n_grads;
  const float* scales;  // [n_grads] or null: 1
  const float* minus;   // [size] or null
  const bool* taken;    // [1] nothing is written if it is false
  const float* hyper;   // [8] as in RowUpdateParams
  void* p;              // [size] dtype
  float* master;        // [size] that p is the rounded copy of, or null
  float *m, *v;         // [size]
};
cudaError_t vector_update(const VectorUpdateParams& p, cudaStream_t stream);

}  // namespace ksae::cuda
