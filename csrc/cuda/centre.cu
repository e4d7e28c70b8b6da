// SPDX-License-Identifier: Apache-2.0
// The encoder's part of the gradient of b_dec: W^T grad_b_enc, for W as it was before its update.
//
// Latents are cut in kShares shares, whatever the device; a block sums one share and 512 columns,
// and the shares are added in their order. Rows whose gradient is 0, as of latents without entries,
// are not read. Bytes: the rows of W that have entries, 8 kShares d of partial sums. Flops: 2 a
// number read.
#include "latents.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kShares = 512;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8)
    centre_kernel(RowUpdateParams p, float* sums, int64_t share, int64_t slices) {
  constexpr int kBatch = kAligned ? 16 / sizeof(T) : 2;  // rows that are on their way at once
  const int64_t at = blockIdx.x / slices;
  const int64_t c = (blockIdx.x % slices * kThreads + threadIdx.x) * 4;
  if (c >= p.d) return;
  const int64_t first = at * share, last = first + share < p.F ? first + share : p.F;
  const int64_t valid = kAligned ? 4 : p.d - c;
  const T* W = static_cast<const T*>(p.W) + c;
  Four sum{};
  if (all_finite(p.scales, p.n_groups)) {
    for (int64_t i = first; i < last; i += kBatch) {
      float by[kBatch];
      decltype(row4<kAligned>(W, valid)) w[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) by[b] = i + b < last ? p.grad_b_enc[i + b] : 0.0f;
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (by[b] != 0) w[b] = row4<kAligned>(W + (i + b) * p.d, valid);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (by[b] == 0) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) sum.x[j] = fmaf(by[b], number(w[b], j), sum.x[j]);
      }
    }
  }
  store4(sums + at * p.d + c, sum, valid, kAligned);
}

}  // namespace

size_t centre_gradient_workspace(const RowUpdateParams& p) { return kShares * p.d * sizeof(float); }

cudaError_t centre_gradient(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  auto* sums = static_cast<float*>(workspace);
  const int64_t share = (p.F + kShares - 1) / kShares, shares = (p.F + share - 1) / share;
  const int64_t slices = (p.d + 4 * kThreads - 1) / (4 * kThreads);
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cudaError_t error =
        with_alignment(aligned4(static_cast<const T*>(p.W), p.d), [&](auto is) {
          KSAE_LAUNCH((centre_kernel<T, is.value>), static_cast<unsigned>(shares * slices),
                      kThreads, 0, stream, p, sums, share, slices);
          return cudaGetLastError();
        });
    return error == cudaSuccess ? column_sums(sums, shares, p.d, p.grad_b_dec, stream) : error;
  });
}

}  // namespace ksae::cuda
