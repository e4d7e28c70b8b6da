// SPDX-License-Identifier: Apache-2.0
// Two sums over the entries of each latent, in double and in their order: the gradient of its bias,
// and of its decoder row along that row.
// Cost: bytes an entry 4 of order, and gathered the value and its gradient; flops 4 an entry.
#include "gate.h"

namespace ksae::cpu::KSAE_ISA {

void sums_pass(const LatentSumsParams& p, int64_t i0, int64_t i1) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = i0; i < i1; ++i) {
      double bias = 0, grad_dot_w = 0;
      for (int g = 0; g < p.n_groups; ++g) {
        const LatentSumsGroup& group = p.groups[g];
        double b = 0, w = 0;
        for (int32_t h = group.offsets[i]; h < group.offsets[i + 1]; ++h) {
          const double grad = group.grads[group.order[h]];
          b += grad;
          w += grad * to_float(static_cast<const T*>(group.values)[group.order[h]]);
        }
        bias += p.scales[g] * b;
        grad_dot_w += p.scales[g] * w;
      }
      p.grad_b_enc[i] = float(bias);
      p.grad_dot_w[i] = float(grad_dot_w);
    }
  });
}

}  // namespace ksae::cpu::KSAE_ISA
