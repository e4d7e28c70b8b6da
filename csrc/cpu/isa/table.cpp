// SPDX-License-Identifier: Apache-2.0
// The table of this level's kernels.
#include "../isa.h"

namespace ksae::cpu {
namespace KSAE_ISA {
void encode_table(Kernels& t);
void grad_encode_table(Kernels& t);
void select_table(Kernels& t);
void decode_table(Kernels& t);
void latent_table(Kernels& t);
}  // namespace KSAE_ISA

#define KSAE_JOIN2(a, b) a##b
#define KSAE_JOIN(a, b) KSAE_JOIN2(a, b)

const Kernels& KSAE_JOIN(KSAE_ISA, _kernels)() {
  static Kernels table;
  static const bool filled = [] {
    KSAE_ISA::encode_table(table);
    KSAE_ISA::grad_encode_table(table);
    KSAE_ISA::select_table(table);
    KSAE_ISA::decode_table(table);
    KSAE_ISA::latent_table(table);
    return true;
  }();
  (void)filled;
  return table;
}

}  // namespace ksae::cpu
