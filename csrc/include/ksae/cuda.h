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
  const void* bias;     // [F] or null: z = score + bias
  const float* scale;   // [F] or null: multiplies s, not the value
  const uint8_t* mask;  // [F] or null: z of latents with 0 is -inf
  bool relu;            // values are relu(z); else z
  void* values;         // [rows, k] z of the selected
  int64_t* indices;     // [rows, k]
};
size_t select_workspace(const SelectParams& p);
cudaError_t select(const SelectParams& p, void* workspace, cudaStream_t stream);

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

}  // namespace ksae::cuda
