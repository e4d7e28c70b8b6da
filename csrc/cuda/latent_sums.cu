// SPDX-License-Identifier: Apache-2.0
// Two sums over the entries of each latent: the gradient of its bias, and of its decoder row along
// that row. Summed in double, one warp a latent; long segments (segments.h) a warp a piece first.
//
// Bytes an entry: 4 of order, and gathered the value and its gradient; 16 a latent, 16 a piece and
// what is looked up. Flops: 4 an entry.
#include "ksae/op.h"
#include "latents.h"
#include "segments.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct Args {
  LatentSumsParams p;  // its host pointer to groups is not used
  LatentSumsGroup group[kMaxGroups];
  Segments segments;
  double* pieces;   // [slots, 2]: bias and grad_dot_w
  void* value_sum;  // not null: sums of the values alone, in their dtype
};

struct Sums {
  double bias, grad_dot_w;
};

// The sums of entries [from, to) by one warp; the same numbers in every lane.
template <class T>
__device__ __forceinline__ Sums sum_entries(const LatentSumsGroup& group, double scale,
                                            int32_t from, int32_t to) {
  Sums sum{};
#pragma unroll 4
  for (int32_t e = from + static_cast<int32_t>(threadIdx.x % 32); e < to; e += 32) {
    const int32_t at = group.order[e];
    const double product = group.grads ? scale * group.grads[at] : scale;
    sum.bias += product;  // entries have values that are not 0
    sum.grad_dot_w += load(static_cast<const T*>(group.values) + at) * product;
  }
  return {warp_sum(sum.bias), warp_sum(sum.grad_dot_w)};
}

// A warp a unit.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(Args args) {
  const LatentSumsParams& p = args.p;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= args.segments.units()) return;
  Piece pieces[2];
  pieces_of(args.segments, unit, pieces);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Piece piece = pieces[i];
    if (piece.from == piece.to) continue;
    const double scale = p.scales ? p.scales[piece.group] : 1.0f;
    const Sums sum = sum_entries<T>(args.group[piece.group], scale, piece.from, piece.to);
    double* out = args.pieces + 2 * piece.slot;
    if (threadIdx.x % 32 == 0) {
      out[0] = sum.bias;
      out[1] = sum.grad_dot_w;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(Args args) {
  const LatentSumsParams& p = args.p;
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= p.F) return;
  Sums total{};
  if (all_finite(p.scales, p.n_groups)) {
    for (int g = 0; g < p.n_groups; ++g) {
      const LatentSumsGroup& group = args.group[g];
      const int32_t begin = group.offsets[i], end = group.offsets[i + 1];
      Sums sum{};
      const int log = args.segments.log_cut[g];
      if (end - begin <= 1 << log) {
        sum = sum_entries<T>(group, p.scales ? p.scales[g] : 1.0f, begin, end);
      } else {
        const int32_t last = (end - 1) >> log;
        for (int32_t u = (begin >> log) + static_cast<int32_t>(threadIdx.x % 32); u <= last;
             u += 32) {
          const double* piece = args.pieces + 2 * slot_of(args.segments, g, u, begin);
          sum.bias += piece[0];
          sum.grad_dot_w += piece[1];
        }
        sum = {warp_sum(sum.bias), warp_sum(sum.grad_dot_w)};
      }
      total.bias += sum.bias;
      total.grad_dot_w += sum.grad_dot_w;
    }
  }
  if (threadIdx.x % 32 != 0) return;
  if (args.value_sum) {
    store(static_cast<T*>(args.value_sum) + i, static_cast<float>(total.grad_dot_w));
  } else {
    p.grad_b_enc[i] = static_cast<float>(total.bias);
    p.grad_dot_w[i] = static_cast<float>(total.grad_dot_w);
  }
}

size_t workspace_bytes(int64_t units) { return 4 * units * sizeof(double); }

cudaError_t launch(const LatentSumsParams& p, void* value_sum, void* workspace,
                   cudaStream_t stream) {
  const int64_t blocks = (p.F + kWarps - 1) / kWarps;
  if (p.n_groups > kMaxGroups || !grid_fits(blocks)) return cudaErrorInvalidValue;
  Args args{};
  args.p = p;
  for (int g = 0; g < p.n_groups; ++g) args.group[g] = p.groups[g];
  args.segments = segments_of(p.groups, p.n_groups, p.F);
  args.pieces = static_cast<double*>(workspace);
  args.value_sum = value_sum;
  const int64_t cuts = (args.segments.units() + kWarps - 1) / kWarps;
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (cuts)
      KSAE_LAUNCH((sum_pieces_kernel<T>), static_cast<unsigned>(cuts), kThreads, 0, stream, args);
    KSAE_LAUNCH((sums_kernel<T>), static_cast<unsigned>(blocks), kThreads, 0, stream, args);
    return cudaGetLastError();
  });
}

}  // namespace

size_t latent_sums_workspace(const LatentSumsParams& p) {
  return workspace_bytes(units_of(p.groups, p.n_groups));
}

cudaError_t latent_sums(const LatentSumsParams& p, void* workspace, cudaStream_t stream) {
  return launch(p, nullptr, workspace, stream);
}

size_t value_sums_workspace(const ValueSumsParams& p) { return workspace_bytes(units_of(&p, 1)); }

cudaError_t value_sums(const ValueSumsParams& p, void* workspace, cudaStream_t stream) {
  const LatentSumsGroup group{p.offsets, p.order, p.values, nullptr, p.entries};
  LatentSumsParams all{};
  all.F = p.F;
  all.dtype = p.dtype;
  all.groups = &group;
  all.n_groups = 1;
  return launch(all, p.value_sum, workspace, stream);
}

namespace {

using Group = LatentSumsGroup;
const Field kGroup[] = {
    KSAE_FIELD(Group, offsets),
    KSAE_FIELD(Group, order),
    KSAE_FIELD(Group, values),
    KSAE_FIELD(Group, grads),
    KSAE_FIELD_AS(Group, entries, "order_size"),
};
using P = LatentSumsParams;
const Field kFields[] = {
    KSAE_FIELD(P, F),      KSAE_FIELD(P, dtype),      KSAE_LIST(P, groups, n_groups, kGroup),
    KSAE_FIELD(P, scales), KSAE_FIELD(P, grad_b_enc), KSAE_FIELD(P, grad_dot_w),
};
const OpOf<cudaStream_t, P, latent_sums, latent_sums_workspace> op("latent_sums", kFields);

}  // namespace

}  // namespace ksae::cuda
