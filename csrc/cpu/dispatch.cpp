// SPDX-License-Identifier: Apache-2.0
// Choice of the instruction-set level, once, by cpuid.
#include <cstring>

#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ksae::cpu {
namespace {

constexpr const char* kNames[kLevels] = {"plain", "avx2", "avx512", "avx512bf16"};

bool supported(int level) {
  if (level == 0) return true;
#ifdef KSAE_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (level == 1) return avx2;
  if (level == 2) return avx512;
  if (level == 3) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

int best() {
  int level = kLevels - 1;
  while (!supported(level)) --level;
  return level;
}

int& level() {
  static int current = best();
  return current;
}

}  // namespace

const char* level_name(int level) { return kNames[level]; }
bool level_available(int level) { return level >= 0 && level < kLevels && supported(level); }
int current_level() { return level(); }
bool set_level(int wanted) {
  if (!level_available(wanted)) return false;
  level() = wanted;
  return true;
}

int openmp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

const Kernels& kernels() {
  switch (level()) {
#ifdef KSAE_HAVE_X86
    case 1:
      return avx2_kernels();
    case 2:
      return avx512_kernels();
    case 3:
      return avx512bf16_kernels();
#endif
    default:
      return plain_kernels();
  }
}

bool can_screen() { return kernels().has_dot; }

void* Arena::take(size_t bytes) {
  const size_t at = used;
  used += (bytes + 63) & ~size_t(63);
  return base ? base + at : nullptr;
}

}  // namespace ksae::cpu
