// SPDX-License-Identifier: Apache-2.0
// What the runtime and the driver say of themselves; nothing here launches a kernel.
#include "ksae/cuda.h"

namespace ksae::cuda {

cudaError_t runtime_version(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t driver_version(int* version) { return cudaDriverGetVersion(version); }

cudaError_t device_count(int* count) { return cudaGetDeviceCount(count); }

}  // namespace ksae::cuda
