// SPDX-License-Identifier: Apache-2.0
// Launchers of kernels.cu.
#pragma once

#include <cuda_runtime_api.h>

namespace emulation_tests {

cudaError_t row_sum(const float* x, int rows, int columns, float* out);
cudaError_t warp(const int* x, int* out);
cudaError_t votes(const int* x, int n, int* out);
cudaError_t early_exit(int n, int* out);
cudaError_t last_block(const float* x, int blocks, float* partial, unsigned* counter, float* out);
cudaError_t atomics(const int* x, int n, int* out, unsigned long long* wide, float* sum);
cudaError_t order(int blocks, int threads, unsigned* counter, int* out);
cudaError_t poison(int n, float* out);
cudaError_t convert(const float* x, int n, void* h, void* b, float* h_back, float* b_back);
cudaError_t empty(int blocks, int threads, int shared_bytes);
cudaError_t opt_in(int shared_bytes);

cudaError_t missing_barrier(int* out);
cudaError_t off_by_one(int* out);
cudaError_t dropped_overflow(const int* x, int n, int capacity, int* out);
cudaError_t divergent_barrier();
cudaError_t wrong_mask(int* out);
cudaError_t outside_mask(int* out);
cudaError_t own_lane_missing(int* out);
cudaError_t mixed_operations(int* out);
cudaError_t deadlock();
cudaError_t spin(unsigned* counter);
cudaError_t shared_overrun(int n);

}  // namespace emulation_tests
