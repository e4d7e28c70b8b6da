// SPDX-License-Identifier: Apache-2.0
// CUDA's small types on the host: dim3, vectors, half and bfloat16 with conversions that round to
// nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ksae::emulation {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline uint16_t half_bits(float x) {
  const uint32_t b = bits<uint32_t>(x);
  const uint16_t sign = uint16_t(b >> 16 & 0x8000);
  const uint32_t magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;          // NaN, as CUDA's
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000) {                       // subnormal: count units of 2^-24
    return sign | uint16_t(std::nearbyint(bits<float>(magnitude) * 0x1p24f));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return sign | uint16_t((magnitude + 0xfff + odd - 0x38000000) >> 13);
}

inline float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return bits<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(float(mantissa) * 0x1p-24f));
  return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t b = bits<uint32_t>(x);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN, as CUDA's
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline float bfloat16_value(uint16_t h) { return bits<float>(uint32_t(h) << 16); }

}  // namespace ksae::emulation

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define KSAE_VECTORS(T, name)                                                        \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
KSAE_VECTORS(float, float)
KSAE_VECTORS(int, int)
KSAE_VECTORS(unsigned, uint)
KSAE_VECTORS(unsigned short, ushort)
KSAE_VECTORS(long long, longlong)
KSAE_VECTORS(unsigned long long, ulonglong)
KSAE_VECTORS(double, double)
#undef KSAE_VECTORS

// As in CUDA, a default constructor that does nothing.
struct alignas(2) __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(ksae::emulation::half_bits(x)) {}
  operator float() const { return ksae::emulation::half_value(bits); }
};
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(ksae::emulation::bfloat16_bits(x)) {}
  operator float() const { return ksae::emulation::bfloat16_value(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short b) {
  __half x;
  x.bits = b;
  return x;
}
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline float __low2float(__half2 x) { return x.x; }
inline float __high2float(__half2 x) { return x.y; }

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short b) {
  __nv_bfloat16 x;
  x.bits = b;
  return x;
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline float __low2float(__nv_bfloat162 x) { return x.x; }
inline float __high2float(__nv_bfloat162 x) { return x.y; }
