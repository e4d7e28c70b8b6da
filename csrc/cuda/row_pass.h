// SPDX-License-Identifier: Apache-2.0
// One latent's row in a row pass: its gradient, and what is done with it.
#pragma once

#include "entries.h"
#include "latents.h"
#include "norms.h"
#include "rounding.h"
#include "segments.h"

namespace ksae::cuda {
namespace {

// kCentre: an update that forms grad_b_dec.
enum class Pass { kUpdate, kCentre, kGradSq, kWeight };
template <Pass kPass>
constexpr bool kUpdates = kPass == Pass::kUpdate || kPass == Pass::kCentre;

struct Args {
  RowUpdateParams p;  // its host pointer to groups is not used
  RowGroup group[kMaxGroups];
  Segments segments;
  float* pieces;  // [slots, columns]
  int64_t share;  // latents of a block
  float* sums;    // [blocks, d] parts of grad_b_dec
};

template <class R>
__device__ __forceinline__ Four centre4(const RowUpdateParams& p, int64_t c) {
  return p.centre && c < p.columns
             ? load4(static_cast<const R*>(p.centre) + c, p.columns - c, false)
             : Four{};
}

// Gradient of columns [c, c + 4) of latent i, before what is along W_i is taken off. All 32 lanes
// call.
template <bool kAligned, class C, class R>
__device__ __forceinline__ Four gradient4(const Args& args, int64_t i, int64_t c) {
  const RowUpdateParams& p = args.p;
  const Four centre = centre4<R>(p, c);
  Four sum{};
  for (int g = 0; g < p.n_groups; ++g) {
    const RowGroup& group = args.group[g];
    const int32_t begin = group.offsets[i], end = group.offsets[i + 1];
    const int log = args.segments.log_cut[g];
    if (end - begin <= 1 << log) {
      add_entries<kAligned, C, R>(group, p.columns, p.scales ? p.scales[g] : 1.0f, begin, end, c,
                                  centre, sum);
      continue;
    }
    if (c >= p.columns) continue;
    const int32_t last = (end - 1) >> log;
#pragma unroll 4
    for (int32_t u = begin >> log; u <= last; ++u) {
      const int64_t slot = slot_of(args.segments, g, u, begin);
      const auto piece = row4<kAligned>(args.pieces + slot * p.columns + c, p.columns - c);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.x[j] += number(piece, j);
    }
  }
  return sum;
}

// The parameters' row as it is after the update: the weights, and a copy of them if there is one.
template <bool kAligned, class T>
__device__ __forceinline__ void store_weights(const Args& args, int64_t at, const Four& theta,
                                              int64_t valid, Squares& squares) {
  store4(static_cast<T*>(args.p.W) + at, theta, valid, kAligned);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!args.p.W_bf16) return;
    store4(static_cast<__nv_bfloat16*>(args.p.W_bf16) + at, theta, valid, kAligned);
    if (!args.p.norms) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares.add(theta.x[j]);  // zero beyond `valid`
  }
}

// Row i of the master, or null: float32 weights and those rounded stochastically have none.
template <class T, class M>
__device__ __forceinline__ float* master_of(const RowUpdateParams& p, int64_t i) {
  if constexpr (std::is_same_v<T, float> || sizeof(M) == 2)
    return nullptr;
  else
    return p.master ? p.master + i * p.d : nullptr;
}

// Unit row: theta /= |theta|, and its rounded copy. `square` is this thread's part of |theta|^2.
template <bool kAligned, class T, class M>
__device__ __forceinline__ void normalize_row(const Args& args, int64_t i, double square,
                                              double* scratch) {
  const RowUpdateParams& p = args.p;
  const T* W = static_cast<const T*>(p.W) + i * p.d;
  float* master = master_of<T, M>(p, i);
  const float norm = static_cast<float>(sqrt(block_sum(square, scratch)));
  const float by = norm > 0 ? norm : 1.0f;
  Squares squares{};
  for (int64_t c = 4 * threadIdx.x; c < p.d; c += 4 * blockDim.x) {
    Four theta = master ? load4(master + c, p.d - c, kAligned) : load4(W + c, p.d - c, kAligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) theta.x[j] /= by;
    if constexpr (sizeof(M) == 2)
      theta = stochastic4(theta, draws4(p.rng_state, i, c, kRoundWeights).second);
    if (master) stream_store4<kAligned>(master + c, theta, p.d - c);
    store_weights<kAligned, T>(args, i * p.d + c, theta, p.d - c, squares);
  }
  if (p.norms) store_norms(p.norms, p.F, i, p.d, squares, scratch);
}

// What takes a latent's gradient along its row off, in units of the row as it was. 0: nothing.
template <bool kAligned, Pass kPass, class T>
__device__ __forceinline__ float along_row(const RowUpdateParams& p, int64_t i, double* scratch) {
  if (kPass == Pass::kWeight || kPass == Pass::kCentre || !p.grad_dot_w) return 0;
  float along = p.grad_dot_w[i];
  if (kUpdates<kPass> && p.start != 0) return along;  // divided by the slice before
  const T* W = static_cast<const T*>(p.W) + i * p.d;
  const float* master = master_of<T, float>(p, i);
  double square = 0;
  for (int64_t c = 4 * threadIdx.x; c < p.d; c += 4 * blockDim.x) {
    const Four w = master ? rounded4<T>(load4(master + c, p.d - c, kAligned))
                          : load4(W + c, p.d - c, kAligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) square += double(w.x[j]) * w.x[j];
  }
  const auto whole = static_cast<float>(block_sum(square, scratch));
  along = whole > 0 ? along / whole : 0;
  if (kUpdates<kPass> && p.columns < p.d && threadIdx.x == 0) p.grad_dot_w[i] = along;
  return along;
}

// Adam of four columns, whose moments and parameters are replaced.
__device__ __forceinline__ void adam4(const float* hyper, const Four& g, int64_t valid, Four& m,
                                      Four& v, Four& theta) {
  const float step = hyper[0], root = hyper[1], b1 = hyper[2], b2 = hyper[3];
  const float eps = hyper[4], grad_scale = hyper[5], rest1 = hyper[6], rest2 = hyper[7];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= valid) continue;
    const float gj = g.x[j] * grad_scale;
    m.x[j] = b1 * m.x[j] + rest1 * gj;
    v.x[j] = b2 * v.x[j] + rest2 * gj * gj;
    theta.x[j] -= step * m.x[j] / (sqrtf(v.x[j]) / root + eps);
  }
}

// The row of latent i. centre: of the block, [d] that W_i times its grad_b_enc is added to, or
// null; each number is one thread's. M: of the moments; bfloat16 with rng_state.
template <class C, class R, class T, class M, Pass kPass, bool kAligned>
__device__ __forceinline__ void pass_row(const Args& args, uint32_t i, double* scratch,
                                         float* centre) {
  const RowUpdateParams& p = args.p;
  T* W = static_cast<T*>(p.W) + i * p.d;
  const float along = along_row<kAligned, kPass, T>(p, i, scratch);
  float* master = master_of<T, M>(p, i);
  double square = 0;
  Squares squares{};
  const int64_t start = kPass == Pass::kCentre ? 0 : p.start;
  const int lane = threadIdx.x % 32, columns = static_cast<int>(p.columns);
  for (int c = 4 * threadIdx.x; c - 4 * lane < columns; c += 4 * blockDim.x) {
    const int64_t own = c < columns ? c : 0, valid = kAligned ? 4 : columns - own;
    const int64_t at = i * p.d + start + own;
    M *moment = static_cast<M*>(p.m) + at, *second = static_cast<M*>(p.v) + at;
    // What is streamed is on its way while the gradient is formed.
    decltype(stream4<kAligned>(moment, valid)) m_before, v_before;
    Four theta{};
    if (kUpdates<kPass>) {
      m_before = stream4<kAligned>(moment, valid);
      v_before = stream4<kAligned>(second, valid);
      if (master) theta = stream4<kAligned>(master + start + own, valid);
    }
    decltype(row4<kAligned>(W, valid)) w_before{};
    if (kUpdates<kPass> ? !master : kPass == Pass::kGradSq && p.grad_dot_w)
      w_before = row4<kAligned>(W + start + own, valid);
    Four g = gradient4<kAligned, C, R>(args, i, c);
    if (c >= columns) continue;
    if (kPass == Pass::kWeight) {
      store4(W + c, g, valid, kAligned);
      continue;
    }
    const Four w = master ? rounded4<T>(theta) : numbers(w_before);
    if (kPass != Pass::kCentre && p.grad_dot_w) {
#pragma unroll
      for (int j = 0; j < 4; ++j) g.x[j] -= along * w.x[j];
    }
    if (kPass == Pass::kGradSq) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < valid) square += double(g.x[j]) * g.x[j];
      continue;
    }
    if (const float of_bias = kPass == Pass::kCentre ? p.grad_b_enc[i] : 0; of_bias != 0) {
      Four sum = load4(centre + c, valid, kAligned);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.x[j] = fmaf(of_bias, w.x[j], sum.x[j]);
      store4(centre + c, sum, valid, kAligned);
    }
    Four m = numbers(m_before), v = numbers(v_before);
    if (!master) theta = w;
    adam4(p.hyper, g, valid, m, v, theta);
    if constexpr (sizeof(M) == 2) {
      const Draws draws = draws4(p.rng_state, i, start + c, kRoundMoments);
      m = stochastic4(m, draws.first);
      v = stochastic4(v, draws.second);
    }
    stream_store4<kAligned>(moment, m, valid);
    stream_store4<kAligned>(second, v, valid);
    if constexpr (sizeof(M) == 2)
      theta = stochastic4(theta, draws4(p.rng_state, i, start + c, kRoundWeights).first);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < valid) square += double(theta.x[j]) * theta.x[j];
    if (kPass != Pass::kCentre && master && p.normalize)  // which reads it once more
      store4(master + start + c, theta, valid, kAligned);
    else if (master)
      stream_store4<kAligned>(master + start + c, theta, valid);
    if (kPass == Pass::kCentre || !master || !p.normalize)
      store_weights<kAligned, T>(args, at, theta, valid, squares);
  }
  if (kPass == Pass::kGradSq) {
    const double total = block_sum(square, scratch);
    if (threadIdx.x == 0) p.grad_sq[i] = total;
  }
  if (kPass == Pass::kUpdate && p.normalize) {
    if (p.columns < p.d) {  // the other columns count as well
      __syncthreads();
      square = 0;
      for (int64_t c = threadIdx.x; c < p.d; c += blockDim.x) {
        const float theta = master ? master[c] : load(W + c);
        square += double(theta) * theta;
      }
    }
    normalize_row<kAligned, T, M>(args, i, square, scratch);
  } else if (kUpdates<kPass> && p.norms) {
    store_norms(p.norms, p.F, i, p.d, squares, scratch);
  }
}

}  // namespace

}  // namespace ksae::cuda
