// SPDX-License-Identifier: Apache-2.0
// Token-major decoder: gather k rows of W_dec a token, in slices of d that stay in registers.
// Cost a token: 2 k d flops; k d elements gathered (from cache where F d fits), d written. The
// residual doubles the flops for the values' gradient while the gathered rows are in L2.
// Limits: one token is one thread's; rows of 16-bit storage are widened in registers.
#include "gate.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kSlice = 16;  // accumulators: 256 columns
#else
constexpr int kSlice = 8;
#endif
constexpr int kAhead = 4;  // rows between the prefetch and the use

KSAE_INLINE int64_t index_at(const int64_t* i64, const int32_t* i32, int64_t i) {
  return i64 ? i64[i] : i32[i];
}

// f(column, lanes, accumulator) receives columns [c, end) of the decoded row vector by vector,
// b_dec included.
template <class T, class Fn>
KSAE_INLINE void decode_row(const DecodeParams& p, int64_t n, int64_t c, int64_t end, Fn f) {
  const T* values = static_cast<const T*>(p.values) + n * p.k;
  const T* W = static_cast<const T*>(p.W_dec);
  const T* b = static_cast<const T*>(p.b_dec);
  for (; c + kSlice * kWidth <= end; c += kSlice * kWidth) {
    Vec acc[kSlice];
#pragma GCC unroll 16
    for (int s = 0; s < kSlice; ++s) acc[s] = splat(0);
    for (int64_t j = 0; j < p.k; ++j) {
      const float v = to_float(values[j]);
      if (v == 0) continue;
      const T* w = W + index_at(p.indices64, p.indices32, n * p.k + j) * p.d + c;
      if (j + kAhead < p.k) {  // rows are gathers that no hardware foresees
        const auto* next = reinterpret_cast<const char*>(
            W + index_at(p.indices64, p.indices32, n * p.k + j + kAhead) * p.d + c);
        for (int64_t b = 0; b < int64_t(kSlice * kWidth * sizeof(T)); b += 64)
          __builtin_prefetch(next + b);
      }
      const Vec a = splat(v);
#pragma GCC unroll 16
      for (int s = 0; s < kSlice; ++s) acc[s] = fma(a, load(w + s * kWidth), acc[s]);
    }
#pragma GCC unroll 16
    for (int s = 0; s < kSlice; ++s)
      f(c + s * kWidth, kWidth, b ? acc[s] + load(b + c + s * kWidth) : acc[s]);
  }
  for (; c < end; c += kWidth) {
    const int lanes = end - c < kWidth ? int(end - c) : kWidth;
    Vec acc = splat(0);
    for (int64_t j = 0; j < p.k; ++j) {
      const float v = to_float(values[j]);
      if (v == 0) continue;
      const T* w = W + index_at(p.indices64, p.indices32, n * p.k + j) * p.d + c;
      acc = fma(splat(v), load_n(w, lanes), acc);
    }
    f(c, lanes, b ? acc + load_n(b + c, lanes) : acc);
  }
}

void decode(const DecodeParams& p, int64_t row0, int64_t row1) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t n = row0; n < row1; ++n) {
      T* out = static_cast<T*>(p.out) + n * p.d;
      decode_row<T>(p, n, 0, p.d, [&](int64_t c, int lanes, Vec v) {
        if (lanes == kWidth) {
          store(out + c, v);
        } else {
          store_n(out + c, v, lanes);
        }
      });
    }
  });
}

// <a, b> in float32 with four chains.
template <class A, class B>
KSAE_INLINE float dot(const A* a, const B* b, int64_t d) {
  Vec acc[4] = {splat(0), splat(0), splat(0), splat(0)};
  int64_t c = 0;
  for (; c + 4 * kWidth <= d; c += 4 * kWidth) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
      acc[s] = fma(load(a + c + s * kWidth), load(b + c + s * kWidth), acc[s]);
  }
  for (; c < d; c += kWidth) {
    const int lanes = d - c < kWidth ? int(d - c) : kWidth;
    acc[0] = fma(load_n(a + c, lanes), load_n(b + c, lanes), acc[0]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// One token. Target is float32 or of the storage type.
template <class T, class Target>
void residual_row(const ResidualParams& p, int64_t n, float* row) {
  const int64_t d = p.decode.d, k = p.decode.k;
  const Target* target = static_cast<const Target*>(p.target) + n * d;
  float* out = p.residual + n * p.columns;
  if (!p.sq_error) {
    decode_row<T>(p.decode, n, p.start, p.start + p.columns, [&](int64_t c, int lanes, Vec v) {
      if (lanes == kWidth) {
        store(out + c - p.start, v - load(target + c));
      } else {
        store_n(out + c - p.start, v - load_n(target + c, lanes), lanes);
      }
    });
    return;
  }
  Vec squares = splat(0);
  decode_row<T>(p.decode, n, 0, d, [&](int64_t c, int lanes, Vec v) {
    const Vec e = v - (lanes == kWidth ? load(target + c) : load_n(target + c, lanes));
    squares = fma(e, e, squares);  // missing lanes are 0 - 0
    store(row + c, e);             // the row is padded
  });
  float lanes[kWidth];
  store(lanes, squares);
  double total = 0;
  for (int l = 0; l < kWidth; ++l) total += lanes[l];
  p.sq_error[n] = total;
  if (p.columns) __builtin_memcpy(out, row + p.start, size_t(p.columns) * sizeof(float));
  // The k rows of W_dec were just read: the values' gradient finds them in cache.
  const T* values = static_cast<const T*>(p.decode.values) + n * k;
  const T* W = static_cast<const T*>(p.decode.W_dec);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t i = index_at(p.decode.indices64, p.decode.indices32, n * k + j);
    p.grad_values[n * k + j] = to_float(values[j]) == 0 ? 0 : dot(row, W + i * d, d);
  }
}

void residual(const ResidualParams& p, int64_t row0, int64_t row1, float* scratch) {
  with_dtype(p.decode.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t n = row0; n < row1; ++n) {
      if (p.target_float) {
        residual_row<T, float>(p, n, scratch);
      } else {
        residual_row<T, T>(p, n, scratch);
      }
    }
  });
}

void backward_values(const DecodeBackwardValuesParams& p, int64_t row0, int64_t row1) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* W = static_cast<const T*>(p.W_dec);
    for (int64_t n = row0; n < row1; ++n) {
      const T* g = static_cast<const T*>(p.grad) + n * p.d;
      T* out = static_cast<T*>(p.grad_values) + n * p.k;
      for (int64_t j = 0; j < p.k; ++j) {
        const int64_t i = index_at(p.indices64, p.indices32, n * p.k + j);
        from_float(dot(g, W + i * p.d, p.d), out[j]);
      }
    }
  });
}

}  // namespace

void decode_table(Kernels& t) {
  t.decode = decode;
  t.residual = residual;
  t.backward_values = backward_values;
}

}  // namespace ksae::cpu::KSAE_ISA
