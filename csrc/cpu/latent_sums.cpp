// SPDX-License-Identifier: Apache-2.0
// latent_sums, threaded over latents (the kernel: isa/latent_sums.cpp).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "ksae/op.h"
#include "parallel.h"

namespace ksae::cpu {

using SumsPass = void(const LatentSumsParams& p, int64_t i0, int64_t i1);
KSAE_EACH_LEVEL(SumsPass, sums_pass)

bool all_finite(const float* scales, int n) {
  return std::all_of(scales, scales + n, [](float s) { return std::isfinite(s); });
}

void latent_sums(const LatentSumsParams& p, int threads) {
  if (!all_finite(p.scales, p.n_groups)) {
    std::memset(p.grad_b_enc, 0, size_t(p.F) * 4);
    std::memset(p.grad_dot_w, 0, size_t(p.F) * 4);
    return;
  }
  parallel_blocks(p.F, 1024, threads,
                  [&](int64_t i0, int64_t i1, int) { sums_pass_here()(p, i0, i1); });
}

namespace {

using Group = LatentSumsGroup;
const Field kGroup[] = {
    KSAE_FIELD(Group, offsets),
    KSAE_FIELD(Group, order),
    KSAE_FIELD(Group, values),
    KSAE_FIELD(Group, grads),
};
using P = LatentSumsParams;
const Field kFields[] = {
    KSAE_FIELD(P, F),      KSAE_FIELD(P, dtype),      KSAE_LIST(P, groups, n_groups, kGroup),
    KSAE_FIELD(P, scales), KSAE_FIELD(P, grad_b_enc), KSAE_FIELD(P, grad_dot_w),
};
const OpOf<int, P, latent_sums> op("latent_sums", kFields);

}  // namespace

}  // namespace ksae::cpu
