// SPDX-License-Identifier: Apache-2.0
// How the passes over latents read and write: rows of entries, several on their way at once, and
// what is streamed beside them.
#pragma once

#include "common.h"

namespace ksae::cuda {

// As row4, of what nothing reads again before the cache is needed for rows.
template <bool kAligned>
__device__ __forceinline__ Four stream4(const float* p, int64_t valid) {
  if (!kAligned) return load4(p, valid, false);
  const float4 r = __ldcs(reinterpret_cast<const float4*>(p));
  return {{r.x, r.y, r.z, r.w}};
}
template <bool kAligned>
__device__ __forceinline__ auto stream4(const __nv_bfloat16* p, int64_t valid) {
  if constexpr (kAligned) {
    const uint2 r = __ldcs(reinterpret_cast<const uint2*>(p));
    Packed<__nv_bfloat16, 4> four;
    memcpy(&four, &r, sizeof(r));
    return four;
  } else {
    return load4(p, valid, false);
  }
}

// Stores the first `valid` of four numbers that nothing reads again before the cache is needed.
template <bool kAligned>
__device__ __forceinline__ void stream_store4(float* p, const Four& r, int64_t valid) {
  if (!kAligned) return store4(p, r, valid, false);
  __stcs(reinterpret_cast<float4*>(p), float4{r.x[0], r.x[1], r.x[2], r.x[3]});
}
template <bool kAligned>
__device__ __forceinline__ void stream_store4(__nv_bfloat16* p, const Four& r, int64_t valid) {
  if (!kAligned) return store4(p, r, valid, false);
  __stcs(reinterpret_cast<uint2*>(p), uint2{two(p, r.x[0], r.x[1]), two(p, r.x[2], r.x[3])});
}

// The numbers as storage of type T has them.
template <class T>
__device__ __forceinline__ Four rounded4(Four r) {
  if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T narrow;
      store(&narrow, r.x[j]);
      r.x[j] = load(&narrow);
    }
  }
  return r;
}

template <class Row>
__device__ __forceinline__ Four numbers(const Row& row) {
  return {{number(row, 0), number(row, 1), number(row, 2), number(row, 3)}};
}

// Adds scale * coefficient * (row - centre) of entries [from, to), in their order, to columns
// [c, c + 4), of rows of `all` columns; to what nobody reads past the last. All 32 lanes call, for
// the same entries: a lane looks up each 32nd, and rows are on their way four at a time.
template <bool kAligned, class C, class R>
__device__ __forceinline__ void add_entries(const RowGroup& group, int64_t all, float scale,
                                            int32_t from, int32_t to, int64_t c, const Four& centre,
                                            Four& sum) {
  constexpr int kBatch = kAligned ? 4 : 2;
  const int lane = threadIdx.x % 32;
  const auto columns = static_cast<uint32_t>(all);
  const int64_t own = c < columns ? c : 0, valid = columns - own;
  const R* rows = static_cast<const R*>(group.rows) + own;
  for (int32_t e0 = from; e0 < to; e0 += 32) {
    const int count = to - e0 < 32 ? to - e0 : 32;
    float a = 0;
    uint32_t n = 0;
    if (lane < count) {
      const auto at = static_cast<uint32_t>(group.order[e0 + lane]);
      a = scale * load(static_cast<const C*>(group.coefficients) + at);
      if (group.row_of)
        n = static_cast<uint32_t>(group.row_of[at]);
      else
        n = at / static_cast<uint32_t>(group.k);
    }
    for (int e = 0; e < count; e += kBatch) {
      float by[kBatch];
      decltype(row4<kAligned>(rows, valid)) row[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        by[b] = __shfl_sync(0xffffffffu, a, e + b);
        const uint32_t at = __shfl_sync(0xffffffffu, n, e + b);
        if (by[b] != 0) row[b] = row4<kAligned>(rows + uint64_t(at) * columns, valid);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (by[b] == 0) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum.x[j] = fmaf(by[b], number(row[b], j) - centre.x[j], sum.x[j]);
      }
    }
  }
}

}  // namespace ksae::cuda
