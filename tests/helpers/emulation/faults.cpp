// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

#include <unistd.h>

#include <cstdio>

#include "launch.h"

namespace ksae::emulation {
namespace {

struct sigaction handlers_before[2];
constexpr int kFaults[] = {SIGSEGV, SIGBUS};

// Tells who it was; then whoever handled such signals before has the word.
void report_fault(int signal, siginfo_t* info, void*) {
  for (int i = 0; i < 2; i++)
    if (kFaults[i] == signal) sigaction(signal, &handlers_before[i], nullptr);
  if (current == nullptr) return;
  const Block& block = *current->block;
  const bool shared = block.shared->guards(info->si_addr);
  const uint3 t = position(current->index, grid->block), b = block.index;
  char report[400];
  const int length = std::snprintf(
      report, sizeof(report),
      "emulation of %s: a read or write outside of %s, at %p; thread (%u,%u,%u); block (%u,%u,%u),"
      " seed %llu\n",
      grid->kernel, shared ? "shared memory" : "memory", info->si_addr, t.x, t.y, t.z, b.x, b.y,
      b.z, static_cast<unsigned long long>(current_seed()));
  if (write(STDERR_FILENO, report, size_t(length)) < 0) return;
}

}  // namespace

FaultReports::FaultReports() : memory_(64 * 1024) {
  if (KSAE_ASAN) return;  // it reports more
  const stack_t own{memory_.data(), 0, memory_.size()};
  sigaltstack(&own, &stack_before_);
  struct sigaction action{};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; i++) sigaction(kFaults[i], &action, &handlers_before[i]);
}

FaultReports::~FaultReports() {
  if (KSAE_ASAN) return;
  for (int i = 0; i < 2; i++) sigaction(kFaults[i], &handlers_before[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

}  // namespace ksae::emulation
