// SPDX-License-Identifier: Apache-2.0
// Token-major gathers of decoder rows.
//
// sparse_decode and slices of the residual: one warp a token and 128 columns, slices outermost, so
// that 128 columns of W_dec (256 F bytes at 16 bits) are what the L2 cache has to hold. The whole
// residual: one block a token, its row in shared memory, from which the products with the chosen
// rows are taken while these rows are still in cache. Sums over k and over d have a fixed order.
//
// Bytes: N k d sizeof(T) gathered (twice for the residual), N d written. Flops: 2 N k d (4 N k d).
// Limits: a residual row longer than kSharedRow numbers lies in the workspace.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSlice = 128;  // columns a warp
constexpr int64_t kSharedRow = 11 * 1024;

// Columns [c, c + 4) of the unrounded reconstruction of token n, bias included. All 32 lanes call.
template <class T>
__device__ __forceinline__ Four decode4(const DecodeParams& p, int64_t n, int64_t c, bool aligned) {
  const T* W = static_cast<const T*>(p.W_dec);
  const T* values = static_cast<const T*>(p.values) + n * p.k;
  const int lane = threadIdx.x % 32;
  Four sum{};
  for (int64_t j0 = 0; j0 < p.k; j0 += 32) {
    float v = 0;
    int64_t i = 0;
    if (j0 + lane < p.k) {
      v = load(values + j0 + lane);
      i = index_at(p.indices64, p.indices32, n * p.k + j0 + lane);
    }
    const int count = static_cast<int>(p.k - j0 < 32 ? p.k - j0 : 32);
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const float vj = __shfl_sync(0xffffffffu, v, j);
      const int64_t ij = __shfl_sync(0xffffffffu, i, j);
      if (vj == 0 || c >= p.d) continue;
      const Four w = load4(W + ij * p.d + c, p.d - c, aligned);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.x[e] = fmaf(vj, w.x[e], sum.x[e]);
    }
  }
  if (p.b_dec && c < p.d) {
    const Four b = load4(static_cast<const T*>(p.b_dec) + c, p.d - c, false);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.x[e] += b.x[e];
  }
  return sum;
}

__device__ __forceinline__ float target_at(const ResidualParams& p, const float*, int64_t at) {
  return static_cast<const float*>(p.target)[at];
}
template <class T>
__device__ __forceinline__ float target_at(const ResidualParams& p, const T*, int64_t at) {
  return p.target_float ? static_cast<const float*>(p.target)[at]
                        : load(static_cast<const T*>(p.target) + at);
}

// residual = false: out of DecodeParams. True: columns [start, start + columns) of the residual.
template <class T, bool kResidual>
__global__ void __launch_bounds__(kThreads, 8)
    decode_kernel(ResidualParams p, int64_t first, int64_t slices, bool aligned) {
  const DecodeParams& q = p.decode;
  const int64_t at = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (at >= q.N * slices) return;
  const int64_t n = at % q.N;
  const int64_t c = (first + at / q.N) * kSlice + 4 * (threadIdx.x % 32);
  const Four sum = decode4<T>(q, n, c, aligned);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int64_t column = c + e;
    if (!kResidual) {
      if (column < q.d) store(static_cast<T*>(q.out) + n * q.d + column, sum.x[e]);
    } else if (column >= p.start && column < p.start + p.columns) {
      const float target = target_at(p, static_cast<const T*>(nullptr), n * q.d + column);
      p.residual[n * p.columns + column - p.start] = sum.x[e] - target;
    }
  }
}

// <row, W> over d columns by one warp; the same number in every lane.
template <class R, class T>
__device__ __forceinline__ float dot(const R* row, const T* w, int64_t d, bool aligned) {
  float sum = 0;
#pragma unroll 2
  for (int64_t c = 4 * (threadIdx.x % 32); c < d; c += kSlice) {
    const Four a = load4(row + c, d - c, aligned), b = load4(w + c, d - c, aligned);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum = fmaf(a.x[e], b.x[e], sum);
  }
  return warp_sum(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    residual_kernel(ResidualParams p, float* rows, bool aligned) {
  KSAE_SHARED_BYTES(shared);
  const DecodeParams& q = p.decode;
  const int64_t n = blockIdx.x;
  auto* scratch = reinterpret_cast<double*>(shared);
  float* row = rows ? rows + n * q.d : reinterpret_cast<float*>(scratch + kThreads / 32);
  double square = 0;
  for (int64_t c0 = 0; c0 < q.d; c0 += 4 * kThreads) {
    const int64_t c = c0 + 4 * threadIdx.x;
    const Four sum = decode4<T>(q, n, c, aligned);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t column = c + e;
      if (column >= q.d) continue;
      const float r = sum.x[e] - target_at(p, static_cast<const T*>(nullptr), n * q.d + column);
      row[column] = r;
      square += double(r) * r;
      if (column >= p.start && column < p.start + p.columns)
        p.residual[n * p.columns + column - p.start] = r;
    }
  }
  square = block_sum(square, scratch);  // a barrier: the row is complete
  if (threadIdx.x == 0) p.sq_error[n] = square;
  const T* W = static_cast<const T*>(q.W_dec);
  for (int64_t j = threadIdx.x / 32; j < q.k; j += kThreads / 32) {
    const int64_t at = n * q.k + j;
    float g = 0;
    if (load(static_cast<const T*>(q.values) + at) != 0)
      g = dot(row, W + index_at(q.indices64, q.indices32, at) * q.d, q.d, aligned);
    if (threadIdx.x % 32 == 0) p.grad_values[at] = g;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    backward_values_kernel(DecodeBackwardValuesParams p, bool aligned) {
  const int64_t at = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (at >= p.N * p.k) return;
  const T* W = static_cast<const T*>(p.W_dec) + index_at(p.indices64, p.indices32, at) * p.d;
  const float g = dot(static_cast<const T*>(p.grad) + at / p.k * p.d, W, p.d, aligned);
  if (threadIdx.x % 32 == 0) store(static_cast<T*>(p.grad_values) + at, g);
}

template <bool kResidual>
cudaError_t launch_slices(const ResidualParams& p, cudaStream_t stream) {
  if (p.decode.N == 0 || p.columns == 0) return cudaSuccess;
  const int64_t first = p.start / kSlice;
  const int64_t slices = (p.start + p.columns - 1) / kSlice - first + 1;
  const int64_t blocks = (p.decode.N * slices + kThreads / 32 - 1) / (kThreads / 32);
  if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
  return with_type(p.decode.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = aligned4(static_cast<const T*>(p.decode.W_dec), p.decode.d);
    KSAE_LAUNCH((decode_kernel<T, kResidual>), static_cast<unsigned>(blocks), kThreads, 0, stream,
                p, first, slices, aligned);
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t sparse_decode(const DecodeParams& p, cudaStream_t stream) {
  ResidualParams all{};
  all.decode = p;
  all.columns = p.d;
  return launch_slices<false>(all, stream);
}

size_t sparse_residual_workspace(const ResidualParams& p) {
  const bool outside = p.sq_error && p.decode.d > kSharedRow;
  return outside ? size_t(p.decode.N) * p.decode.d * sizeof(float) : 0;
}

cudaError_t sparse_residual(const ResidualParams& p, void* workspace, cudaStream_t stream) {
  if (!p.sq_error) return launch_slices<true>(p, stream);
  const DecodeParams& q = p.decode;
  if (q.N == 0) return cudaSuccess;
  if (!grid_fits(q.N)) return cudaErrorInvalidConfiguration;
  const bool outside = q.d > kSharedRow;
  const size_t bytes =
      kThreads / 32 * sizeof(double) + (outside ? 0 : (q.d + 3) / 4 * 4 * sizeof(float));
  return with_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = aligned4(static_cast<const T*>(q.W_dec), q.d);
    float* rows = outside ? static_cast<float*>(workspace) : nullptr;
    KSAE_LAUNCH((residual_kernel<T>), static_cast<unsigned>(q.N), kThreads, bytes, stream, p, rows,
                aligned);
    return cudaGetLastError();
  });
}

cudaError_t sparse_decode_backward_values(const DecodeBackwardValuesParams& p,
                                          cudaStream_t stream) {
  const int64_t blocks = (p.N * p.k + kThreads / 32 - 1) / (kThreads / 32);
  if (blocks == 0) return cudaSuccess;
  if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = aligned4(static_cast<const T*>(p.W_dec), p.d) &&
                         aligned4(static_cast<const T*>(p.grad), p.d);
    KSAE_LAUNCH((backward_values_kernel<T>), static_cast<unsigned>(blocks), kThreads, 0, stream, p,
                aligned);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
