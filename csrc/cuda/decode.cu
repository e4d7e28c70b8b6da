// SPDX-License-Identifier: Apache-2.0
// Token-major gathers of decoder rows.
//
// sparse_decode and slices of the residual: one warp a token and 128 columns, slices outermost, so
// that 128 columns of W_dec (256 F bytes at 16 bits) are what the L2 cache has to hold. The whole
// residual: one block a token, its row in shared memory, from which the products with the chosen
// rows are taken while these rows are still in cache. With column sums, a block takes N / kShares
// tokens one after the other and keeps their sum. All sums have a fixed order.
//
// Bytes: N k d sizeof(T) gathered (twice for the residual), N d written; for column sums 8 kShares
// d instead of another reading of the residual. Flops: 2 N k d (4 N k d). Limits: a residual row
// longer than kSharedRow numbers lies in the workspace.
//
// AuxK has k_aux slots a token whatever is dead, for only the device knows how many latents are.
// Slots of value 0 are passed over 32 at a time: with nothing dead they cost their own reading, and
// no row's. A used slot costs 10 d bytes of gathers at 16 bits: W_dec twice here, the residual and
// x in the latent pass. Products with the compacted dead rows would take 8 d flops a token and row
// instead: at a hundred flops in the time of a byte, the shorter way if more than one dead latent
// in a hundred is used. But a product has its size from the host. To ask for it is to wait for the
// device, and a CUDA graph keeps the answer; with a fixed capacity of C rows, every step pays 4 C /
// F of the encoder's product, and dead latents beyond C come back here.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSumThreads = 1024;
constexpr int kSlice = 128;  // columns a warp
constexpr int64_t kSharedRow = 11 * 1024;
constexpr int64_t kShares = 1024;  // of the tokens, for column sums

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
    if (!__any_sync(0xffffffffu, v != 0)) continue;
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

// A block takes tokens [share * block, share * (block + 1)).
template <class T>
__global__ void __launch_bounds__(kThreads, 10)
    residual_kernel(ResidualParams p, float* rows, float* sums, int64_t share, bool aligned) {
  KSAE_SHARED_BYTES(shared);
  const DecodeParams& q = p.decode;
  auto* scratch = reinterpret_cast<double*>(shared);
  float* row = rows ? rows + blockIdx.x * q.d : reinterpret_cast<float*>(scratch + kThreads / 32);
  const int64_t first = blockIdx.x * share, last = first + share < q.N ? first + share : q.N;
  for (int64_t n = first; n < last; ++n) {
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
        if (sums) {  // [blocks, d], each number of one thread
          float* total = sums + blockIdx.x * q.d + column;
          *total = n == first ? r : *total + r;
        }
      }
    }
    square = block_sum(square, scratch);  // a barrier: the row is complete
    if (threadIdx.x == 0) p.sq_error[n] = square;
    const T* W = static_cast<const T*>(q.W_dec);
    // A warp takes every fourth slot, a lane every 32nd of these.
    const int lane = threadIdx.x % 32;
    for (int64_t j0 = 0; j0 < q.k; j0 += kThreads) {
      const int64_t j = j0 + lane * (kThreads / 32) + threadIdx.x / 32, at = n * q.k + j;
      const bool used = j < q.k && load(static_cast<const T*>(q.values) + at) != 0;
      const int64_t i = used ? index_at(q.indices64, q.indices32, at) : 0;
      float g = 0;
      for (unsigned rest = __ballot_sync(0xffffffffu, used); rest; rest &= rest - 1) {
        const int from = __ffs(static_cast<int>(rest)) - 1;
        const float product = dot(row, W + __shfl_sync(0xffffffffu, i, from) * q.d, q.d, aligned);
        if (lane == from) g = product;
      }
      if (j < q.k) p.grad_values[at] = g;
    }
    __syncthreads();  // the row is read before the next token's is written
  }
}

// out[c] = sum of sums[:, c]: a lane a column, a warp every 32nd row; warps in their order.
__global__ void __launch_bounds__(kSumThreads)
    column_sums_kernel(const float* sums, int64_t rows, int64_t d, float* out) {
  KSAE_SHARED_BYTES(shared);
  auto* partial = reinterpret_cast<float*>(shared);  // [warps, 32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (c < d) {
#pragma unroll 8
    for (int64_t r = warp; r < rows; r += kSumThreads / 32) sum += sums[r * d + c];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || c >= d) return;
  for (int w = 1; w < kSumThreads / 32; ++w) sum += partial[32 * w + lane];
  out[c] = sum;
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

// Who takes which tokens of the whole residual: from N alone, so that sums are the same everywhere.
struct Blocks {
  int64_t share, count;
  bool outside;  // rows do not fit in shared memory

  explicit Blocks(const ResidualParams& p)
      : share(p.column_sums ? (p.decode.N + kShares - 1) / kShares : 1),
        count(share ? (p.decode.N + share - 1) / share : 0),
        outside(p.decode.d > kSharedRow) {}
};

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

// Rows outside of shared memory, then sums, of as many blocks.
size_t sparse_residual_workspace(const ResidualParams& p) {
  if (!p.sq_error) return 0;
  const Blocks blocks(p);
  return (blocks.outside + (p.column_sums ? 1 : 0)) * blocks.count * p.decode.d * sizeof(float);
}

cudaError_t sparse_residual(const ResidualParams& p, void* workspace, cudaStream_t stream) {
  const DecodeParams& q = p.decode;
  if (q.N == 0)  // before sq_error is looked at: empty tensors may have no address
    return p.column_sums ? cudaMemsetAsync(p.column_sums, 0, q.d * sizeof(float), stream)
                         : cudaSuccess;
  if (!p.sq_error) return launch_slices<true>(p, stream);
  const Blocks blocks(p);
  if (!grid_fits(blocks.count)) return cudaErrorInvalidConfiguration;
  const size_t bytes =
      kThreads / 32 * sizeof(double) + (blocks.outside ? 0 : (q.d + 3) / 4 * 4 * sizeof(float));
  auto* memory = static_cast<float*>(workspace);
  float* rows = blocks.outside ? memory : nullptr;
  float* sums = p.column_sums ? memory + blocks.outside * blocks.count * q.d : nullptr;
  return with_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = aligned4(static_cast<const T*>(q.W_dec), q.d);
    KSAE_LAUNCH((residual_kernel<T>), static_cast<unsigned>(blocks.count), kThreads, bytes, stream,
                p, rows, sums, blocks.share, aligned);
    if (sums)
      KSAE_LAUNCH(column_sums_kernel, static_cast<unsigned>((q.d + 31) / 32), kSumThreads,
                  kSumThreads * sizeof(float), stream, sums, blocks.count, q.d, p.column_sums);
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
