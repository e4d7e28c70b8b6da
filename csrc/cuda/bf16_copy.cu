// SPDX-License-Identifier: Apache-2.0
// The bf16 copy of float32 rows and the norms that bound what it lost; one block a row.
//
// Bytes: 6 an element.
#include "norms.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) bf16_copy_kernel(Bf16CopyParams p) {
  KSAE_SHARED_BYTES(shared);
  const int64_t n = blockIdx.x;
  Squares squares{};
  for (int64_t c = 4 * threadIdx.x; c < p.d; c += 4 * blockDim.x) {
    const Four t = load4(p.t + n * p.d + c, p.d - c, kAligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) squares.add(t.x[j]);  // zero beyond the row
    store4(static_cast<__nv_bfloat16*>(p.copy) + n * p.d + c, t, p.d - c, kAligned);
  }
  store_norms(p.norms, p.rows, n, p.d, squares, reinterpret_cast<double*>(shared));
}

}  // namespace

cudaError_t bf16_copy(const Bf16CopyParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (!grid_fits(p.rows)) return cudaErrorInvalidConfiguration;
  const bool aligned =
      aligned4(p.t, p.d) && aligned4(static_cast<const __nv_bfloat16*>(p.copy), p.d);
  const int64_t wanted = (p.d + 127) / 128 * 32;
  const auto threads = static_cast<unsigned>(wanted < kThreads ? wanted : kThreads);
  return with_alignment(aligned, [&](auto is) {
    KSAE_LAUNCH((bf16_copy_kernel<is.value>), static_cast<unsigned>(p.rows), threads,
                kThreads / 32 * sizeof(double), stream, p);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
