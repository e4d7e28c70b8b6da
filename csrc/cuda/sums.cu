// SPDX-License-Identifier: Apache-2.0
// Two sums over the entries of each latent: the gradient of its bias, and of its decoder row along
// that row. Summed in double, one warp a latent; long segments (segments.h) a warp a piece first.
//
// Bytes an entry: 4 of order, and gathered the value and its gradient; 16 a latent and 32 a unit
// of kCut entries. Flops: 4 an entry.
#include "segments.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct Args {
  LatentSumsParams p;  // its host pointer to groups is not used
  LatentSumsGroup group[kMaxGroups];
  Units units;
  double* pieces;   // [units, 2, 2]: of a slot bias and parallel
  void* value_sum;  // not null: sums of the values alone, in their dtype
};

struct Sums {
  double bias, parallel;
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
    sum.parallel += load(static_cast<const T*>(group.values) + at) * product;
  }
  return {warp_sum(sum.bias), warp_sum(sum.parallel)};
}

__device__ __forceinline__ bool all_finite(const LatentSumsParams& p) {
  for (int g = 0; p.scales && g < p.n_groups; ++g)
    if (!finite(p.scales[g])) return false;
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(Args args) {
  const LatentSumsParams& p = args.p;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= args.units.first[p.n_groups]) return;
  const int g = args.units.group_of(unit);
  const LatentSumsGroup& group = args.group[g];
  const double scale = p.scales ? p.scales[g] : 1.0f;
  for (int slot = 0; slot < 2; ++slot) {
    const Piece piece = piece_of(group.offsets, p.F, unit - args.units.first[g], slot);
    if (piece.from == piece.to) continue;
    const Sums sum = sum_entries<T>(group, scale, piece.from, piece.to);
    double* out = args.pieces + 2 * (2 * unit + slot);
    if (threadIdx.x % 32 == 0) out[0] = sum.bias, out[1] = sum.parallel;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(Args args) {
  const LatentSumsParams& p = args.p;
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= p.F) return;
  Sums total{};
  if (all_finite(p)) {
    for (int g = 0; g < p.n_groups; ++g) {
      const LatentSumsGroup& group = args.group[g];
      const int32_t begin = group.offsets[i], end = group.offsets[i + 1];
      Sums sum{};
      if (end - begin <= kCut) {
        sum = sum_entries<T>(group, p.scales ? p.scales[g] : 1.0f, begin, end);
      } else {
        const int32_t last = (end - 1) / kCut;
        for (int32_t u = begin / kCut + threadIdx.x % 32; u <= last; u += 32) {
          const double* piece = args.pieces + 2 * slot_of(args.units.first[g], u, begin);
          sum.bias += piece[0];
          sum.parallel += piece[1];
        }
        sum = {warp_sum(sum.bias), warp_sum(sum.parallel)};
      }
      total.bias += sum.bias;
      total.parallel += sum.parallel;
    }
  }
  if (threadIdx.x % 32 != 0) return;
  if (args.value_sum) {
    store(static_cast<T*>(args.value_sum) + i, static_cast<float>(total.parallel));
  } else {
    p.grad_b_enc[i] = static_cast<float>(total.bias);
    p.parallel[i] = static_cast<float>(total.parallel);
  }
}

size_t pieces_bytes(int64_t units) { return 4 * units * sizeof(double); }

cudaError_t launch(const LatentSumsParams& p, void* value_sum, void* workspace,
                   cudaStream_t stream) {
  const int64_t blocks = (p.F + kWarps - 1) / kWarps;
  if (p.n_groups > kMaxGroups || !grid_fits(blocks)) return cudaErrorInvalidValue;
  Args args{};
  args.p = p;
  args.pieces = static_cast<double*>(workspace);
  args.value_sum = value_sum;
  for (int g = 0; g < p.n_groups; ++g) {
    args.group[g] = p.groups[g];
    args.units.first[g + 1] = args.units.first[g] + units_of(p.groups[g].entries);
  }
  const auto cuts = static_cast<unsigned>((args.units.first[p.n_groups] + kWarps - 1) / kWarps);
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (cuts) KSAE_LAUNCH((sum_pieces_kernel<T>), cuts, kThreads, 0, stream, args);
    KSAE_LAUNCH((sums_kernel<T>), static_cast<unsigned>(blocks), kThreads, 0, stream, args);
    return cudaGetLastError();
  });
}

}  // namespace

size_t latent_sums_workspace(const LatentSumsParams& p) {
  int64_t units = 0;
  for (int g = 0; g < p.n_groups; ++g) units += units_of(p.groups[g].entries);
  return pieces_bytes(units);
}

cudaError_t latent_sums(const LatentSumsParams& p, void* workspace, cudaStream_t stream) {
  return launch(p, nullptr, workspace, stream);
}

size_t value_sums_workspace(int64_t entries) { return pieces_bytes(units_of(entries)); }

cudaError_t value_sums(const ValueSumsParams& p, void* workspace, cudaStream_t stream) {
  const LatentSumsGroup group{p.offsets, p.order, p.values, nullptr, p.entries};
  LatentSumsParams all{};
  all.F = p.F;
  all.dtype = p.dtype;
  all.groups = &group;
  all.n_groups = 1;
  return launch(all, p.value_sum, workspace, stream);
}

}  // namespace ksae::cuda
