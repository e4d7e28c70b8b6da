// SPDX-License-Identifier: Apache-2.0
// The numbers of a training step: the terms of its loss, and what Adam wants to know. One block
// each: what it replaces is tens of launches on single numbers.
//
// loss_terms adds squared errors in double, in a fixed order. Bytes: 8 a token and term.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 512;

struct Terms {
  LossTermsParams p;  // its host pointer to terms is not used
  LossTerm term[kMaxTerms];
};

__global__ void __launch_bounds__(kThreads) terms_kernel(Terms args) {
  KSAE_SHARED_BYTES(shared);
  const LossTermsParams& p = args.p;
  float loss = 0;
  for (int g = 0; g < p.n_terms; ++g) {
    const LossTerm& term = args.term[g];
    double sum = 0;
#pragma unroll 8
    for (int64_t n = threadIdx.x; n < term.N; n += kThreads) sum += term.sq_error[n];
    sum = block_sum(sum, reinterpret_cast<double*>(shared));
    if (threadIdx.x != 0) continue;
    const float below = *term.denominator, error = static_cast<float>(sum);
    const float weight = g == 0 || below > 0 ? 1 / below : 0;
    p.errors[g] = error;
    p.terms[g] = error * weight;
    p.scales[g] = 2 * term.share * weight;
    loss += term.share * (error * weight);
  }
  if (threadIdx.x == 0) *p.loss = loss;
}

__global__ void adam_kernel(AdamScalarsParams p) {
  const double beta1 = p.constants[0], beta2 = p.constants[1], eps = p.constants[2];
  const double t = *p.t + 1;
  const bool taken = finite(*p.loss) && (!p.norm || finite(*p.norm));
  float grad_scale = 1;
  if (p.norm) {
    const float limit = p.clip_norm / (*p.norm + 1e-6f);
    grad_scale = limit > 1 ? 1 : limit;  // NaN stays
  }
  p.hyper[0] = static_cast<float>(*p.lr / (1 - pow(beta1, t)));
  p.hyper[1] = static_cast<float>(sqrt(1 - pow(beta2, t)));
  p.hyper[2] = static_cast<float>(beta1);
  p.hyper[3] = static_cast<float>(beta2);
  p.hyper[4] = static_cast<float>(eps);
  p.hyper[5] = grad_scale;
  p.hyper[6] = static_cast<float>(1 - beta1);
  p.hyper[7] = static_cast<float>(1 - beta2);
  *p.taken = taken;
  for (int g = 0; g < p.n_scales; ++g)
    p.taken_scales[g] = taken ? p.scales[g] : __int_as_float(0x7fffffff);
}

}  // namespace

cudaError_t loss_terms(const LossTermsParams& p, cudaStream_t stream) {
  if (p.n_terms > kMaxTerms) return cudaErrorInvalidValue;
  Terms args{};
  args.p = p;
  for (int g = 0; g < p.n_terms; ++g) args.term[g] = p.of_terms[g];
  KSAE_LAUNCH(terms_kernel, 1u, kThreads, kThreads / 32 * sizeof(double), stream, args);
  return cudaGetLastError();
}

cudaError_t adam_scalars(const AdamScalarsParams& p, cudaStream_t stream) {
  KSAE_LAUNCH(adam_kernel, 1u, 1u, 0, stream, p);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
