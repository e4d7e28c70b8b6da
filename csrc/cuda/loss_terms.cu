// SPDX-License-Identifier: Apache-2.0
// The terms of a step's loss and their scales. One block: it replaces tens of launches on single
// numbers. Squared errors are added in double, in a fixed order. Bytes: 8 a token and term.
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

}  // namespace

cudaError_t loss_terms(const LossTermsParams& p, cudaStream_t stream) {
  if (p.n_terms > kMaxTerms) return cudaErrorInvalidValue;
  Terms args{};
  args.p = p;
  for (int g = 0; g < p.n_terms; ++g) args.term[g] = p.of_terms[g];
  KSAE_LAUNCH(terms_kernel, 1u, kThreads, kThreads / 32 * sizeof(double), stream, args);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
