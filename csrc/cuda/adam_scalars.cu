// SPDX-License-Identifier: Apache-2.0
// What Adam's passes want to know of a step: bias corrections, the factor of clipping, and whether
// the step is taken. One thread: it replaces tens of launches on single numbers.
#include "common.h"

namespace ksae::cuda {
namespace {

__global__ void adam_kernel(AdamScalarsParams p) {
  const double beta1 = p.constants[0], beta2 = p.constants[1], eps = p.constants[2];
  const double t = *p.t + 1;
  const bool taken = finite(*p.loss) && (!p.norm || finite(*p.norm));
  float grad_scale = 1;
  if (p.norm) {
    const float norm = *p.norm, least = norm < 0x1p-126f ? 0x1p-126f : norm;  // NaN stays
    const float limit = p.clip_norm / (p.always ? least : norm + 1e-6f);
    const float most = p.always ? 3.4028235e38f : 1.0f;
    grad_scale = limit > most ? most : limit;
  }
  p.hyper[0] = static_cast<float>(*p.lr / (1 - pow(beta1, t)));
  p.hyper[1] = static_cast<float>(sqrt(1 - pow(beta2, t)));
  p.hyper[2] = static_cast<float>(beta1);
  p.hyper[3] = static_cast<float>(beta2);
  p.hyper[4] = static_cast<float>(eps);
  p.hyper[5] = grad_scale;
  p.hyper[6] = static_cast<float>(1 - beta1);
  p.hyper[7] = static_cast<float>(1 - beta2);
  for (int j = 1; j < 8; ++j) p.of_decoder[j] = p.hyper[j];
  p.of_decoder[0] = p.hyper[0] * p.decoder_lr;
  *p.taken = taken;
  for (int g = 0; g < p.n_scales; ++g)
    p.taken_scales[g] = taken ? p.scales[g] : __int_as_float(0x7fffffff);
}

}  // namespace

cudaError_t adam_scalars(const AdamScalarsParams& p, cudaStream_t stream) {
  KSAE_LAUNCH(adam_kernel, 1u, 1u, 0, stream, p);
  return cudaGetLastError();
}

}  // namespace ksae::cuda
