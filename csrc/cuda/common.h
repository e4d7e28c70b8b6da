// SPDX-License-Identifier: Apache-2.0
// What the kernels share: storage types, the order of selection, sums in a fixed order, launches.
#pragma once

#include <cstring>
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

// Two numbers in a register, as they lie at p: stored one by one, they would take a transaction
// each.
__device__ __forceinline__ uint32_t two(const __nv_bfloat16*, float a, float b) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
         uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}
__device__ __forceinline__ uint32_t two(const __half*, float a, float b) {
  return __half_as_ushort(__float2half_rn(a)) | uint32_t(__half_as_ushort(__float2half_rn(b)))
                                                    << 16;
}

// Numbers side by side, read or written at once where their address is a multiple of their size.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Packed {
  T x[kCount];
};

// Number e of them. Of two bfloat16 in a register, one instruction makes either.
template <class T, int kCount>
__device__ __forceinline__ float number(const Packed<T, kCount>& v, int e) {
  return load(&v.x[e]);
}
template <int kCount>
__device__ __forceinline__ float number(const Packed<__nv_bfloat16, kCount>& v, int e) {
  uint32_t two;
  memcpy(&two, &v.x[e & ~1], sizeof(two));
  return __uint_as_float(e & 1 ? two & 0xffff0000u : two << 16);
}

using Four = Packed<float, 4>;

// Four numbers at p, of which `valid` exist; one vector load where `aligned` says that p allows it.
template <class T>
__device__ __forceinline__ Four load4(const T* p, int64_t valid, bool aligned) {
  Four r;
  if (aligned && valid >= 4) {
    const auto raw = *reinterpret_cast<const Packed<T, 4>*>(p);
#pragma unroll
    for (int e = 0; e < 4; ++e) r.x[e] = number(raw, e);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) r.x[e] = e < valid ? load(p + e) : 0.0f;
  }
  return r;
}

// As load4, but as they lie in memory where kAligned says that p allows it, so that several are on
// their way before the first is used. Then there are four.
template <bool kAligned, class T>
__device__ __forceinline__ auto row4(const T* p, int64_t valid) {
  if constexpr (kAligned)
    return *reinterpret_cast<const Packed<T, 4>*>(p);
  else
    return load4(p, valid, false);
}

// Stores the first `valid` of four numbers; as load4.
template <class T>
__device__ __forceinline__ void store4(T* p, const Four& r, int64_t valid, bool aligned) {
  if (aligned && valid >= 4) {
    if constexpr (sizeof(T) == sizeof(float))
      *reinterpret_cast<Four*>(p) = r;
    else
      *reinterpret_cast<uint64_t*>(p) = two(p, r.x[0], r.x[1]) | uint64_t(two(p, r.x[2], r.x[3]))
                                                                     << 32;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < valid) store(p + e, r.x[e]);
  }
}

// Whether rows of `width` numbers from p on may be read kCount at a time.
template <int kCount, class T>
inline bool packed(const T* p, int64_t width) {
  return reinterpret_cast<uintptr_t>(p) % (kCount * sizeof(T)) == 0 && width % kCount == 0;
}
template <class T>
inline bool aligned4(const T* p, int64_t width) {
  return packed<4>(p, width);
}

// The larger number; NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
#ifdef KSAE_EMULATE
  return a > b || a != a ? a : b;
#else
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#endif
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

// The error of a call that launches nothing. It is forgotten here, or the next launch, which asks
// for the last error, would be blamed for it.
inline cudaError_t forgotten(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// out[c] = sum over r of sums[r, c], in a fixed order; rows of d numbers.
cudaError_t column_sums(const float* sums, int64_t rows, int64_t d, float* out,
                        cudaStream_t stream);

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

// Calls run with std::true_type or std::false_type.
template <class Run>
cudaError_t with_alignment(bool aligned, Run run) {
  return aligned ? run(std::true_type()) : run(std::false_type());
}

// Grids are on x alone; y and z stop at 65535.
inline bool grid_fits(int64_t blocks) { return blocks <= 0x7fffffff; }

}  // namespace ksae::cuda
