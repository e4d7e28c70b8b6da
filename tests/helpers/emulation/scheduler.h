// SPDX-License-Identifier: Apache-2.0
// Runs a grid on the host: one fiber a CUDA thread, several blocks at once, in a random order that
// a seed repeats. Every call that waits goes through here, so a barrier or a warp operation that
// cannot be right becomes an exception with kernel, block, thread and place, thrown by launch().
//
// What it cannot see: memory is sequentially consistent, so a missing __threadfence passes; fibers
// change only where they wait and at atomics, so a race between two barriers shows only through the
// order in which threads run; a loop that spins on plain loads never ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

#include "types.h"

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace ksae::emulation {

using Site = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Operation {
  syncthreads,
  count,
  any,
  all,
  syncwarp,
  shuffle,
  ballot,
  vote,
  match,
  reduce
};

// One meeting of the lanes of a mask: what each lane brought.
struct Meeting {
  uint32_t mask, arrived, readers;
  Operation operation;
  Site site;
  uint64_t slots[32];
};

// The random order from now on; launch() prints the seed in errors.
void seed(uint64_t value);
// At most this many blocks are alive at once.
void blocks_in_flight(unsigned count);
// A launch with more scheduled turns and atomics than this fails.
void step_limit(uint64_t steps);

// Runs `thread` for each thread of the grid. Throws Error.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& thread);

// Of the thread that runs now:
unsigned char* shared_bytes();
unsigned lane();
// Waits for all live threads of the block; returns the number of those with a true predicate.
int barrier(Operation operation, bool predicate, int* waited, const Site& site);
// Waits for the live lanes of the mask. The meeting is valid until leave().
Meeting& meet(uint32_t mask, Operation operation, uint64_t value, const Site& site);
void leave(Meeting& meeting);
// The value that `source` brought; an error if it did not take part.
uint64_t brought(const Meeting& meeting, unsigned source);
// Lets others run now and then; at atomics.
void maybe_yield();
[[noreturn]] void fail(const std::string& what, const Site& site);

}  // namespace ksae::emulation
