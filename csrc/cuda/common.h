// SPDX-License-Identifier: Apache-2.0
// What the kernels share: storage types, the order of selection, sums in a fixed order, launches.
#pragma once

#include <type_traits>

#include "ksae/cuda.h"
#include "lang.h"

namespace ksae::cuda {

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }

struct alignas(16) Four {
  float x[4];
};

// Four numbers at p, of which `valid` exist; one vector load where `aligned` says that p allows it.
template <class T>
__device__ __forceinline__ Four load4(const T* p, int64_t valid, bool aligned) {
  Four r;
  if (aligned && valid >= 4) {
    struct alignas(4 * sizeof(T)) Raw {
      T x[4];
    };
    const Raw raw = *reinterpret_cast<const Raw*>(p);
#pragma unroll
    for (int e = 0; e < 4; ++e) r.x[e] = load(&raw.x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) r.x[e] = e < valid ? load(p + e) : 0.0f;
  }
  return r;
}

// Stores the first `valid` of four numbers; as load4.
template <class T>
__device__ __forceinline__ void store4(T* p, const Four& r, int64_t valid, bool aligned) {
  if (aligned && valid >= 4) {
    struct alignas(4 * sizeof(T)) Raw {
      T x[4];
    } raw;
#pragma unroll
    for (int e = 0; e < 4; ++e) store(&raw.x[e], r.x[e]);
    *reinterpret_cast<Raw*>(p) = raw;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < valid) store(p + e, r.x[e]);
  }
}

// Whether rows of `width` numbers from p on may be read four at a time.
template <class T>
inline bool aligned4(const T* p, int64_t width) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0 && width % 4 == 0;
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.4028235e38f; }

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// Sum over the block in a fixed order, for every thread. scratch: one double a warp.
__device__ __forceinline__ double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += scratch[w];
  return total;
}

__device__ __forceinline__ int64_t index_at(const int64_t* i64, const int32_t* i32, int64_t at) {
  return i64 ? i64[at] : i32[at];
}

// Calls run.template operator()<T>-like lambdas with a null pointer of the storage type.
template <class Run>
cudaError_t with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return run(static_cast<__half*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Grids are on x alone; y and z stop at 65535.
inline bool grid_fits(int64_t blocks) { return blocks <= 0x7fffffff; }

}  // namespace ksae::cuda
