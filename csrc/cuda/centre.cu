// SPDX-License-Identifier: Apache-2.0
// The encoder's part of the gradient of b_dec: W^T grad_b_enc, for W as it was before its update.
//
// Latents are cut in kShares shares, whatever the device; a block sums one share and 512 columns,
// and the shares are added in their order. Rows whose gradient is 0, as of latents without entries,
// are not read. Bytes: the rows of W that have entries, 8 kShares d of partial sums. Flops: 2 a
// number read.
#include "latent.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kShares = 512;

template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    centre_kernel(RowUpdateParams p, float* sums, int64_t share, int64_t slices, bool aligned) {
  const int64_t at = blockIdx.x / slices;
  const int64_t c = (blockIdx.x % slices * kThreads + threadIdx.x) * 4;
  if (c >= p.d || !all_finite(p.scales, p.n_groups)) return;
  const int64_t first = at * share, last = first + share < p.F ? first + share : p.F;
  Four sum{};
#pragma unroll 4
  for (int64_t i = first; i < last; ++i) {
    const float s = p.grad_b_enc[i];
    if (s == 0) continue;
    const Four w = load4(static_cast<const T*>(p.W) + i * p.d + c, p.d - c, aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.x[j] = fmaf(s, w.x[j], sum.x[j]);
  }
  store4(sums + at * p.d + c, sum, p.d - c, false);
}

__global__ void __launch_bounds__(kThreads, 8)
    centre_sum_kernel(RowUpdateParams p, const float* sums, int64_t shares) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.d) return;
  float sum = 0;
  if (all_finite(p.scales, p.n_groups)) {
#pragma unroll 8
    for (int64_t s = 0; s < shares; ++s) sum += sums[s * p.d + c];
  }
  p.grad_b_dec[c] = sum;
}

}  // namespace

size_t centre_gradient_workspace(const RowUpdateParams& p) { return kShares * p.d * sizeof(float); }

cudaError_t centre_gradient(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  auto* sums = static_cast<float*>(workspace);
  const int64_t share = (p.F + kShares - 1) / kShares, shares = (p.F + share - 1) / share;
  const int64_t slices = (p.d + 4 * kThreads - 1) / (4 * kThreads);
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = aligned4(static_cast<const T*>(p.W), p.d);
    KSAE_LAUNCH((centre_kernel<T>), static_cast<unsigned>(shares * slices), kThreads, 0, stream, p,
                sums, share, slices, aligned);
    KSAE_LAUNCH(centre_sum_kernel, static_cast<unsigned>((p.d + kThreads - 1) / kThreads), kThreads,
                0, stream, p, sums, shares);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
