// SPDX-License-Identifier: Apache-2.0
// Passes over latents: each latent's gradient row is formed in registers, used and forgotten.
//
// One block a latent. A thread owns four columns at a time: it adds the rows of the latent's
// entries in their order, takes off the part along W_i, moves m, v and the parameter, and forgets
// the gradient. With grad_b_dec a block takes several latents one after the other and keeps the sum
// of their W_i grad_b_enc_i in shared memory; the blocks' sums are added in their order. Where
// there is a master, W_i is rounded from it and not read. Pieces of long segments (segments.h) are
// summed by other blocks first, so no sum depends on scheduling, and a latent that every token
// selects is spread over the device. With rng_state, bfloat16 weights have no master and are
// rounded stochastically, as are their moments. The norms of a row and of its bfloat16 copy are
// summed while the row is in registers.
//
// Bytes of an update, for each entry a row of `columns` numbers (from cache where they repeat), for
// each parameter 24 of moments and parameter and 2 of a 16-bit copy; 12 in all with rng_state, and
// about 35 integer instructions. For a piece of a long segment 8 bytes a column, written and read,
// and as many for a block's part of grad_b_dec. What is streamed is read and written with
// evict-first hints. Flops: 2 an entry and column, about 14 a parameter. Limits: four groups; N k
// and 2^31 - 4096 entries a group.
#include "ksae/op.h"
#include "row_pass.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPieceColumns = 128;
constexpr int64_t kBlockColumns = 512;     // of a block of pieces_kernel
constexpr int64_t kMostShares = 3072;      // of the latents, for grad_b_dec
constexpr int64_t kLeastShare = 8;         // latents
constexpr int64_t kSharedRow = 11 * 1024;  // numbers of a row of sums that shared memory holds

// The sum of a piece's columns [c0, c0 + 128): each warp adds an eighth of a unit, and the warps'
// sums are added in their order.
template <class C, class R, bool kAligned>
__device__ __forceinline__ void sum_piece(const Args& args, const Piece& piece, int64_t c0,
                                          float* sums) {
  const RowUpdateParams& p = args.p;
  const RowGroup& group = args.group[piece.group];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t c = c0 + 4 * lane;
  const int32_t share = (1 << args.segments.log_cut[piece.group]) / kWarps;
  const int32_t first = piece.from + warp * share;
  const int32_t last = first + share < piece.to ? first + share : piece.to;
  const float scale = p.scales ? p.scales[piece.group] : 1.0f;
  Four sum{};
  add_entries<kAligned, C, R>(group, p.columns, scale, first, last, c, centre4<R>(p, c), sum);
  *reinterpret_cast<Four*>(sums + warp * kPieceColumns + 4 * lane) = sum;
  __syncthreads();
  if (threadIdx.x < kPieceColumns && c0 + threadIdx.x < p.columns) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kPieceColumns + threadIdx.x];
    args.pieces[piece.slot * p.columns + c0 + threadIdx.x] = total;
  }
  __syncthreads();  // read before the next are written
}

// Pieces of long segments. A block looks at a unit a warp, far from each other, as those of one
// latent are not, and sums the pieces it finds for some of the columns.
template <class C, class R, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) pieces_kernel(Args args, int64_t every) {
  static_assert(1 << kLogCut >= kThreads, "an entry a lane");
  KSAE_SHARED_BYTES(shared);
  auto* sums = reinterpret_cast<float*>(shared);                          // [warps, 128]
  auto* found = reinterpret_cast<Piece*>(sums + kWarps * kPieceColumns);  // [2 * warps]
  const RowUpdateParams& p = args.p;
  if (!all_finite(p.scales, p.n_groups)) return;
  const int64_t unit = blockIdx.x % every + threadIdx.x / 32 * every;
  Piece own[2] = {};
  if (unit < args.segments.units()) pieces_of(args.segments, unit, own);
  if (threadIdx.x % 32 == 0) {
    found[threadIdx.x / 32 * 2] = own[0];
    found[threadIdx.x / 32 * 2 + 1] = own[1];
  }
  __syncthreads();
  const int64_t first = blockIdx.x / every * kBlockColumns, last = first + kBlockColumns;
  for (int i = 0; i < 2 * kWarps; ++i) {
    const Piece piece = found[i];
    if (piece.from == piece.to) continue;
    for (int64_t c = first; c < last && c < p.columns; c += kPieceColumns)
      sum_piece<C, R, kAligned>(args, piece, c, sums);
  }
}

// A block takes a latent, or with grad_b_dec latents [share * block, share * (block + 1)), whose
// part of it it keeps.
template <class C, class R, class T, class M, Pass kPass, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) latent_kernel(Args args) {
  KSAE_SHARED_BYTES(shared);
  auto* scratch = reinterpret_cast<double*>(shared);
  const RowUpdateParams& p = args.p;
  const bool finite = all_finite(p.scales, p.n_groups);
  if constexpr (kPass != Pass::kCentre) {
    if (finite)
      pass_row<C, R, T, M, kPass, kAligned>(args, blockIdx.x, scratch, nullptr);
    else if (kPass == Pass::kGradSq && threadIdx.x == 0)
      p.grad_sq[blockIdx.x] = 0;
  } else {
    float* centre = p.d > kSharedRow ? args.sums + blockIdx.x * p.d
                                     : reinterpret_cast<float*>(scratch + kWarps);
    for (int c = 4 * threadIdx.x; c < p.d; c += 4 * blockDim.x)
      store4(centre + c, Four{}, p.d - c, kAligned);
    const uint32_t share = finite ? args.share : 0;
    for (uint32_t l = 0; l < share && blockIdx.x * share + l < p.F; ++l)
      pass_row<C, R, T, M, kPass, kAligned>(args, blockIdx.x * share + l, scratch, centre);
    float* out = args.sums + blockIdx.x * p.d;
    for (int c = 4 * threadIdx.x; p.d <= kSharedRow && c < p.d; c += 4 * blockDim.x)
      store4(out + c, load4(centre + c, p.d - c, kAligned), p.d - c, kAligned);
  }
}

// Latents that one block takes.
int64_t share_of(const RowUpdateParams& p) {
  const int64_t share = (p.F + kMostShares - 1) / kMostShares;
  return p.grad_b_dec ? (share < kLeastShare ? kLeastShare : share) : 1;
}
int64_t shares_of(const RowUpdateParams& p) { return (p.F + share_of(p) - 1) / share_of(p); }

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
  args.segments = segments_of(p.groups, p.n_groups, p.F);
  args.pieces = static_cast<float*>(workspace);
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
    const int64_t every = (units + kWarps - 1) / kWarps;
    const int64_t blocks = every * ((p.columns + kBlockColumns - 1) / kBlockColumns);
    if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
    const cudaError_t error = with_alignment(aligned, [&](auto is) {
      KSAE_LAUNCH((pieces_kernel<C, R, is.value>), static_cast<unsigned>(blocks), kThreads,
                  kWarps * (kPieceColumns * sizeof(float) + 2 * sizeof(Piece)), stream, args,
                  every);
      return cudaGetLastError();
    });
    if (error != cudaSuccess) return error;
  }
  args.share = share_of(p);
  args.sums = args.pieces + pieces_bytes(p) / sizeof(float);
  const int64_t blocks = shares_of(p), wanted = (p.columns + 127) / 128 * 32;
  const auto threads =
      static_cast<unsigned>(wanted < 32 ? 32 : (wanted > kThreads ? kThreads : wanted));
  size_t bytes = kWarps * sizeof(double);
  if (p.grad_b_dec && p.d <= kSharedRow) bytes += (p.d + 3) / 4 * 4 * sizeof(float);
  const cudaError_t error = with_alignment(aligned, [&](auto is) {
    KSAE_LAUNCH((latent_kernel<C, R, T, M, kPass, is.value>), static_cast<unsigned>(blocks),
                threads, bytes, stream, args);
    return cudaGetLastError();
  });
  if (error != cudaSuccess || !p.grad_b_dec) return error;
  return column_sums(args.sums, blocks, p.d, p.grad_b_dec, stream);
}

// As launch, by the types of rows and coefficients: of the encoder, or of the decoder, whose rows
// are residuals, rounded or not.
template <class T, class M, Pass kPass>
cudaError_t launch_rows(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  if (p.rows_dtype != p.dtype) return launch<T, float, T, M, kPass>(p, workspace, stream);
  if constexpr (!std::is_same_v<T, float> && kPass != Pass::kCentre) {
    if (p.coefficients_dtype == p.dtype) return launch<T, T, T, M, kPass>(p, workspace, stream);
  }
  return launch<float, T, T, M, kPass>(p, workspace, stream);
}

template <Pass kPass>
cudaError_t launch_side(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  if constexpr (kUpdates<kPass>) {
    if (p.rng_state) return launch_rows<__nv_bfloat16, __nv_bfloat16, kPass>(p, workspace, stream);
  }
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_rows<T, float, kPass>(p, workspace, stream);
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
  return pieces_bytes(p) + (p.grad_b_dec ? shares_of(p) * p.d * sizeof(float) : 0);
}

cudaError_t row_update(const RowUpdateParams& p, void* workspace, cudaStream_t stream) {
  if (p.norms && !(p.W_bf16 && p.columns == p.d)) return cudaErrorInvalidValue;
  if (p.rng_state && (p.dtype != Dtype::kBFloat16 || p.master || p.start % 4))
    return cudaErrorInvalidValue;
  if (!p.grad_b_dec) return launch_side<Pass::kUpdate>(p, workspace, stream);
  const bool narrow = p.rows_dtype == p.dtype && p.coefficients_dtype != Dtype::kFloat32;
  if (p.columns != p.d || p.normalize || p.grad_dot_w || narrow) return cudaErrorInvalidValue;
  return launch_side<Pass::kCentre>(p, workspace, stream);
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
    KSAE_FIELD(P, coefficients_dtype),
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
constexpr size_t kOfNorm = 13, kAll = sizeof(kFields) / sizeof(Field);
const OpOf<cudaStream_t, P, row_grad_sq, row_update_workspace> norm("row_grad_sq", kFields,
                                                                    kOfNorm);
const OpOf<cudaStream_t, P, row_update, row_update_workspace> update("row_update", kFields + 1,
                                                                     kAll - 1);

}  // namespace

}  // namespace ksae::cuda
