// SPDX-License-Identifier: Apache-2.0
// group_by_latent: stable counting sort of the N k entries by latent.
//
// The entries are cut into parts; each part counts its latents, a scan over (latent, part) gives
// every part its place, each part writes its positions in order. Stable for any number of parts,
// so the result does not depend on the thread count.
// Cost: the N k indices are read twice, 4 F counters a part.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace ksae::cpu {
namespace {

constexpr int64_t kPartEntries = 1 << 16;  // fewer are not worth a thread

int parts_of(int64_t entries, int threads) {
  return int(std::clamp<int64_t>(entries / kPartEntries, 1, std::clamp(threads, 1, 16)));
}

}  // namespace

bool is_nonzero(Dtype dtype, const void* values, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(values)[i] != 0;
  return (static_cast<const uint16_t*>(values)[i] & 0x7fff) != 0;  // either zero; NaN is not one
}

size_t group_by_latent_workspace(const GroupParams& p, int threads) {
  return size_t(parts_of(p.N * p.k, threads)) * size_t(p.F) * 4;
}

void group_by_latent(const GroupParams& p, void* workspace, int threads) {
  const int64_t entries = p.N * p.k;
  const int parts = parts_of(entries, threads);
  auto* counts = static_cast<int32_t*>(workspace);  // [parts][F]
  const auto latent = [&](int64_t at) { return p.indices64 ? p.indices64[at] : p.indices32[at]; };
  parallel_blocks(parts, 1, threads, [&](int64_t part0, int64_t part1, int) {
    for (int64_t part = part0; part < part1; ++part) {
      int32_t* count = counts + part * p.F;
      std::memset(count, 0, size_t(p.F) * 4);
      for (int64_t at = entries * part / parts; at < entries * (part + 1) / parts; ++at)
        if (is_nonzero(p.dtype, p.values, at)) ++count[latent(at)];
    }
  });
  int32_t total = 0;
  for (int64_t i = 0; i < p.F; ++i) {
    p.offsets[i] = total;
    for (int part = 0; part < parts; ++part) {
      const int32_t n = counts[part * p.F + i];
      counts[part * p.F + i] = total;
      total += n;
    }
  }
  p.offsets[p.F] = total;
  parallel_blocks(parts, 1, threads, [&](int64_t part0, int64_t part1, int) {
    for (int64_t part = part0; part < part1; ++part) {
      int32_t* place = counts + part * p.F;
      for (int64_t at = entries * part / parts; at < entries * (part + 1) / parts; ++at)
        if (is_nonzero(p.dtype, p.values, at)) p.order[place[latent(at)]++] = int32_t(at);
    }
  });
  std::fill(p.order + total, p.order + entries, -1);
}

}  // namespace ksae::cpu
