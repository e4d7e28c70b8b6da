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
};
bool can_screen();  // the current level has BF16 dot instructions
size_t topk_encode_workspace(const EncodeParams& p, int threads);
void topk_encode(const EncodeParams& p, void* workspace, int threads);

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
};
void sparse_decode(const DecodeParams& p, int threads);

struct ResidualParams {
  DecodeParams decode;  // out is unused
  const void* target;   // [N, d] dtype
  float* residual;      // [N, d] reconstruction - target
  double* sq_error;     // [N] sum over d of residual^2
};
void sparse_residual(const ResidualParams& p, int threads);

struct DecodeBackwardValuesParams {
  int64_t N, d, F, k;
  Dtype dtype;
  const void* grad;          // [N, d]
  const int64_t* indices64;  // [N, k]
  const int32_t* indices32;  // [N, k]
  const void* W_dec;         // [F, d]
  void* grad_values;         // [N, k] <grad_n, W_dec[index]>
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

// ---- latent pass: gradients, projection, Adam and unit norm of each latent, in one pass ------
struct LatentGroup {      // one loss term: r = scale * residual
  const void* values;     // [N, k] dtype
  const int32_t* offsets;  // [F + 1]
  const int32_t* order;   // [N * k]
  const float* residual;  // [N, d_out]
  int64_t k;
};
struct LatentParams {
  int64_t N, d_in, d_out, F;
  Dtype dtype;
  const void* x;      // [N, d_in] dtype
  const void* b_dec;  // [d_in] dtype or null: subtracted from x
  const LatentGroup* groups;
  const float* scales;  // [n_groups]
  int n_groups;
  void* W_enc;           // [F, d_in] dtype
  void* b_enc;           // [F] dtype
  void* W_dec;           // [F, d_out] dtype
  float* master[3];      // float32 [F, d_in], [F], [F, d_out] of W_enc, b_enc, W_dec; or all null
  float* moments[6];     // float32 m and v of W_enc, b_enc, W_dec, in this order
  const float* hyper;    // [6] lr/bc1, sqrt(bc2), beta1, beta2, eps, grad_scale
  bool project;          // remove the decoder gradient's part along the row
  bool normalize;        // unit decoder rows at the end
  double* grad_sq;       // [F]: latent_grad_norm only
  float* grad_b_dec;     // [d_in] W_enc^T db_enc with the old W_enc, without grad_scale
};
size_t latent_workspace(const LatentParams& p, int threads);
void latent_update(const LatentParams& p, void* workspace, int threads);
void latent_grad_norm(const LatentParams& p, void* workspace, int threads);

}  // namespace ksae::cpu
