// SPDX-License-Identifier: Apache-2.0
// Python module ksae._cuda over ksae/cuda.h. It imports without a GPU or a driver; its functions
// then raise CUDA's reason.
#include "ksae/cuda.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace {

int value_or_raise(const char* name, cudaError_t (*function)(int*)) {
  int value = 0;
  const cudaError_t error = function(&value);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": CUDA error " + std::to_string(error) + " (" +
                             cudaGetErrorString(error) + ")");
  }
  return value;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using namespace ksae::cuda;
  module.attr("architectures") = KSAE_CUDA_ARCHITECTURES;
  module.def("runtime_version", [] { return value_or_raise("runtime_version", runtime_version); });
  module.def("driver_version", [] { return value_or_raise("driver_version", driver_version); });
  module.def("device_count", [] { return value_or_raise("device_count", device_count); });
}
