// SPDX-License-Identifier: Apache-2.0
// Gradient of W_dec: the gradients of the tokens that chose a latent are summed in L1, in their
// order. Cost: d elements gathered an entry, F d written; flops 2 d an entry. Limits: a latent is
// one thread's: one that every token selects is N d elements of serial work.
#include "add_row.h"
#include "rows.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

template <class T>
void backward_weight_latents(const DecodeBackwardWeightParams& p, const int32_t* offsets,
                             const int32_t* order, int64_t i0, int64_t i1, float* acc) {
  const int64_t d = p.d;
  const T* grad = static_cast<const T*>(p.grad);
  for (int64_t i = i0; i < i1; ++i) {
    clear(acc, d + kWidth);
    float total = 0;
    for (int32_t h = offsets[i]; h < offsets[i + 1]; ++h) {
      const float v = to_float(static_cast<const T*>(p.values)[order[h]]);
      add_row<T>(acc, v, grad + row_of(p, order[h]) * d, nullptr, d);
      total += v;
    }
    T* out = static_cast<T*>(p.grad_W) + i * d;
    for (int64_t c = 0; c < d; c += kWidth) store_part(out, load(acc + c), c, d);
    from_float(total, static_cast<T*>(p.value_sum)[i]);
  }
}

void backward_weight(const DecodeBackwardWeightParams& p, const int32_t* offsets,
                     const int32_t* order, int64_t i0, int64_t i1, float* scratch) {
  with_dtype(p.dtype, [&](auto tag) {
    backward_weight_latents<typename decltype(tag)::type>(p, offsets, order, i0, i1, scratch);
  });
}

}  // namespace

void backward_weight_table(Kernels& t) { t.backward_weight = backward_weight; }

}  // namespace ksae::cpu::KSAE_ISA
