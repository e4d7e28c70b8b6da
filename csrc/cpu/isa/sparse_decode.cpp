// SPDX-License-Identifier: Apache-2.0
// Token-major decoder: gathers the rows of W_dec that a token names (k, or by row offsets: rows.h),
// in slices of d whose sums stay in registers, while the rows to come are fetched; their products
// with a gradient take four rows in one go. Cost a token: 2 k d flops; k d elements gathered (from
// cache where F d fits), d written. The residual doubles the flops for the values' gradient while
// the gathered rows are in L2. Limits: one token is one thread's; rows of 16-bit storage are
// widened in registers. Tried: whole rows, four in one go, with the sums in L1: float32 is 1.2
// times slower.
#include "dots.h"
#include "gather.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

constexpr int64_t kBlock = 1152;  // columns decoded before they are passed on: whole slices

// f(column, lanes, vector) receives columns [begin, end) of the decoded row, b_dec included. Token
// `then` is the next one of this thread.
template <class T, class Rows, class Fn>
KSAE_INLINE void decode_row(const DecodeParams& p, const Rows& code, int64_t n, int64_t then,
                            int64_t begin, int64_t end, Fn f) {
  alignas(64) float sums[kBlock];
  const T* b = static_cast<const T*>(p.b_dec);
  const int64_t k = code.count(n);
  Gathered<T> rows, next;
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t columns = end - c < kBlock ? end - c : kBlock;
    for (int64_t i = 0; i < columns; i += kWidth) store(sums + i, splat(0));
    int64_t j = 0;
    do {
      j = take<T>(p, code, n, j, kRows, rows);
      const bool more = j < k, here = c + kBlock < end;
      take<T>(p, code, more || here ? n : then, more ? j : 0, kAhead, next);
      add_rows(sums, rows, c, c + columns, next.w, more ? c : here ? c + kBlock : begin);
    } while (j < k);
    for (int64_t i = 0; i < columns; i += kWidth) {
      const int lanes = columns - i < kWidth ? int(columns - i) : kWidth;
      const Vec sum = load(sums + i);
      f(c + i, lanes, b ? sum + load_some(b + c + i, lanes) : sum);
    }
  }
}

// Out is float32 or of the storage type.
template <class T, class Out, class Rows>
void decode_rows(const DecodeParams& p, const Rows& code, int64_t row0, int64_t row1) {
  for (int64_t n = row0; n < row1; ++n) {
    Out* out = static_cast<Out*>(p.out) + n * p.d;
    const int64_t then = n + 1 < row1 ? n + 1 : n;
    decode_row<T>(p, code, n, then, 0, p.d, [&](int64_t c, int lanes, Vec v) {
      if (lanes == kWidth) {
        store(out + c, v);
      } else {
        store_n(out + c, v, lanes);
      }
    });
  }
}

void decode(const DecodeParams& p, int64_t row0, int64_t row1) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_rows(p, [&](auto code) {
      if (p.out_float) {
        decode_rows<T, float>(p, code, row0, row1);
      } else {
        decode_rows<T, T>(p, code, row0, row1);
      }
    });
  });
}

// One token. Target is float32 or of the storage type.
template <class T, class Target, class Rows>
void residual_row(const ResidualParams& p, const Rows& code, int64_t n, int64_t then, float* row) {
  const DecodeParams& q = p.decode;
  const int64_t d = q.d, k = code.count(n);
  const Target* target = static_cast<const Target*>(p.target) + n * d;
  float* out = p.residual + n * p.columns;
  if (!p.sq_error) {
    decode_row<T>(q, code, n, then, p.start, p.start + p.columns, [&](int64_t c, int lanes, Vec v) {
      if (lanes == kWidth) {
        store(out + c - p.start, v - load(target + c));
      } else {
        store_n(out + c - p.start, v - load_n(target + c, lanes), lanes);
      }
    });
    return;
  }
  Vec squares = splat(0);
  decode_row<T>(q, code, n, n, 0, d, [&](int64_t c, int lanes, Vec v) {
    const Vec e = v - load_some(target + c, lanes);
    squares = fma(e, e, squares);  // missing lanes are 0 - 0
    store(row + c, e);             // the row is padded
  });
  float lanes[kWidth];
  store(lanes, squares);
  double total = 0;
  for (int l = 0; l < kWidth; ++l) total += lanes[l];
  p.sq_error[n] = total;
  if (p.columns) __builtin_memcpy(out, row + p.start, size_t(p.columns) * sizeof(float));
  // The token's rows of W_dec were just read: the values' gradient finds them in cache, and has
  // time to fetch those of the next token.
  float* grad = p.grad_values + code.begin(n);
  for (int64_t j = 0; j < k; ++j) grad[j] = 0;
  const bool near = 2 * k * d * int64_t(sizeof(T)) <= kNear;
  Gathered<T> rows, next;
  float products[kRows];
  for (int64_t j = 0, next_j = 0; j < k;) {
    j = take<T>(q, code, n, j, kRows, rows);
    if (near) next_j = take<T>(q, code, then, next_j, kRows, next);
    for (int r = near ? next.count : 0; r < rows.count; ++r) next.w[r] = rows.w[r];
    dots<2>(rows.count, row, rows.w, d, next.w, products);
    for (int r = 0; r < rows.count; ++r) grad[rows.at[r]] = products[r];
  }
}

void residual(const ResidualParams& p, int64_t row0, int64_t row1, float* scratch) {
  with_dtype(p.decode.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_rows(p.decode, [&](auto code) {
      for (int64_t n = row0; n < row1; ++n) {
        const int64_t then = n + 1 < row1 ? n + 1 : n;
        if (p.target_float) {
          residual_row<T, float>(p, code, n, then, scratch);
        } else {
          residual_row<T, T>(p, code, n, then, scratch);
        }
      }
    });
  });
}

// Gradients are float32 or of the storage type. dots gives the bits of residual_row.
template <class T, class Grad, class Rows>
void backward_values_rows(const DecodeBackwardValuesParams& p, const Rows& code, int64_t row0,
                          int64_t row1) {
  const T* W = static_cast<const T*>(p.W_dec);
  // Token after token their rows are one sequence.
  const int64_t end = code.begin(row1);
  const auto row = [&](int64_t i) {
    return W + index_at(p.indices64, p.indices32, i < end ? i : end - 1) * p.d;
  };
  for (int64_t n = row0; n < row1; ++n) {
    const int64_t first = code.begin(n), k = code.count(n);
    const Grad* g = static_cast<const Grad*>(p.grad) + n * p.d;
    Grad* out = static_cast<Grad*>(p.grad_values) + first;
    for (int64_t j = 0; j < k; j += kDots) {
      const int count = k - j < kDots ? int(k - j) : kDots;
      const T *w[kDots], *next[kDots];
      for (int r = 0; r < count; ++r) {
        w[r] = row(first + j + r);
        next[r] = row(first + j + count + r);
      }
      float products[kDots];
      dots<3>(count, g, w, p.d, next, products);
      for (int r = 0; r < count; ++r) from_float(products[r], out[j + r]);
    }
  }
}

void backward_values(const DecodeBackwardValuesParams& p, int64_t row0, int64_t row1) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_rows(p, [&](auto code) {
      if (p.grad_float) {
        backward_values_rows<T, float>(p, code, row0, row1);
      } else {
        backward_values_rows<T, T>(p, code, row0, row1);
      }
    });
  });
}

}  // namespace

void sparse_decode_table(Kernels& t) {
  t.decode = decode;
  t.residual = residual;
  t.backward_values = backward_values;
}

}  // namespace ksae::cpu::KSAE_ISA
