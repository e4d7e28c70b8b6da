// SPDX-License-Identifier: Apache-2.0
// Passes over latents: each latent's gradient row is formed in registers, used and forgotten.
//
// One block a latent. A thread owns four columns at a time: it adds the rows of the latent's
// entries in their order, takes off the part along W_i, moves m, v and the parameter, and forgets
// the gradient. Pieces of long segments (segments.h) are summed by other blocks first, so no sum
// depends on scheduling, and a latent that every token selects is spread over the device. With
// rng_state, bfloat16 weights have no master and are rounded stochastically, as are their moments.
// The norms of a row and of its bfloat16 copy are summed while the row is in registers.
//
// Bytes of an update, for each entry a row of `columns` numbers (from cache where they repeat), for
// each parameter 24 of moments and parameter and 2 of a 16-bit copy, to read the copy 2; 12 in all
// with rng_state, and about 35 integer instructions. For a piece of a long segment 8 bytes a
// column, written and read. Flops: 2 an entry and column, about 14 a parameter. Limits: four
// groups; N k and 2^31 - 4096 entries a group.
#include "entries.h"
#include "ksae/op.h"
#include "latents.h"
#include "norms.h"
#include "rounding.h"
#include "segments.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieceColumns = 128;

enum class Pass { kUpdate, kGradSq, kWeight };

struct Args {
  RowUpdateParams p;  // its host pointer to groups is not used
  RowGroup group[kMaxGroups];
  Segments segments;
  float* pieces;  // [slots, columns]
};

template <class R>
__device__ __forceinline__ Four centre4(const RowUpdateParams& p, int64_t c) {
  return p.centre && c < p.columns
             ? load4(static_cast<const R*>(p.centre) + c, p.columns - c, false)
             : Four{};
}

// Pieces of long segments, a block a piece and 128 columns: each warp adds an eighth of a unit, and
// the warps' sums are added in their order.
template <class C, class R, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) pieces_kernel(Args args) {
  static_assert(1 << kLogCut >= kThreads, "an entry a lane");
  KSAE_SHARED_BYTES(shared);
  auto* sums = reinterpret_cast<float*>(shared);  // [warps, 128]
  const RowUpdateParams& p = args.p;
  if (!all_finite(p.scales, p.n_groups)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t slices = (p.columns + kPieceColumns - 1) / kPieceColumns;
  const int64_t items = *args.segments.count * slices;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Piece piece = args.segments.list[item / slices];
    const RowGroup& group = args.group[piece.group];
    const int64_t c0 = item % slices * kPieceColumns, c = c0 + 4 * lane;
    const int32_t share = (1 << args.segments.log_cut[piece.group]) / (kThreads / 32);
    const int32_t first = piece.from + warp * share;
    const int32_t last = first + share < piece.to ? first + share : piece.to;
    const float scale = p.scales ? p.scales[piece.group] : 1.0f;
    const Four centre = centre4<R>(p, c);
    Four sum{};
    add_entries<kAligned, C, R>(group, p.columns, scale, first, last, c, centre, sum);
    *reinterpret_cast<Four*>(sums + warp * kPieceColumns + 4 * lane) = sum;
    __syncthreads();
    if (threadIdx.x < kPieceColumns && c0 + threadIdx.x < p.columns) {
      float total = 0;
      for (int w = 0; w < kThreads / 32; ++w) total += sums[w * kPieceColumns + threadIdx.x];
      args.pieces[int64_t(piece.slot) * p.columns + c0 + threadIdx.x] = total;
    }
    __syncthreads();  // read before the next item's are written
  }
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

// Unit row: theta /= |theta|, and its rounded copy. `square` is this thread's part of |theta|^2.
template <bool kAligned, class T, class M>
__device__ __forceinline__ void normalize_row(const Args& args, int64_t i, double square,
                                              double* scratch) {
  const RowUpdateParams& p = args.p;
  const T* W = static_cast<const T*>(p.W) + i * p.d;
  float* master = p.master ? p.master + i * p.d : nullptr;
  const float norm = static_cast<float>(sqrt(block_sum(square, scratch)));
  const float by = norm > 0 ? norm : 1.0f;
  Squares squares{};
  for (int64_t c = 4 * threadIdx.x; c < p.d; c += 4 * blockDim.x) {
    Four theta = master ? load4(master + c, p.d - c, kAligned) : load4(W + c, p.d - c, kAligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) theta.x[j] /= by;
    if constexpr (sizeof(M) == 2)
      theta = stochastic4(theta, draws4(p.rng_state, i, c, kRoundWeights).second);
    if (master) store4(master + c, theta, p.d - c, kAligned);
    store_weights<kAligned, T>(args, i * p.d + c, theta, p.d - c, squares);
  }
  if (p.norms) store_norms(p.norms, p.F, i, p.d, squares, scratch);
}

// M: of the moments; bfloat16 with rng_state.
template <class C, class R, class T, class M, Pass kPass, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) latent_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  auto* scratch = reinterpret_cast<double*>(shared);
  const RowUpdateParams& p = args.p;
  const int64_t i = blockIdx.x;
  if (!all_finite(p.scales, p.n_groups)) {
    if (kPass == Pass::kGradSq && threadIdx.x == 0) p.grad_sq[i] = 0;
    return;
  }
  T* W = static_cast<T*>(p.W) + i * p.d;
  float along = 0;
  if (kPass != Pass::kWeight && p.grad_dot_w) {
    along = p.grad_dot_w[i];
    if (kPass == Pass::kGradSq || p.start == 0) {
      double square = 0;
      for (int64_t c = 4 * threadIdx.x; c < p.d; c += 4 * blockDim.x) {
        const Four w = load4(W + c, p.d - c, kAligned);
#pragma unroll
        for (int j = 0; j < 4; ++j) square += double(w.x[j]) * w.x[j];
      }
      const auto whole = static_cast<float>(block_sum(square, scratch));
      along = whole > 0 ? along / whole : 0;
      if (kPass == Pass::kUpdate && p.columns < p.d && threadIdx.x == 0) p.grad_dot_w[i] = along;
    }
  }
  float* master = p.master ? p.master + i * p.d : nullptr;
  double square = 0;
  Squares squares{};
  const int lane = threadIdx.x % 32;
  for (int64_t c = 4 * threadIdx.x; c - 4 * lane < p.columns; c += 4 * blockDim.x) {
    const int64_t own = c < p.columns ? c : 0, valid = kAligned ? 4 : p.columns - own;
    const int64_t at = i * p.d + p.start + own;
    M *moment = static_cast<M*>(p.m) + at, *second = static_cast<M*>(p.v) + at;
    // What is streamed is on its way while the gradient is formed.
    decltype(stream4<kAligned>(moment, valid)) m_before, v_before;
    Four theta{};
    if (kPass == Pass::kUpdate) {
      m_before = stream4<kAligned>(moment, valid);
      v_before = stream4<kAligned>(second, valid);
      if (master) theta = stream4<kAligned>(master + p.start + own, valid);
    }
    decltype(row4<kAligned>(W, valid)) w_before{};
    if (kPass != Pass::kWeight && (p.grad_dot_w || !master))
      w_before = row4<kAligned>(W + p.start + own, valid);
    Four g = gradient4<kAligned, C, R>(args, i, c);
    if (c >= p.columns) continue;
    if (kPass == Pass::kWeight) {
      store4(W + c, g, valid, kAligned);
      continue;
    }
    const Four w = numbers(w_before);
    if (p.grad_dot_w) {
#pragma unroll
      for (int j = 0; j < 4; ++j) g.x[j] -= along * w.x[j];
    }
    if (kPass == Pass::kGradSq) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < valid) square += double(g.x[j]) * g.x[j];
      continue;
    }
    const float step = p.hyper[0], root = p.hyper[1], b1 = p.hyper[2], b2 = p.hyper[3];
    const float eps = p.hyper[4], grad_scale = p.hyper[5], rest1 = p.hyper[6], rest2 = p.hyper[7];
    Four m = numbers(m_before), v = numbers(v_before);
    if (!master) theta = w;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= valid) continue;
      const float gj = g.x[j] * grad_scale;
      m.x[j] = b1 * m.x[j] + rest1 * gj;
      v.x[j] = b2 * v.x[j] + rest2 * gj * gj;
      theta.x[j] -= step * m.x[j] / (sqrtf(v.x[j]) / root + eps);
    }
    if constexpr (sizeof(M) == 2) {
      const Draws draws = draws4(p.rng_state, i, p.start + c, kRoundMoments);
      m = stochastic4(m, draws.first);
      v = stochastic4(v, draws.second);
    }
    store4(moment, m, valid, kAligned);
    store4(second, v, valid, kAligned);
    if constexpr (sizeof(M) == 2)
      theta = stochastic4(theta, draws4(p.rng_state, i, p.start + c, kRoundWeights).first);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < valid) square += double(theta.x[j]) * theta.x[j];
    if (master) store4(master + p.start + c, theta, valid, kAligned);
    if (!master || !p.normalize) store_weights<kAligned, T>(args, at, theta, valid, squares);
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
  } else if (kPass == Pass::kUpdate && p.norms) {
    store_norms(p.norms, p.F, i, p.d, squares, scratch);
  }
}

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

size_t pieces_bytes(const RowUpdateParams& p) {
  return rounded(2 * units_of(p.groups, p.n_groups) * p.columns * sizeof(float));
}

template <class C, class R, class T, class M, Pass kPass>
cudaError_t launch(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  if (p.n_groups > kMaxGroups || !grid_fits(p.F)) return cudaErrorInvalidValue;
  Args args{};
  args.p = p;
  const int64_t units = units_of(p.groups, p.n_groups);
  if (!grid_fits(2 * units)) return cudaErrorInvalidConfiguration;
  auto* memory = static_cast<char*>(workspace);
  args.segments = segments_of(p.groups, p.n_groups, p.F, memory);
  args.pieces = reinterpret_cast<float*>(memory + list_bytes(units));
  bool aligned = aligned4(static_cast<const T*>(p.W), p.d) &&
                 aligned4(static_cast<const M*>(p.m), p.d) &&
                 aligned4(static_cast<const M*>(p.v), p.d) && aligned4(p.master, p.d) &&
                 aligned4(static_cast<const __nv_bfloat16*>(p.W_bf16), p.d) && p.start % 4 == 0 &&
                 p.columns % 4 == 0;
  for (int g = 0; g < p.n_groups; ++g) {
    args.group[g] = p.groups[g];
    aligned = aligned && aligned4(static_cast<const R*>(p.groups[g].rows), p.columns);
  }
  if (units && p.columns) {
    unsigned blocks = 0;
    const int64_t slices = (p.columns + kPieceColumns - 1) / kPieceColumns;
    cudaError_t error = grid_for(2 * units * slices, &blocks);
    if (error == cudaSuccess) error = list_pieces(args.segments, stream);
    if (error != cudaSuccess) return error;
    error = with_alignment(aligned, [&](auto is) {
      KSAE_LAUNCH((pieces_kernel<C, R, is.value>), blocks, kThreads,
                  kThreads / 32 * kPieceColumns * sizeof(float), stream, args);
      return cudaGetLastError();
    });
    if (error != cudaSuccess) return error;
  }
  if (p.grad_b_dec) {
    const cudaError_t error =
        centre_gradient(p, memory + list_bytes(units) + pieces_bytes(p), stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t wanted = (p.columns + 127) / 128 * 32;
  const auto threads =
      static_cast<unsigned>(wanted < 32 ? 32 : (wanted > kThreads ? kThreads : wanted));
  return with_alignment(aligned, [&](auto is) {
    KSAE_LAUNCH((latent_kernel<C, R, T, M, kPass, is.value>), static_cast<unsigned>(p.F), threads,
                kThreads / 32 * sizeof(double), stream, args);
    return cudaGetLastError();
  });
}

template <Pass kPass>
cudaError_t launch_side(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return p.rows_dtype == p.dtype ? launch<float, T, T, float, kPass>(p, workspace, stream)
                                   : launch<T, float, T, float, kPass>(p, workspace, stream);
  });
}

RowUpdateParams weight_params(const DecodeBackwardWeightParams& p, RowGroup* group) {
  *group = {p.offsets, p.order, p.values, p.grad, p.k, p.N * p.k, p.row_of};
  RowUpdateParams row{};
  row.F = p.F;
  row.d = row.columns = p.d;
  row.dtype = p.dtype;
  row.groups = group;
  row.n_groups = 1;
  row.W = p.grad_W;
  return row;
}

ValueSumsParams sums_params(const DecodeBackwardWeightParams& p) {
  return {p.F, p.dtype, p.offsets, p.order, p.values, p.N * p.k, p.value_sum};
}

}  // namespace

size_t row_update_workspace(const RowUpdateParams& p) {
  return list_bytes(units_of(p.groups, p.n_groups)) + pieces_bytes(p) +
         (p.grad_b_dec ? centre_gradient_workspace(p) : 0);
}

cudaError_t row_update(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  if (p.norms && !(p.W_bf16 && p.columns == p.d)) return cudaErrorInvalidValue;
  if (p.rng_state) {
    using B = __nv_bfloat16;
    if (p.dtype != Dtype::kBFloat16 || p.master || p.start % 4) return cudaErrorInvalidValue;
    return p.rows_dtype == p.dtype ? launch<float, B, B, B, Pass::kUpdate>(p, workspace, stream)
                                   : launch<B, float, B, B, Pass::kUpdate>(p, workspace, stream);
  }
  return launch_side<Pass::kUpdate>(p, workspace, stream);
}

cudaError_t row_grad_sq(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  return launch_side<Pass::kGradSq>(p, workspace, stream);
}

size_t sparse_decode_backward_weight_workspace(const DecodeBackwardWeightParams& p) {
  RowGroup group;
  const size_t rows = row_update_workspace(weight_params(p, &group));
  const size_t sums = value_sums_workspace(sums_params(p));
  return rows > sums ? rows : sums;  // one after the other
}

cudaError_t sparse_decode_backward_weight(const DecodeBackwardWeightParams& p, void* workspace,
                                          cudaStream_t stream) {
  RowGroup group;
  const RowUpdateParams row = weight_params(p, &group);
  const cudaError_t error = value_sums(sums_params(p), workspace, stream);
  if (error != cudaSuccess) return error;
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch<T, T, T, float, Pass::kWeight>(row, workspace, stream);
  });
}

namespace {

const Field kGroup[] = {
    KSAE_FIELD(RowGroup, offsets),
    KSAE_FIELD(RowGroup, order),
    KSAE_FIELD(RowGroup, coefficients),
    KSAE_FIELD(RowGroup, rows),
    KSAE_FIELD(RowGroup, k),
    KSAE_FIELD_AS(RowGroup, entries, "order_size"),
    KSAE_FIELD(RowGroup, row_of),
};
using P = RowUpdateParams;
const Field kFields[] = {
    KSAE_FIELD(P, grad_sq),  // of row_grad_sq alone
    KSAE_FIELD(P, F),
    KSAE_FIELD(P, d),
    KSAE_FIELD(P, start),
    KSAE_FIELD(P, columns),
    KSAE_FIELD(P, dtype),
    KSAE_FIELD(P, rows_dtype),
    KSAE_LIST(P, groups, n_groups, kGroup),
    KSAE_FIELD(P, scales),
    KSAE_FIELD(P, centre),
    KSAE_FIELD(P, grad_dot_w),
    KSAE_FIELD(P, W),
    KSAE_FIELD(P, grad_b_enc),  // from here on, of row_update alone
    KSAE_FIELD(P, grad_b_dec),
    KSAE_FIELD(P, master),
    KSAE_FIELD(P, m),
    KSAE_FIELD(P, v),
    KSAE_FIELD(P, W_bf16),
    KSAE_FIELD(P, norms),
    KSAE_FIELD(P, rng_state),
    KSAE_FIELD(P, hyper),
    KSAE_FIELD(P, normalize),
};
constexpr size_t kOfNorm = 12, kAll = sizeof(kFields) / sizeof(Field);
const OpOf<cudaStream_t, P, row_grad_sq, row_update_workspace> norm("row_grad_sq", kFields,
                                                                    kOfNorm);
const OpOf<cudaStream_t, P, row_update, row_update_workspace> update("row_update", kFields + 1,
                                                                     kAll - 1);

}  // namespace

}  // namespace ksae::cuda
