// SPDX-License-Identifier: Apache-2.0
// Token-major gathers of decoder rows.
//
// sparse_decode and slices of the residual: one warp a token and 128 columns, slices outermost, so
// that 128 columns of W_dec (256 F bytes at 16 bits) are what the L2 cache has to hold. The whole
// residual: one block a token, its row in shared memory, from which the products with the chosen
// rows are taken afterwards: from cache if it holds k rows of every block in flight, else these
// rows come twice. With column sums, a block takes N / kShares tokens one after the other and keeps
// their sum. All sums have a fixed order.
//
// Bytes: N k d sizeof(T) gathered (twice for the residual), N d written; for column sums 8 kShares
// d instead of another reading of the residual. Flops: 2 N k d (4 N k d). Limits: F and d
// below 2^32; a residual row longer than kSharedRow numbers lies in the workspace. A code with row
// offsets costs 16 bytes a token more; one token is one block's, or one warp's for 128 columns.
//
// AuxK has k_aux slots a token whatever is dead, for only the device knows how many latents are.
// Slots of value 0 are passed over 32 at a time: with nothing dead they cost their own reading, and
// no row's. A used slot costs 10 d bytes of gathers at 16 bits: W_dec twice here, the residual and
// x in the latent pass. Products with the compacted dead rows would take 8 d flops a token and row
// instead: at a hundred flops in the time of a byte, the shorter way if more than one dead latent
// in a hundred is used. But a product has its size from the host. To ask for it is to wait for the
// device, and a CUDA graph keeps the answer; with a fixed capacity of C rows, every step pays 4 C /
// F of the encoder's product, and dead latents beyond C come back here.
#include "common.h"

namespace ksae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSlice = 128;  // columns a warp
constexpr int64_t kSharedRow = 11 * 1024;
constexpr int64_t kShares = 1024;  // of the tokens, for column sums

// The entries base + [from, to) of a token: k, or those between its row offsets, which are below
// 2^31 - 4096: a warp counts up to 256 past the last.
template <bool kOffsets>
struct Entries {
  static constexpr int64_t from = 0;
  int64_t base, to;
  __device__ __forceinline__ Entries(const DecodeParams& p, int64_t n) : base(n * p.k), to(p.k) {}
};
template <>
struct Entries<true> {
  static constexpr int32_t base = 0;
  int32_t from, to;
  __device__ __forceinline__ Entries(const DecodeParams& p, int64_t n)
      : from(static_cast<int32_t>(p.row_offsets[n])),
        to(static_cast<int32_t>(p.row_offsets[n + 1])) {}
};

// How many rows are on their way to a thread at once: 64 bytes, where rows allow it.
template <bool kAligned, class T>
constexpr int kBatch = kAligned ? 16 / sizeof(T) : 2;

// How many of the columns from c on a thread has.
template <bool kAligned>
__device__ __forceinline__ int64_t valid4(int64_t d, int64_t c) {
  return kAligned ? 4 : d - c;
}

// Columns [c, c + 4) of the unrounded reconstruction of token n, bias included; anything from
// column d on. All 32 lanes call.
template <bool kOffsets, bool kAligned, class T>
__device__ __forceinline__ Four decode4(const DecodeParams& p, int64_t n, int64_t c) {
  const auto d = static_cast<uint32_t>(p.d);  // the product of 32-bit numbers is one instruction
  const int64_t from = c < p.d ? c : 0, valid = valid4<kAligned>(p.d, from);
  const T* W = static_cast<const T*>(p.W_dec) + from;
  const Entries<kOffsets> own(p, n);
  const T* values = static_cast<const T*>(p.values) + own.base;
  const int lane = threadIdx.x % 32;
  Four sum{};
  // Fewer registers: with offsets each lane counts to its own entry, without the warp to its first.
  const int own_lane = kOffsets ? lane : 0, ahead = lane - own_lane;
  for (auto j0 = own.from + own_lane; j0 - own_lane < own.to; j0 += 32) {
    float v = 0;
    uint32_t i = 0;
    if (j0 + ahead < own.to) {
      v = load(values + j0 + ahead);
      i = static_cast<uint32_t>(index_at(p.indices64, p.indices32, own.base + j0 + ahead));
    }
    const unsigned used = __ballot_sync(0xffffffffu, v != 0);
    for (int j = 0; j < 32 && used >> j; j += kBatch<kAligned, T>) {
      float by[kBatch<kAligned, T>];
      decltype(row4<kAligned>(W, valid)) w[kBatch<kAligned, T>];
#pragma unroll
      for (int b = 0; b < kBatch<kAligned, T>; ++b) {
        by[b] = __shfl_sync(0xffffffffu, v, j + b);
        const uint32_t row = __shfl_sync(0xffffffffu, i, j + b);
        if (by[b] != 0) w[b] = row4<kAligned>(W + uint64_t(row) * d, valid);
      }
#pragma unroll
      for (int b = 0; b < kBatch<kAligned, T>; ++b) {
        if (by[b] == 0) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.x[e] = fmaf(by[b], number(w[b], e), sum.x[e]);
      }
    }
  }
  if (p.b_dec) {
    const Four b = load4(static_cast<const T*>(p.b_dec) + from, valid, kAligned);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.x[e] += b.x[e];
  }
  return sum;
}

// Takes the target from columns [c, c + 4) of the reconstruction of token n, and stores those that
// are wanted.
template <bool kAligned, class T>
__device__ __forceinline__ Four residual4(const ResidualParams& p, int64_t n, int64_t c,
                                          const Four& reconstruction) {
  const int64_t d = p.decode.d, at = n * d + c, valid = valid4<kAligned>(d, c);
  const Four target = p.target_float
                          ? load4(static_cast<const float*>(p.target) + at, valid, kAligned)
                          : load4(static_cast<const T*>(p.target) + at, valid, kAligned);
  Four r;
#pragma unroll
  for (int e = 0; e < 4; ++e) r.x[e] = reconstruction.x[e] - target.x[e];
  if (p.rounded) store4(static_cast<T*>(p.rounded) + at, r, valid, kAligned);
  float* out = p.residual + n * p.columns + c - p.start;
  if constexpr (kAligned) {
    if (c >= p.start && c < p.start + p.columns) store4(out, r, 4, true);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < valid && c + e >= p.start && c + e < p.start + p.columns) out[e] = r.x[e];
  }
  return r;
}

// What of columns [start, start + columns) is stored: out of DecodeParams, in T, or p.residual: the
// reconstruction, not rounded, or the residual.
enum class Store { kOut, kPartial, kResidual };

template <class T, Store kStore, bool kOffsets, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8)
    decode_kernel(ResidualParams p, int64_t first, int64_t slices) {
  const DecodeParams& q = p.decode;
  const int64_t at = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (at >= q.N * slices) return;
  const int64_t n = at % q.N;
  const int64_t c = (first + at / q.N) * kSlice + 4 * (threadIdx.x % 32);
  const Four sum = decode4<kOffsets, kAligned, T>(q, n, c);
  if (c >= q.d) return;
  if constexpr (kStore == Store::kResidual)
    residual4<kAligned, T>(p, n, c, sum);
  else if constexpr (kStore == Store::kPartial)
    store4(p.residual + n * q.d + c, sum, valid4<kAligned>(q.d, c), kAligned);
  else
    store4(static_cast<T*>(q.out) + n * q.d + c, sum, valid4<kAligned>(q.d, c), kAligned);
}

// <row, w> over d columns by one warp; the same number in every lane.
template <bool kAligned, class R, class T>
__device__ __forceinline__ float dot(const R* row, const T* w, int64_t d) {
  float sum = 0;
  for (int64_t c0 = 4 * (threadIdx.x % 32); c0 < d; c0 += kBatch<kAligned, T> * kSlice) {
    decltype(row4<kAligned>(w, 0)) ahead[kBatch<kAligned, T>];
#pragma unroll
    for (int b = 0; b < kBatch<kAligned, T>; ++b) {
      const int64_t c = c0 + b * kSlice;
      if (c < d) ahead[b] = row4<kAligned>(w + c, d - c);
    }
#pragma unroll
    for (int b = 0; b < kBatch<kAligned, T>; ++b) {
      const int64_t c = c0 + b * kSlice;
      if (c >= d) continue;
      const auto a = row4<kAligned>(row + c, d - c);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fmaf(number(a, e), number(ahead[b], e), sum);
    }
  }
  return warp_sum(sum);
}

// A block takes tokens [share * block, share * (block + 1)).
template <class T, bool kOffsets, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8)
    residual_kernel(ResidualParams p, float* rows, float* sums, int64_t share) {
  KSAE_SHARED_BYTES(shared);
  const DecodeParams& q = p.decode;
  auto* scratch = reinterpret_cast<double*>(shared);
  float* row = rows ? rows + blockIdx.x * q.d : reinterpret_cast<float*>(scratch + kThreads / 32);
  const int64_t first = blockIdx.x * share, last = first + share < q.N ? first + share : q.N;
  for (int64_t n = first; n < last; ++n) {
    double square = 0;
    for (int64_t c0 = 0; c0 < q.d; c0 += 4 * kThreads) {
      const int64_t c = c0 + 4 * threadIdx.x, valid = valid4<kAligned>(q.d, c);
      const Four sum = decode4<kOffsets, kAligned, T>(q, n, c);
      if (c >= q.d) continue;
      const Four r = residual4<kAligned, T>(p, n, c, sum);
      store4(row + c, r, valid, kAligned);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < valid) square += double(r.x[e]) * r.x[e];
      if (sums) {  // [blocks, d], each number of one thread
        float* total = sums + blockIdx.x * q.d + c;
        Four before{};
        if (n > first) before = load4(total, valid, kAligned);
#pragma unroll
        for (int e = 0; e < 4; ++e) before.x[e] += r.x[e];
        store4(total, before, valid, kAligned);
      }
    }
    square = block_sum(square, scratch);  // a barrier: the row is complete
    if (threadIdx.x == 0) p.sq_error[n] = square;
    const T* W = static_cast<const T*>(q.W_dec);
    // A warp takes every fourth slot, a lane every 32nd of these.
    const int lane = threadIdx.x % 32;
    const Entries<kOffsets> own(q, n);
    for (auto j0 = own.from; j0 < own.to; j0 += kThreads) {
      const auto j = j0 + lane * (kThreads / 32) + static_cast<int>(threadIdx.x / 32);
      const auto at = own.base + j;
      const bool used = j < own.to && load(static_cast<const T*>(q.values) + at) != 0;
      const int64_t i = used ? index_at(q.indices64, q.indices32, at) : 0;
      float g = 0;
      for (unsigned rest = __ballot_sync(0xffffffffu, used); rest; rest &= rest - 1) {
        const int from = __ffs(static_cast<int>(rest)) - 1;
        const T* w = W + __shfl_sync(0xffffffffu, i, from) * q.d;
        const float product = dot<kAligned>(row, w, q.d);
        if (lane == from) g = product;
      }
      if (j < own.to) p.grad_values[at] = g;
    }
    __syncthreads();  // the row is read before the next token's is written
  }
}

// One product by a warp. G: of grad and its products.
template <class T, class G, bool kAligned>
__device__ __forceinline__ void product(const DecodeBackwardValuesParams& p) {
  const int64_t at = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (at >= p.N * p.k) return;
  const T* W = static_cast<const T*>(p.W_dec) + index_at(p.indices64, p.indices32, at) * p.d;
  const int64_t n = p.row_of ? p.row_of[at] : at / p.k;
  const float g = dot<kAligned>(static_cast<const G*>(p.grad) + n * p.d, W, p.d);
  if (threadIdx.x % 32 == 0) store(static_cast<G*>(p.grad_values) + at, g);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8)
    backward_values_kernel(DecodeBackwardValuesParams p) {
  product<T, T, kAligned>(p);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8)
    residual_products_kernel(DecodeBackwardValuesParams p) {
  product<T, float, kAligned>(p);
}

// Who takes which tokens of the whole residual: from N alone, so that sums are the same everywhere.
struct Blocks {
  int64_t share, count;
  bool outside;  // rows do not fit in shared memory

  explicit Blocks(const ResidualParams& p)
      : share(p.column_sums ? (p.decode.N + kShares - 1) / kShares : 1),
        count(share ? (p.decode.N + share - 1) / share : 0),
        outside(p.decode.d > kSharedRow) {}
};

// Whether all rows may be read four numbers at a time, and slices cut none of these fours.
template <class T>
bool aligned_code(const DecodeParams& p) {
  return aligned4(static_cast<const T*>(p.W_dec), p.d) &&
         aligned4(static_cast<const T*>(p.b_dec), p.d) && aligned4(static_cast<T*>(p.out), p.d);
}
template <class T>
bool aligned_residual(const ResidualParams& p) {
  const bool target = p.target_float ? aligned4(static_cast<const float*>(p.target), p.decode.d)
                                     : aligned4(static_cast<const T*>(p.target), p.decode.d);
  return target && aligned_code<T>(p.decode) && aligned4(p.residual, p.columns) &&
         p.start % 4 == 0 && aligned4(static_cast<const T*>(p.rounded), p.decode.d);
}

// Whether rows have offsets, as a constant of run's argument.
template <class Run>
cudaError_t with_offsets(const DecodeParams& p, Run run) {
  return p.row_offsets ? run(std::true_type{}) : run(std::false_type{});
}

template <Store kStore>
cudaError_t launch_slices(const ResidualParams& p, cudaStream_t stream) {
  if (p.decode.N == 0 || p.columns == 0) return cudaSuccess;
  const int64_t first = p.start / kSlice;
  const int64_t slices = (p.start + p.columns - 1) / kSlice - first + 1;
  const int64_t blocks = (p.decode.N * slices + kThreads / 32 - 1) / (kThreads / 32);
  if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
  return with_type(p.decode.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = kStore == Store::kResidual
                             ? aligned_residual<T>(p)
                             : aligned_code<T>(p.decode) && aligned4(p.residual, p.decode.d);
    return with_offsets(p.decode, [&](auto offsets) {
      return with_alignment(aligned, [&](auto is) {
        KSAE_LAUNCH((decode_kernel<T, kStore, offsets.value, is.value>),
                    static_cast<unsigned>(blocks), kThreads, 0, stream, p, first, slices);
        return cudaGetLastError();
      });
    });
  });
}

template <class T, class G>
cudaError_t launch_products(const DecodeBackwardValuesParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.N * p.k + kThreads / 32 - 1) / (kThreads / 32);
  if (blocks == 0) return cudaSuccess;
  if (!grid_fits(blocks)) return cudaErrorInvalidConfiguration;
  const bool aligned =
      aligned4(static_cast<const T*>(p.W_dec), p.d) && aligned4(static_cast<const G*>(p.grad), p.d);
  return with_alignment(aligned, [&](auto is) {
    if constexpr (std::is_same_v<T, G>)
      KSAE_LAUNCH((backward_values_kernel<T, is.value>), static_cast<unsigned>(blocks), kThreads, 0,
                  stream, p);
    else
      KSAE_LAUNCH((residual_products_kernel<T, is.value>), static_cast<unsigned>(blocks), kThreads,
                  0, stream, p);
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t sparse_decode(const DecodeParams& p, cudaStream_t stream) {
  ResidualParams all{};
  all.decode = p;
  all.columns = p.d;
  if (!p.out_float || p.dtype == Dtype::kFloat32) return launch_slices<Store::kOut>(all, stream);
  all.residual = static_cast<float*>(p.out);
  all.decode.out = nullptr;
  return launch_slices<Store::kPartial>(all, stream);
}

// Rows outside of shared memory, then sums, of as many blocks.
size_t sparse_residual_workspace(const ResidualParams& p) {
  if (!p.sq_error) return 0;
  const Blocks blocks(p);
  return (blocks.outside + (p.column_sums ? 1 : 0)) * blocks.count * p.decode.d * sizeof(float);
}

cudaError_t sparse_residual(const ResidualParams& p, void* workspace, cudaStream_t stream) {
  const DecodeParams& q = p.decode;
  if (q.N == 0)  // before sq_error is looked at: empty tensors may have no address
    return p.column_sums ? forgotten(cudaMemsetAsync(p.column_sums, 0, q.d * sizeof(float), stream))
                         : cudaSuccess;
  if (!p.sq_error) return launch_slices<Store::kResidual>(p, stream);
  const Blocks blocks(p);
  if (!grid_fits(blocks.count)) return cudaErrorInvalidConfiguration;
  const size_t bytes =
      kThreads / 32 * sizeof(double) + (blocks.outside ? 0 : (q.d + 3) / 4 * 4 * sizeof(float));
  auto* memory = static_cast<float*>(workspace);
  float* rows = blocks.outside ? memory : nullptr;
  float* sums = p.column_sums ? memory + blocks.outside * blocks.count * q.d : nullptr;
  return with_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cudaError_t error = with_offsets(q, [&](auto offsets) {
      return with_alignment(aligned_residual<T>(p), [&](auto is) {
        KSAE_LAUNCH((residual_kernel<T, offsets.value, is.value>),
                    static_cast<unsigned>(blocks.count), kThreads, bytes, stream, p, rows, sums,
                    blocks.share);
        return cudaGetLastError();
      });
    });
    if (error != cudaSuccess || !sums) return error;
    return column_sums(sums, blocks.count, q.d, p.column_sums, stream);
  });
}

cudaError_t sparse_decode_backward_values(const DecodeBackwardValuesParams& p,
                                          cudaStream_t stream) {
  return with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return p.grad_float ? launch_products<T, float>(p, stream) : launch_products<T, T>(p, stream);
  });
}

}  // namespace ksae::cuda
