// SPDX-License-Identifier: Apache-2.0
// Token-major residuals of reconstructions by the first latents alone, all of them in one pass over
// a token's entries. Entries are taken prefix by prefix: the sums of a prefix start as those of the
// one before. The P rows of sums [d] stay in L1, where they become the weighted residuals, last one
// first; the values' gradient then reads them and the token's rows of W_dec, which are in L2.
// Cost a token: 2 k d flops, as much again for the gradients, 4 P d for the residuals; k d elements
// gathered, P columns written; the k latents are read P times.
// Limits: one token is one thread's; P (d + pad) floats of scratch a thread.
#include "add_row.h"
#include "dots.h"
#include "gather.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

struct Span {
  int64_t begin, end;  // latents, or columns
  KSAE_INLINE bool operator()(int64_t latent) const { return begin <= latent && latent < end; }
};

KSAE_INLINE Span group_of(const PrefixResidualParams& p, int g) {
  return {g ? p.widths[g - 1] : 0, p.widths[g]};
}

// Sums of the entries of each prefix: columns [span) of row g of `sums` are those of prefix g.
template <class T, class Rows>
void add_prefixes(const PrefixResidualParams& p, const Rows& code, int64_t n, int64_t then,
                  Span span, float* sums, int64_t stride) {
  const DecodeParams& q = p.residual.decode;
  const int64_t k = code.count(n), columns = span.end - span.begin;
  Gathered<T> rows, next;
  for (int g = 0; g < p.n_prefixes; ++g) {
    float* row = sums + g * stride;
    for (int64_t i = 0; i < columns; i += kWidth)
      store(row + i, g ? load(row - stride + i) : splat(0));
    const bool last = g + 1 == p.n_prefixes;
    for (int64_t j = 0; j < k;) {
      j = take_if<T>(q, code, n, j, kRows, rows, group_of(p, g));
      if (rows.count == 0) break;
      if (j < k) {
        take_if<T>(q, code, n, j, kAhead, next, group_of(p, g));
      } else {
        take_if<T>(q, code, last ? then : n, 0, kAhead, next, group_of(p, last ? 0 : g + 1));
      }
      add_rows(row, rows, span.begin, span.end, next.w, span.begin);
    }
  }
}

// In place, from sums to the weighted residuals of this prefix and all later ones; squares [P].
template <class T, class Target>
void weigh(const PrefixResidualParams& p, int64_t n, Span span, float* sums, int64_t stride) {
  const DecodeParams& q = p.residual.decode;
  const Target* target = static_cast<const Target*>(p.residual.target) + n * q.d + span.begin;
  const T* b = q.b_dec ? static_cast<const T*>(q.b_dec) + span.begin : nullptr;
  const int64_t columns = span.end - span.begin;
  for (int g = p.n_prefixes - 1; g >= 0; --g) {
    float* row = sums + g * stride;
    const bool last = g + 1 == p.n_prefixes;
    const Vec share = splat(p.shares[g]);
    Vec squares = splat(0);
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vec sum = load(row + c);
      if (b) sum = sum + load_part(b, c, columns);
      const Vec e = sum - load_part(target, c, columns);  // missing lanes are 0 - 0
      squares = fma(e, e, squares);
      store(row + c, last ? share * e : fma(share, e, load(row + stride + c)));
    }
    if (!p.residual.sq_error) continue;
    float lanes[kWidth];
    store(lanes, squares);
    double total = 0;
    for (int l = 0; l < kWidth; ++l) total += lanes[l];
    p.residual.sq_error[g * q.N + n] = total;
  }
}

// Each entry's product with the residuals of its prefix.
template <class T, class Rows>
void products_of(const PrefixResidualParams& p, const Rows& code, int64_t n, int64_t then,
                 const float* sums, int64_t stride) {
  const DecodeParams& q = p.residual.decode;
  const int64_t k = code.count(n);
  float* grad = p.residual.grad_values + code.begin(n);
  for (int64_t j = 0; j < k; ++j) grad[j] = 0;
  const bool near = 2 * k * q.d * int64_t(sizeof(T)) <= kNear;
  Gathered<T> rows, next;
  float products[kRows];
  int64_t next_j = 0;
  for (int g = 0; g < p.n_prefixes; ++g) {
    for (int64_t j = 0; j < k;) {
      j = take_if<T>(q, code, n, j, kRows, rows, group_of(p, g));
      next.count = 0;
      if (near) next_j = take<T>(q, code, then, next_j, rows.count, next);
      for (int r = next.count; r < rows.count; ++r) next.w[r] = rows.w[r];
      dots<2>(rows.count, sums + g * stride, rows.w, q.d, next.w, products);
      for (int r = 0; r < rows.count; ++r) grad[rows.at[r]] = products[r];
    }
  }
}

template <class T, class Target, class Rows>
void prefix_rows(const PrefixResidualParams& p, const Rows& code, int64_t row0, int64_t row1,
                 float* sums) {
  const ResidualParams& r = p.residual;
  const int64_t stride = r.decode.d + kVectorPad;
  const Span stored{r.start, r.start + r.columns};
  const Span span = r.sq_error ? Span{0, r.decode.d} : stored;
  for (int64_t n = row0; n < row1; ++n) {
    const int64_t then = n + 1 < row1 ? n + 1 : n;
    add_prefixes<T>(p, code, n, then, span, sums, stride);
    weigh<T, Target>(p, n, span, sums, stride);
    for (int g = 0; g < p.n_prefixes; ++g)
      __builtin_memcpy(r.residual + (g * r.decode.N + n) * r.columns,
                       sums + g * stride + stored.begin - span.begin,
                       size_t(r.columns) * sizeof(float));
    if (r.sq_error) products_of<T>(p, code, n, then, sums, stride);
  }
}

void prefix_residual(const PrefixResidualParams& p, int64_t row0, int64_t row1, float* scratch) {
  with_dtype(p.residual.decode.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_rows(p.residual.decode, [&](auto code) {
      if (p.residual.target_float) {
        prefix_rows<T, float>(p, code, row0, row1, scratch);
      } else {
        prefix_rows<T, T>(p, code, row0, row1, scratch);
      }
    });
  });
}

}  // namespace

void prefix_residual_table(Kernels& t) { t.prefix_residual = prefix_residual; }

}  // namespace ksae::cpu::KSAE_ISA
