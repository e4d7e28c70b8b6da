// SPDX-License-Identifier: Apache-2.0
// Reads and writes outside of memory: which thread of which block it was.
#pragma once

#include <signal.h>

#include <vector>

namespace ksae::emulation {

// While it lives, a fault is reported. On a stack of its own, for a fiber's may have overflowed.
class FaultReports {
 public:
  FaultReports();
  ~FaultReports();
  FaultReports(const FaultReports&) = delete;

 private:
  std::vector<char> memory_;
  stack_t stack_before_{};
};

}  // namespace ksae::emulation
