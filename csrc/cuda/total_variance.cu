// SPDX-License-Identifier: Apache-2.0
// Total variance of a batch in one reading: sum over columns of Q - S^2 / N, with S and Q the sums
// of y - pivot and of its square, in double; the pivot is the column's first number. A constant
// column gives exactly 0, and a mean far larger than the spread costs no digits.
//
// Rows are cut in at most kShares shares, whatever the device; a block takes one share and 512
// columns. Then the shares of each column are added, then by the block that comes last the columns,
// all in a fixed order. Bytes: y once, and 24 kShares d at most of partial sums. Flops: 3 a number,
// in double.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kShares = 256;
constexpr int kColumns = 32;                 // of a block of columns_kernel
constexpr int kLanes = kThreads / kColumns;  // threads that share a column there

struct Args {
  TotalVarianceParams p;
  int64_t shares, slices;
  double* sums;     // [shares, d]
  double* squares;  // [shares * slices]
  double* columns;  // [ceil(d / kColumns)] of - S^2 / N
  int32_t* done;    // [1] blocks of columns_kernel that are, cleared by the kernel before
};

int64_t blocks_of_columns(int64_t d) { return (d + kColumns - 1) / kColumns; }

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 6) shares_kernel(Args args) {
  constexpr int kBatch = kAligned ? 16 / sizeof(T) : 2;  // rows that are on their way at once
  KSAE_SHARED_BYTES(shared);
  const TotalVarianceParams& p = args.p;
  const int64_t at = blockIdx.x / args.slices;
  const int64_t c = (blockIdx.x % args.slices * kThreads + threadIdx.x) * 4;
  const int64_t share = (p.N + args.shares - 1) / args.shares;
  const int64_t first = at * share, last = first + share < p.N ? first + share : p.N;
  const int64_t valid = kAligned ? 4 : p.d - c;
  double sum[4] = {}, square[4] = {};
  if (c < p.d) {
    const T* y = static_cast<const T*>(p.y) + c;
    const auto pivot = row4<kAligned>(y, valid);
    for (int64_t n = first; n < last; n += kBatch) {
      decltype(row4<kAligned>(y, valid)) x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)  // past the end the last row, which is not used
        x[b] = row4<kAligned>(y + (n + b < last ? n + b : last - 1) * p.d, valid);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (n + b >= last) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const double t = double(number(x[b], e)) - double(number(pivot, e));
          sum[e] += t;
          square[e] = fma(t, t, square[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < valid) args.sums[at * p.d + c + e] = sum[e];
  }
  const double all = (square[0] + square[1]) + (square[2] + square[3]);
  const double total = block_sum(all, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) args.squares[blockIdx.x] = total;
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.done = 0;
}

// The block that comes last adds the sums of all: squares, and those of the columns.
__global__ void __launch_bounds__(kThreads) columns_kernel(Args args, int64_t squares) {
  KSAE_SHARED_BYTES(shared);
  double* of_lane = reinterpret_cast<double*>(shared);  // [kLanes][kColumns]
  int* last = reinterpret_cast<int*>(of_lane + kThreads);
  const int64_t d = args.p.d;
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  double sum = 0;
  if (c < d) {
#pragma unroll 8
    for (int64_t s = threadIdx.x / kColumns; s < args.shares; s += kLanes)
      sum += args.sums[s * d + c];
  }
  of_lane[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kColumns) {  // one warp
    for (int lane = 1; lane < kLanes; ++lane) sum += of_lane[lane * kColumns + threadIdx.x];
    const double total = warp_sum(-sum * sum / double(args.p.N));
    if (threadIdx.x == 0) {
      args.columns[blockIdx.x] = total;
      __threadfence();
      *last = atomicAdd(args.done, 1) == static_cast<int>(gridDim.x) - 1;
    }
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < squares; i += kThreads) sum += args.squares[i];
#pragma unroll 8
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += __ldcg(args.columns + i);
  sum = block_sum(sum, of_lane);
  if (threadIdx.x == 0) *args.p.variance = static_cast<float>(sum < 0 ? 0 : sum);  // NaN stays
}

Args arguments(const TotalVarianceParams& p, void* workspace) {
  Args args{};
  args.p = p;
  args.shares = p.N < kShares ? p.N : kShares;
  if (args.shares) {  // every share has a row
    const int64_t share = (p.N + args.shares - 1) / args.shares;
    args.shares = (p.N + share - 1) / share;
  }
  args.slices = (p.d + 4 * kThreads - 1) / (4 * kThreads);
  args.sums = static_cast<double*>(workspace);
  args.squares = args.sums + args.shares * p.d;
  args.columns = args.squares + args.shares * args.slices;
  args.done = reinterpret_cast<int32_t*>(args.columns + blocks_of_columns(p.d));
  return args;
}

}  // namespace

size_t total_variance_workspace(const TotalVarianceParams& p) {
  const Args args = arguments(p, nullptr);
  const int64_t numbers = args.shares * (p.d + args.slices) + blocks_of_columns(p.d) + 1;
  return numbers * sizeof(double);
}

cudaError_t total_variance(const TotalVarianceParams& p, void* workspace, cudaStream_t stream) {
  const Args args = arguments(p, workspace);
  const int64_t squares = args.shares * args.slices, columns = blocks_of_columns(p.d);
  if (!grid_fits(squares) || !grid_fits(columns)) return cudaErrorInvalidValue;
  if (squares == 0) return forgotten(cudaMemsetAsync(p.variance, 0, sizeof(float), stream));
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kBytes = kThreads * sizeof(double);
    const bool aligned = aligned4(static_cast<const T*>(p.y), p.d);
    const cudaError_t error = with_alignment(aligned, [&](auto is) {
      KSAE_LAUNCH((shares_kernel<T, is.value>), static_cast<unsigned>(squares), kThreads, kBytes,
                  stream, args);
      return cudaGetLastError();
    });
    if (error != cudaSuccess) return error;
    KSAE_LAUNCH(columns_kernel, static_cast<unsigned>(columns), kThreads, kBytes + sizeof(int),
                stream, args, squares);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
