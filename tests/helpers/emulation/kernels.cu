// SPDX-License-Identifier: Apache-2.0
// Small kernels that use each primitive of the emulation, and broken ones that it has to catch.
#include "kernels.h"
#include "lang.h"

namespace emulation_tests {
namespace {

constexpr unsigned kAll = 0xffffffff;

// ---------------------------------------------------------------------------- right

// Sum of a row by shared memory: one block a row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    row_sum_kernel(const float* x, int columns, float* out) {
  KSAE_SHARED_BYTES(arena);
  float* partial = reinterpret_cast<float*>(arena);
  float sum = 0;
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    sum += __ldg(x + size_t(blockIdx.x) * columns + c);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

// Each warp operation, results side by side: out [kWarpResults, 32].
__global__ void warp_kernel(const int* x, int* out) {
  const int lane = threadIdx.x;
  const int v = x[lane];
  int row = 0;
  auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kAll, v, 3));
  put(__shfl_sync(kAll, v, 5, 8));
  put(__shfl_up_sync(kAll, v, 2));
  put(__shfl_up_sync(kAll, v, 1, 16));
  put(__shfl_down_sync(kAll, v, 4));
  put(__shfl_down_sync(kAll, v, 3, 8));
  put(__shfl_xor_sync(kAll, v, 1));
  put(__shfl_xor_sync(kAll, v, 16));
  put(int(__ballot_sync(kAll, v > 0)));
  put(__any_sync(kAll, v == 7));
  put(__all_sync(kAll, v > -100));
  put(int(__match_any_sync(kAll, v)));
  put(__reduce_add_sync(kAll, v));
  put(__reduce_min_sync(kAll, v));
  put(__reduce_max_sync(kAll, v));
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;  // two masks at once
  put(__reduce_add_sync(half, v));
  __syncwarp(half);
  put(__popc(__ballot_sync(half, v & 1)));
}

__global__ void votes_kernel(const int* x, int* out) {
  const int v = x[threadIdx.x];
  const int count = __syncthreads_count(v > 0), any = __syncthreads_or(v == 7),
            all = __syncthreads_and(v > -100);
  if (threadIdx.x == 0) out[0] = count, out[1] = any, out[2] = all;
}

// Threads past n have returned: the barrier does not wait for them.
__global__ void early_exit_kernel(int n, int* out) {
  KSAE_SHARED_BYTES(arena);
  int* values = reinterpret_cast<int*>(arena);
  const int i = threadIdx.x;
  if (i >= n) return;
  values[i] = i;
  __syncthreads();
  out[i] = values[n - 1 - i];
}

// The last block to finish adds what all have written.
__global__ void last_block_kernel(const float* x, float* partial, unsigned* counter, float* out) {
  KSAE_SHARED_BYTES(arena);
  int* last = reinterpret_cast<int*>(arena);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    __threadfence();
    *last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (*last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; b++) sum += __ldcg(partial + b);
    *out = sum;
    *counter = 0;
  }
}

__global__ void atomics_kernel(const int* x, int n, int* out, unsigned long long* wide,
                               float* sum) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(out, x[i]);
    atomicMax(out + 1, x[i]);
    atomicMin(out + 2, x[i]);
    atomicOr(reinterpret_cast<unsigned*>(out) + 3, unsigned(x[i]));
    int seen = out[4];
    while (true) {  // an addition by compare and swap
      const int before = atomicCAS(out + 4, seen, seen + x[i]);
      if (before == seen) break;
      seen = before;
    }
    atomicExch(out + 5, 1);
    atomicAdd(wide, 1ull << 33);
    atomicAdd(sum, float(x[i]));
  }
}

// Which threads came first, by an atomic counter: differs from seed to seed.
__global__ void order_kernel(unsigned* counter, int* out) {
  out[atomicAdd(counter, 1u)] = int(blockIdx.x * blockDim.x + threadIdx.x);
}

// Shared memory as the block finds it.
__global__ void poison_kernel(int n, float* out) {
  KSAE_SHARED_BYTES(arena);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = reinterpret_cast<float*>(arena)[i];
}

__global__ void convert_kernel(const float* x, int n, __half* h, __nv_bfloat16* b, float* h_back,
                               float* b_back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  h[i] = __float2half_rn(x[i]);
  b[i] = __float2bfloat16_rn(x[i]);
  h_back[i] = __half2float(h[i]);
  b_back[i] = __bfloat162float(b[i]);
}

// ---------------------------------------------------------------------------- broken

// Lacks the barrier between writing and reading.
__global__ void missing_barrier_kernel(int* out) {
  KSAE_SHARED_BYTES(arena);
  int* values = reinterpret_cast<int*>(arena);
  values[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The last element is never written, and so is poison.
__global__ void off_by_one_kernel(int* out) {
  KSAE_SHARED_BYTES(arena);
  int* values = reinterpret_cast<int*>(arena);
  if (threadIdx.x < blockDim.x - 1) values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// A list that forgets what exceeds its capacity instead of asking for a second pass.
__global__ void dropped_overflow_kernel(const int* x, int capacity, int* out) {
  KSAE_SHARED_BYTES(arena);
  int* count = reinterpret_cast<int*>(arena);
  int* list = count + 1;
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  if (x[threadIdx.x] > 0) {
    const int at = atomicAdd(count, 1);
    if (at < capacity) list[at] = x[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < min(*count, capacity); i++) sum += list[i];
    *out = sum;
  }
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void wrong_mask_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(kAll, 1, 0);  // names lanes that do not come
  if (threadIdx.x >= 16) out[threadIdx.x] = __shfl_sync(0xffff0000u, 1, 16);
  __syncthreads();
}

__global__ void outside_mask_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void own_lane_missing_kernel(int* out) {
  out[threadIdx.x] = int(__ballot_sync(0x0000ffffu, 1));
}

__global__ void mixed_operations_kernel(int* out) {
  out[threadIdx.x] = threadIdx.x < 16 ? int(__ballot_sync(kAll, 1)) : __shfl_sync(kAll, 1, 0);
}

// Half of a warp waits for the block, the other for the warp.
__global__ void deadlock_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// Waits for a block that may not have started.
__global__ void spin_kernel(unsigned* counter) {
  atomicAdd(counter, 1u);
  while (atomicAdd(counter, 0u) < gridDim.x) {
  }
}

__global__ void shared_overrun_kernel(int n) {
  KSAE_SHARED_BYTES(arena);
  reinterpret_cast<int*>(arena)[n + threadIdx.x] = 1;
}

}  // namespace

// ---------------------------------------------------------------------------- launchers

cudaError_t row_sum(const float* x, int rows, int columns, float* out) {
  KSAE_LAUNCH((row_sum_kernel<256>), rows, 256, 256 * sizeof(float), nullptr, x, columns, out);
  return cudaGetLastError();
}
cudaError_t warp(const int* x, int* out) {
  KSAE_LAUNCH(warp_kernel, 1, 32, 0, nullptr, x, out);
  return cudaGetLastError();
}
cudaError_t votes(const int* x, int n, int* out) {
  KSAE_LAUNCH(votes_kernel, 1, n, 0, nullptr, x, out);
  return cudaGetLastError();
}
cudaError_t early_exit(int n, int* out) {
  KSAE_LAUNCH(early_exit_kernel, 1, 96, n * sizeof(int), nullptr, n, out);
  return cudaGetLastError();
}
cudaError_t last_block(const float* x, int blocks, float* partial, unsigned* counter, float* out) {
  KSAE_LAUNCH(last_block_kernel, blocks, 64, sizeof(int), nullptr, x, partial, counter, out);
  return cudaGetLastError();
}
cudaError_t atomics(const int* x, int n, int* out, unsigned long long* wide, float* sum) {
  KSAE_LAUNCH(atomics_kernel, 3, 64, 0, nullptr, x, n, out, wide, sum);
  return cudaGetLastError();
}
cudaError_t order(int blocks, int threads, unsigned* counter, int* out) {
  KSAE_LAUNCH(order_kernel, blocks, threads, 0, nullptr, counter, out);
  return cudaGetLastError();
}
cudaError_t poison(int n, float* out) {
  KSAE_LAUNCH(poison_kernel, 1, 32, n * sizeof(float), nullptr, n, out);
  return cudaGetLastError();
}
cudaError_t convert(const float* x, int n, void* h, void* b, float* h_back, float* b_back) {
  KSAE_LAUNCH(convert_kernel, (n + 255) / 256, 256, 0, nullptr, x, n, static_cast<__half*>(h),
              static_cast<__nv_bfloat16*>(b), h_back, b_back);
  return cudaGetLastError();
}
cudaError_t empty(int blocks, int threads, int shared_bytes) {
  KSAE_LAUNCH(poison_kernel, blocks, threads, shared_bytes, nullptr, 0, nullptr);
  return cudaGetLastError();
}
cudaError_t opt_in(int shared_bytes) {
  return cudaFuncSetAttribute(poison_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared_bytes);
}

cudaError_t missing_barrier(int* out) {
  KSAE_LAUNCH(missing_barrier_kernel, 1, 64, 64 * sizeof(int), nullptr, out);
  return cudaGetLastError();
}
cudaError_t off_by_one(int* out) {
  KSAE_LAUNCH(off_by_one_kernel, 1, 64, 64 * sizeof(int), nullptr, out);
  return cudaGetLastError();
}
cudaError_t dropped_overflow(const int* x, int n, int capacity, int* out) {
  KSAE_LAUNCH(dropped_overflow_kernel, 1, n, (1 + capacity) * sizeof(int), nullptr, x, capacity,
              out);
  return cudaGetLastError();
}
cudaError_t divergent_barrier() {
  KSAE_LAUNCH(divergent_barrier_kernel, dim3(2, 3), 32, 0, nullptr);
  return cudaGetLastError();
}
cudaError_t wrong_mask(int* out) {
  KSAE_LAUNCH(wrong_mask_kernel, 1, 32, 0, nullptr, out);
  return cudaGetLastError();
}
cudaError_t outside_mask(int* out) {
  KSAE_LAUNCH(outside_mask_kernel, 1, 32, 0, nullptr, out);
  return cudaGetLastError();
}
cudaError_t own_lane_missing(int* out) {
  KSAE_LAUNCH(own_lane_missing_kernel, 1, 32, 0, nullptr, out);
  return cudaGetLastError();
}
cudaError_t mixed_operations(int* out) {
  KSAE_LAUNCH(mixed_operations_kernel, 1, 32, 0, nullptr, out);
  return cudaGetLastError();
}
cudaError_t deadlock() {
  KSAE_LAUNCH(deadlock_kernel, 1, 64, 0, nullptr);
  return cudaGetLastError();
}
cudaError_t spin(unsigned* counter) {
  KSAE_LAUNCH(spin_kernel, 8, 1, 0, nullptr, counter);
  return cudaGetLastError();
}
cudaError_t shared_overrun(int n) {
  KSAE_LAUNCH(shared_overrun_kernel, 1, 1, n * sizeof(int), nullptr, n);
  return cudaGetLastError();
}

}  // namespace emulation_tests
