// SPDX-License-Identifier: Apache-2.0
// latent_sums, threaded over latents (the kernel: isa/latent_sums.cpp).
#include <algorithm>
#include <cmath>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {

bool all_finite(const float* scales, int n) {
  return std::all_of(scales, scales + n, [](float s) { return std::isfinite(s); });
}

void latent_sums(const LatentSumsParams& p, int threads) {
  if (!all_finite(p.scales, p.n_groups)) return;
  parallel_blocks(p.F, 1024, threads,
                  [&](int64_t i0, int64_t i1, int) { kernels().latent_sums(p, i0, i1); });
}

}  // namespace ksae::cpu
