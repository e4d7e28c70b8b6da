// SPDX-License-Identifier: Apache-2.0
// A launch and its blocks: what scheduler.cpp, which runs them, waiting.cpp, where their threads
// wait, and faults.cpp, which reports wild accesses, share. The rest sees scheduler.h alone.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "fiber.h"
#include "scheduler.h"

namespace ksae::emulation {

struct Block;

struct Thread {
  std::unique_ptr<Fiber> fiber = std::make_unique<Fiber>();
  Block* block = nullptr;
  unsigned index = 0;
  bool done = false;
  bool waiting = false;
  Operation operation{};
  Site site;
};

struct Warp {
  uint32_t live = 0;
  std::vector<Meeting*> open;
};

struct Block {
  uint3 index;
  std::vector<Thread*> threads;
  std::vector<Thread*> ready;
  std::vector<Warp> warps;
  unsigned live = 0, at_barrier = 0;
  int predicates = 0, released_predicates = 0, released_live = 0;
  std::unique_ptr<Arena> shared;
};

// All that lives during one launch.
struct Grid {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const std::function<void()>* thread;
  uint64_t steps = 0;
  std::exception_ptr error;
};

extern Grid* grid;       // null between launches
extern Thread* current;  // null while no thread runs

uint64_t current_seed();
unsigned random_below(unsigned n);

inline uint3 position(uint64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

std::string text(uint3 p);
std::string text(const Site& site);
std::string text(const Thread& t);
Error error(const Block& block, const std::string& what);

// No thread of the block is ready: an error that says who waits where.
[[noreturn]] void deadlock(const Block& block);
// The thread has returned; whoever waits for all that live may go on.
void retire(Block& block, Thread& thread);
// Takes back the meetings of a block that ended or was given up.
void close_meetings(Block& block);

}  // namespace ksae::emulation
