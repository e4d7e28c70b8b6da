// SPDX-License-Identifier: Apache-2.0
// Adam of a dense parameter: biases, and the matrix of a skip connection. One thread a number.
//
// Bytes a number: 4 a gradient, 16 of moments, 8 of float32 parameters (10 to 12 with a master).
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;

struct Args {
  VectorUpdateParams p;  // its host pointer to gradients is not used
  const float* grad[kMaxTerms];
};

template <class T>
__global__ void __launch_bounds__(kThreads) vector_kernel(Args args) {
  const VectorUpdateParams& p = args.p;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.size || !*p.taken) return;
  float g = 0;
#pragma unroll
  for (int n = 0; n < kMaxTerms; ++n)  // a loop of unknown length would copy the list
    if (n < p.n_grads) g += (p.scales ? p.scales[n] : 1.0f) * args.grad[n][i];
  if (p.minus) g -= p.minus[i];
  g *= p.hyper[5];
  const float m = p.hyper[2] * p.m[i] + p.hyper[6] * g;
  const float v = p.hyper[3] * p.v[i] + p.hyper[7] * g * g;
  T* weight = static_cast<T*>(p.p) + i;
  float theta = p.master ? p.master[i] : load(weight);
  theta -= p.hyper[0] * m / (sqrtf(v) / p.hyper[1] + p.hyper[4]);
  p.m[i] = m;
  p.v[i] = v;
  if (p.master) p.master[i] = theta;
  store(weight, theta);
}

}  // namespace

cudaError_t vector_update(const VectorUpdateParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.size + kThreads - 1) / kThreads;
  if (p.n_grads > kMaxTerms || !grid_fits(blocks)) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  Args args{};
  args.p = p;
  for (int n = 0; n < p.n_grads; ++n) args.grad[n] = p.grads[n];
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KSAE_LAUNCH((vector_kernel<T>), static_cast<unsigned>(blocks), kThreads, 0, stream, args);
    return cudaGetLastError();
  });
}

}  // namespace ksae::cuda
