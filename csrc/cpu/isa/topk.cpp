// SPDX-License-Identifier: Apache-2.0
// topk of stored rows: one read of the row through the gate of gate.h.
// Cost: N F elements read once; a compare a vector, plus about k (1 + ln(F / k)) appends a row.
#include "gate.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

template <class T>
void topk_row(const TopkParams& p, int64_t n, void* scratch) {
  const int64_t F = p.F, k = p.k, capacity = k + (k > 256 ? k : 256);
  const T* x = static_cast<const T*>(p.x) + n * F;
  auto* sort = static_cast<uint64_t*>(scratch);  // [2 k]
  auto* score = reinterpret_cast<float*>(sort + 2 * k);
  auto* index = reinterpret_cast<int32_t*>(score + capacity + kVectorPad);
  auto* keys = reinterpret_cast<uint32_t*>(index + capacity + kVectorPad);
  float tau = __builtin_nanf("");
  int64_t count = 0;
  for (int64_t i = 0; i < F; i += kWidth) {
    const int lanes = F - i < kWidth ? int(F - i) : kWidth;
    const Vec s = lanes == kWidth ? load(x + i) : load_n(x + i, lanes);
    const uint32_t hits = not_le(s, splat(tau)) & ((1u << lanes) - 1);
    if (!hits) continue;
    if (count + kWidth > capacity) {
      tau = refine(score, index, count, k, keys);
      count = k;
    }
    compress_iota(index + count, hits, int32_t(i));
    count += compress(score + count, hits, s);
  }
  if (count > k) refine(score, index, count, k, keys);
  for (int64_t j = 0; j < k; ++j) sort[j] = sort_key(score[j], index[j]);
  sort_keys(sort, k, sort + k);
  T* values = static_cast<T*>(p.values) + n * k;
  for (int64_t j = 0; j < k; ++j) {
    const int32_t i = key_index(sort[j]);
    p.indices[n * k + j] = i;
    values[j] = x[i];  // its own bits: -0 and NaN payloads stay
  }
}

void topk_rows(const TopkParams& p, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto tag) {
    for (int64_t n = row0; n < row1; ++n) topk_row<typename decltype(tag)::type>(p, n, scratch);
  });
}

}  // namespace

void topk_table(Kernels& t) { t.topk = topk_rows; }

}  // namespace ksae::cpu::KSAE_ISA
