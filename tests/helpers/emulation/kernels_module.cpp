// SPDX-License-Identifier: Apache-2.0
// Python module over kernels.h: pointers are integers, the result is CUDA's error code.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace {

template <class T>
using Plain = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T pass(Plain<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <class... T>
void add(pybind11::module_& module, const char* name, cudaError_t (*function)(T...)) {
  module.def(name, [function](Plain<T>... values) { return int(function(pass<T>(values)...)); });
}

}  // namespace

PYBIND11_MODULE(kernels, module) {
  using namespace emulation_tests;
#define ADD(name) add(module, #name, name)
  ADD(row_sum);
  ADD(warp);
  ADD(votes);
  ADD(early_exit);
  ADD(last_block);
  ADD(atomics);
  ADD(order);
  ADD(poison);
  ADD(convert);
  ADD(empty);
  ADD(opt_in);
  ADD(missing_barrier);
  ADD(off_by_one);
  ADD(dropped_overflow);
  ADD(divergent_barrier);
  ADD(wrong_mask);
  ADD(outside_mask);
  ADD(own_lane_missing);
  ADD(mixed_operations);
  ADD(deadlock);
  ADD(spin);
  ADD(shared_overrun);
#undef ADD
}
