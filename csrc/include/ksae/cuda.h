// SPDX-License-Identifier: Apache-2.0
// ksae on CUDA devices: raw pointers, sizes and a stream; no torch, no Python. Every function
// returns CUDA's error code.
#pragma once

#include <cuda_runtime_api.h>

namespace ksae::cuda {

// Version of the runtime that is linked in, as 1000 * major + 10 * minor. Needs no driver.
cudaError_t runtime_version(int* version);

// Newest CUDA version that the driver supports, in the same form; 0 where there is no driver.
cudaError_t driver_version(int* version);

// Number of usable devices. Without a driver this is an error: cudaGetErrorString says which.
cudaError_t device_count(int* count);

}  // namespace ksae::cuda
