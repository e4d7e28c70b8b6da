// SPDX-License-Identifier: Apache-2.0
// The table of this level's kernels.
#include "../isa.h"

namespace ksae::cpu {
namespace KSAE_ISA {
void topk_table(Kernels& t);
void topk_encode_table(Kernels& t);
void grad_topk_encode_table(Kernels& t);
void batch_topk_encode_table(Kernels& t);
void threshold_encode_table(Kernels& t);
void sparse_decode_table(Kernels& t);
void prefix_residual_table(Kernels& t);
void backward_weight_table(Kernels& t);
}  // namespace KSAE_ISA

#define KSAE_JOIN2(a, b) a##b
#define KSAE_JOIN(a, b) KSAE_JOIN2(a, b)

const Kernels& KSAE_JOIN(KSAE_ISA, _kernels)() {
  static Kernels table;
  static const bool filled = [] {
    KSAE_ISA::topk_table(table);
    KSAE_ISA::topk_encode_table(table);
    KSAE_ISA::grad_topk_encode_table(table);
    KSAE_ISA::batch_topk_encode_table(table);
    KSAE_ISA::threshold_encode_table(table);
    KSAE_ISA::sparse_decode_table(table);
    KSAE_ISA::prefix_residual_table(table);
    KSAE_ISA::backward_weight_table(table);
    return true;
  }();
  (void)filled;
  return table;
}

}  // namespace ksae::cpu
