// SPDX-License-Identifier: Apache-2.0
// Splitting rows or latents over the threads of one OpenMP team. The runtime is the one torch
// loads (same soname), so the two libraries share one pool.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ksae::cpu {

inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}
inline int team_rank() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// f(begin, end, rank) over blocks of [0, n), claimed in turn: rows are independent, so the order
// and the number of threads leave no trace in the result.
template <class Fn>
void parallel_blocks(int64_t n, int64_t block, int threads, Fn f) {
  const int64_t blocks = (n + block - 1) / block;
  const int team = int(std::min<int64_t>(std::max(threads, 1), blocks));
  if (team <= 1) {
    if (n > 0) f(int64_t(0), n, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t b = 0; b < blocks; ++b) f(b * block, std::min(n, (b + 1) * block), team_rank());
}

}  // namespace ksae::cpu
