// SPDX-License-Identifier: Apache-2.0
// CUDA C++ as host C++20, for tests without a GPU: include it (csrc/cuda/lang.h does) and compile
// the .cu file with g++ -x c++. scheduler.h says what runs and what goes unseen. There are no
// __shared__ variables, tensor cores, clusters or cp.async.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "runtime.h"
#include "scheduler.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

namespace ksae::emulation {

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const auto found = opted_in.find(reinterpret_cast<const void*>(kernel));
  const size_t most = std::max(kSharedBytes, found == opted_in.end() ? 0 : found->second);
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffff ||
      grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (shared_bytes > most) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  run(name, grid, block, shared_bytes, [&] { std::apply(kernel, parameters); });
}

template <class T>
concept Word = std::is_trivially_copyable_v<T> && sizeof(T) <= 8;

template <Word T>
uint64_t pack(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <Word T>
T unpack(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// What `read` makes of the values of all lanes of the mask.
template <class Read>
auto exchange(uint32_t mask, Operation operation, uint64_t value, const Site& site, Read read) {
  Meeting& meeting = meet(mask, operation, value, site);
  const auto result = read(meeting);
  leave(meeting);
  return result;
}

template <Word T>
T shuffle(uint32_t mask, T value, int source, const Site& site) {
  return exchange(mask, Operation::shuffle, pack(value), site,
                  [&](const Meeting& m) { return unpack<T>(brought(m, unsigned(source))); });
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, const Site& site, Combine combine) {
  return exchange(mask, Operation::reduce, pack(value), site, [&](const Meeting& m) {
    uint32_t lanes = m.arrived;
    T sum = unpack<T>(m.slots[std::countr_zero(lanes)]);
    for (lanes &= lanes - 1; lanes != 0; lanes &= lanes - 1) {
      sum = combine(sum, unpack<T>(m.slots[std::countr_zero(lanes)]));
    }
    return sum;
  });
}

inline uint32_t ballot(uint32_t mask, Operation operation, bool predicate, const Site& site) {
  return exchange(mask, operation, predicate, site, [](const Meeting& m) {
    uint32_t set = 0;
    for (unsigned i = 0; i < 32; i++) {
      if ((m.arrived >> i & 1) != 0 && m.slots[i] != 0) set |= 1u << i;
    }
    return set;
  });
}

// The types that CUDA's integer atomics take: uint64_t is another type there, and an error.
template <class T>
concept Counter =
    std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;
template <class T>
concept Addend = Counter<T> || std::same_as<T, float> || std::same_as<T, double>;

template <class T, class Change>
T atomic(T* p, Change change) {
  maybe_yield();
  const T old = *p;
  *p = change(old);
  maybe_yield();
  return old;
}

}  // namespace ksae::emulation

#define KSAE_SITE const ksae::emulation::Site& site = ksae::emulation::Site::current()

// ---------------------------------------------------------------------------- block and warp

inline void __syncthreads(KSAE_SITE) {
  ksae::emulation::barrier(ksae::emulation::Operation::syncthreads, false, nullptr, site);
}
inline int __syncthreads_count(int predicate, KSAE_SITE) {
  return ksae::emulation::barrier(ksae::emulation::Operation::count, predicate, nullptr, site);
}
inline int __syncthreads_or(int predicate, KSAE_SITE) {
  return ksae::emulation::barrier(ksae::emulation::Operation::any, predicate, nullptr, site) > 0;
}
inline int __syncthreads_and(int predicate, KSAE_SITE) {
  int waited = 0;
  const int count =
      ksae::emulation::barrier(ksae::emulation::Operation::all, predicate, &waited, site);
  return count == waited;
}
inline void __syncwarp(unsigned mask = 0xffffffff, KSAE_SITE) {
  ksae::emulation::leave(
      ksae::emulation::meet(mask, ksae::emulation::Operation::syncwarp, 0, site));
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, KSAE_SITE) {
  const int lane = int(ksae::emulation::lane());
  return ksae::emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)),
                                  site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, KSAE_SITE) {
  const int lane = int(ksae::emulation::lane()), from = lane - int(delta);
  return ksae::emulation::shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, KSAE_SITE) {
  const int lane = int(ksae::emulation::lane()), from = lane + int(delta);
  return ksae::emulation::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, KSAE_SITE) {
  const int lane = int(ksae::emulation::lane()), from = lane ^ bits;
  return ksae::emulation::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, KSAE_SITE) {
  return ksae::emulation::ballot(mask, ksae::emulation::Operation::ballot, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, KSAE_SITE) {
  return ksae::emulation::ballot(mask, ksae::emulation::Operation::vote, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, KSAE_SITE) {
  return ksae::emulation::ballot(mask, ksae::emulation::Operation::vote, !predicate, site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, KSAE_SITE) {
  const uint64_t mine = ksae::emulation::pack(value);
  return ksae::emulation::exchange(mask, ksae::emulation::Operation::match, mine, site,
                                   [&](const ksae::emulation::Meeting& m) {
                                     unsigned same = 0;
                                     for (unsigned i = 0; i < 32; i++) {
                                       if ((m.arrived >> i & 1) != 0 && m.slots[i] == mine)
                                         same |= 1u << i;
                                     }
                                     return same;
                                   });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, KSAE_SITE) {
  return ksae::emulation::reduce(mask, value, site, [](auto a, auto b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value, KSAE_SITE) {
  return int(__reduce_add_sync(mask, unsigned(value), site));  // wraps
}
template <class T>
  requires(std::same_as<T, int> || std::same_as<T, unsigned>)
T __reduce_min_sync(unsigned mask, T value, KSAE_SITE) {
  return ksae::emulation::reduce(mask, value, site, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
  requires(std::same_as<T, int> || std::same_as<T, unsigned>)
T __reduce_max_sync(unsigned mask, T value, KSAE_SITE) {
  return ksae::emulation::reduce(mask, value, site, [](T a, T b) { return a < b ? b : a; });
}
#undef KSAE_SITE

// ---------------------------------------------------------------------------- memory

template <ksae::emulation::Addend T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  using ksae::emulation::Counter;
  return ksae::emulation::atomic(p, [=](T old) {
    if constexpr (std::same_as<T, int>)
      return int(unsigned(old) + unsigned(value));  // wraps
    else
      return old + value;
  });
}
template <ksae::emulation::Counter T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return ksae::emulation::atomic(p, [=](T old) { return old < value ? value : old; });
}
template <ksae::emulation::Counter T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return ksae::emulation::atomic(p, [=](T old) { return value < old ? value : old; });
}
template <ksae::emulation::Counter T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return ksae::emulation::atomic(p, [=](T old) { return old | value; });
}
template <ksae::emulation::Counter T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  return ksae::emulation::atomic(p, [=](T old) { return old & value; });
}
template <class T>
  requires(ksae::emulation::Counter<T> || std::same_as<T, float>)
T atomicExch(T* p, std::type_identity_t<T> value) {
  return ksae::emulation::atomic(p, [=](T) { return value; });
}
template <ksae::emulation::Counter T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return ksae::emulation::atomic(p, [=](T old) { return old == expected ? value : old; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldlu(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// ---------------------------------------------------------------------------- arithmetic

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) { return ksae::emulation::bits<unsigned>(x); }
inline int __float_as_int(float x) { return ksae::emulation::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return ksae::emulation::bits<float>(x); }
inline float __int_as_float(int x) { return ksae::emulation::bits<float>(x); }
inline long long __double_as_longlong(double x) { return ksae::emulation::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return ksae::emulation::bits<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float rsqrtf(float a) { return float(1.0 / std::sqrt(double(a))); }

template <class T, class U>
  requires(std::is_arithmetic_v<T> && std::is_arithmetic_v<U>)
auto min(T a, U b) {
  using Common = std::common_type_t<T, U>;
  if constexpr (std::floating_point<Common>)
    return std::fmin(Common(a), Common(b));
  else
    return Common(a) < Common(b) ? Common(a) : Common(b);
}
template <class T, class U>
  requires(std::is_arithmetic_v<T> && std::is_arithmetic_v<U>)
auto max(T a, U b) {
  using Common = std::common_type_t<T, U>;
  if constexpr (std::floating_point<Common>)
    return std::fmax(Common(a), Common(b));
  else
    return Common(a) < Common(b) ? Common(b) : Common(a);
}
