// SPDX-License-Identifier: Apache-2.0
// The widest float vector of the level this file is compiled for, and the three storage types.
//
// Everything lives in the level's own namespace and no library function is inlined here: a copy
// compiled with AVX-512 must never be the one the linker keeps for an older CPU.
// fma() is one rounding on AVX2 and AVX-512, two on the plain level (-ffp-contract=off).
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KSAE_INLINE inline __attribute__((always_inline))

namespace ksae::cpu::KSAE_ISA {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

KSAE_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
KSAE_INLINE float float_of(uint32_t b) { return __builtin_bit_cast(float, b); }

// ---- scalar conversions ----------------------------------------------------------------------
KSAE_INLINE float to_float(float x) { return x; }
KSAE_INLINE float to_float(BF16 x) { return float_of(uint32_t(x.bits) << 16); }

KSAE_INLINE void from_float(float x, float& out) { out = x; }
KSAE_INLINE void from_float(float x, BF16& out) {
  const uint32_t b = bits_of(x);
  out.bits = x != x ? uint16_t((b >> 16) | 0x40) : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
KSAE_INLINE float to_float(F16 x) { return _cvtsh_ss(x.bits); }
KSAE_INLINE void from_float(float x, F16& out) {
  out.bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
KSAE_INLINE float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, body = x.bits & 0x7fff;
  if (body >= 0x7c00) return float_of(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // Shifting exponent and mantissa into place leaves a value 2^112 too small, subnormals included.
  return float_of(bits_of(float_of(body << 13) * 0x1p112f) | sign);
}
KSAE_INLINE void from_float(float x, F16& out) {
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000, body = b & 0x7fffffff;
  uint32_t h;
  if (body > 0x7f800000) {
    h = 0x7e00 | ((body >> 13) & 0x3ff);
  } else if (body >= 0x477ff000) {  // 65520 and above round to infinity
    h = 0x7c00;
  } else if (body < 0x38800000) {  // subnormal: adding 0.5 aligns the mantissa and rounds once
    h = bits_of(float_of(body) + 0.5f) - bits_of(0.5f);
  } else {
    h = (body - 0x38000000 + 0xfff + ((body >> 13) & 1)) >> 13;
  }
  out.bits = uint16_t(sign | h);
}
#endif

// ---- vectors ---------------------------------------------------------------------------------
#if defined(__AVX512F__)

constexpr int kWidth = 16;
struct Vec {
  __m512 v;
};
KSAE_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
KSAE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
KSAE_INLINE Vec load(const BF16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
KSAE_INLINE Vec load(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
KSAE_INLINE __m256i to_bf16(__m512 v) {
  const __m512i b = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), b,
                           _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
KSAE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
KSAE_INLINE void store(BF16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a.v));
}
KSAE_INLINE void store(F16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
KSAE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
KSAE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
KSAE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
KSAE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
KSAE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KSAE_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// The larger; b where either is NaN.
KSAE_INLINE Vec larger(Vec a, Vec b) {
  return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), a.v)};
}
// Bit l is set where not (a <= b), not (a < b): NaN passes.
KSAE_INLINE uint32_t not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
KSAE_INLINE uint32_t not_lt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
// Writes the lanes of mask side by side at p (a whole vector is stored) and returns their number.
KSAE_INLINE int compress(float* p, uint32_t mask, Vec a) {
  // Compress to a register, then store: the memory form is microcoded on Zen.
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(mask), a.v));
  return __builtin_popcount(mask);
}
KSAE_INLINE void compress(int32_t* p, uint32_t mask, const int32_t* from) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_loadu_si512(from)));
}
KSAE_INLINE void compress_iota(int32_t* p, uint32_t mask, int32_t base) {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i id = _mm512_add_epi32(iota, _mm512_set1_epi32(base));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), id));
}

#elif defined(__AVX2__)

constexpr int kWidth = 8;
struct Vec {
  __m256 v;
};
KSAE_INLINE Vec splat(float x) { return {_mm256_set1_ps(x)}; }
KSAE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
KSAE_INLINE Vec load(const BF16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
KSAE_INLINE Vec load(const F16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
KSAE_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
KSAE_INLINE void store(BF16* p, Vec a) {
  const __m256i b = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
KSAE_INLINE void store(F16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
KSAE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
KSAE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
KSAE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
KSAE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
KSAE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KSAE_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
KSAE_INLINE Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
KSAE_INLINE uint32_t not_le(Vec a, Vec b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
KSAE_INLINE uint32_t not_lt(Vec a, Vec b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)));
}

#else

constexpr int kWidth = 8;
typedef float Float8 __attribute__((vector_size(32)));
struct Vec {
  Float8 v;
};
KSAE_INLINE Vec splat(float x) { return {Float8{x, x, x, x, x, x, x, x}}; }
template <class T>
KSAE_INLINE Vec load(const T* p) {
  Vec a;
  for (int l = 0; l < kWidth; ++l) a.v[l] = to_float(p[l]);
  return a;
}
template <class T>
KSAE_INLINE void store(T* p, Vec a) {
  for (int l = 0; l < kWidth; ++l) from_float(a.v[l], p[l]);
}
KSAE_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
KSAE_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
KSAE_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
KSAE_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
KSAE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
KSAE_INLINE Vec sqrt(Vec a) {
  for (int l = 0; l < kWidth; ++l) a.v[l] = __builtin_sqrtf(a.v[l]);
  return a;
}
KSAE_INLINE Vec larger(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
KSAE_INLINE uint32_t not_le(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int l = 0; l < kWidth; ++l) mask |= uint32_t(!(a.v[l] <= b.v[l])) << l;
  return mask;
}
KSAE_INLINE uint32_t not_lt(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int l = 0; l < kWidth; ++l) mask |= uint32_t(!(a.v[l] < b.v[l])) << l;
  return mask;
}

#endif

#if !defined(__AVX512F__)
KSAE_INLINE int compress(float* p, uint32_t mask, Vec a) {
  float lanes[kWidth];
  store(lanes, a);
  int count = 0;
  for (; mask; mask &= mask - 1) p[count++] = lanes[__builtin_ctz(mask)];
  return count;
}
KSAE_INLINE void compress(int32_t* p, uint32_t mask, const int32_t* from) {
  for (; mask; mask &= mask - 1) *p++ = from[__builtin_ctz(mask)];
}
KSAE_INLINE void compress_iota(int32_t* p, uint32_t mask, int32_t base) {
  for (; mask; mask &= mask - 1) *p++ = base + __builtin_ctz(mask);
}
#endif

// ---- parts of a vector (row tails): the missing lanes read as 0 and are not written ----------
template <class T>
KSAE_INLINE Vec load_n(const T* p, int n) {
  T lanes[kWidth] = {};
  for (int l = 0; l < n; ++l) lanes[l] = p[l];
  return load(lanes);
}
template <class T>
KSAE_INLINE void store_n(T* p, Vec a, int n) {
  T lanes[kWidth];
  store(lanes, a);
  for (int l = 0; l < n; ++l) p[l] = lanes[l];
}

// Sum of the lanes, always in the same order.
KSAE_INLINE float sum(Vec a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Turns kWidth row vectors into kWidth column vectors.
KSAE_INLINE void transpose(Vec (&r)[kWidth]) {
#if defined(__AVX512F__)
  __m512 t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 4x4 blocks within 128-bit lanes
    const __m512 a = _mm512_unpacklo_ps(r[4 * i].v, r[4 * i + 1].v);
    const __m512 b = _mm512_unpackhi_ps(r[4 * i].v, r[4 * i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(r[4 * i + 2].v, r[4 * i + 3].v);
    const __m512 e = _mm512_unpackhi_ps(r[4 * i + 2].v, r[4 * i + 3].v);
    t[4 * i + 0] = _mm512_shuffle_ps(a, c, 0x44);
    t[4 * i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[4 * i + 2] = _mm512_shuffle_ps(b, e, 0x44);
    t[4 * i + 3] = _mm512_shuffle_ps(b, e, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // then the lanes themselves
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
    const __m512 e = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + i].v = _mm512_shuffle_f32x4(b, e, 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + i].v = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
#else
  float m[kWidth][kWidth];
  for (int i = 0; i < kWidth; ++i) store(m[i], r[i]);
  for (int j = 0; j < kWidth; ++j) {
    float column[kWidth];
    for (int i = 0; i < kWidth; ++i) column[i] = m[i][j];
    r[j] = load(column);
  }
#endif
}

// ---- order of scores -------------------------------------------------------------------------
// Larger key means earlier: NaN above +inf, -0 equal to +0.
KSAE_INLINE uint32_t order_key(float s) {
  const uint32_t b = bits_of(s + 0.0f);
  const uint32_t key = (b >> 31) ? ~b : b | 0x80000000u;
  return s != s ? 0xffffffffu : key;
}
KSAE_INLINE float order_score(uint32_t key) {
  return float_of((key >> 31) ? key & 0x7fffffffu : ~key);  // the inverse; NaN for 0xffffffff
}

}  // namespace ksae::cpu::KSAE_ISA
