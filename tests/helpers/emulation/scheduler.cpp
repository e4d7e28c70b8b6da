// SPDX-License-Identifier: Apache-2.0
#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "faults.h"
#include "launch.h"

namespace ksae::emulation {

Grid* grid = nullptr;
Thread* current = nullptr;

namespace {

constexpr unsigned char kPoison = 0xff;

uint64_t initial_seed() {
  const char* text = std::getenv("KSAE_EMULATE_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0;
}

uint64_t seed_ = initial_seed();
uint64_t random_state = seed_;
unsigned in_flight = 3;
uint64_t limit = uint64_t(1) << 32;

uint64_t random_bits() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

std::mutex one_launch;
std::vector<std::unique_ptr<Thread>> idle_threads;
std::vector<std::unique_ptr<Arena>> idle_arenas;  // of the launch's size

void thread_main() {
  try {
    (*grid->thread)();
  } catch (...) {
    grid->error = std::current_exception();
  }
  current->done = true;
  current->fiber->finish();
}

std::unique_ptr<Block> start_block(uint64_t index) {
  auto block = std::make_unique<Block>();
  block->index = position(index, grid->grid);
  block->live = grid->block.x * grid->block.y * grid->block.z;
  block->warps.resize((block->live + 31) / 32);
  if (idle_arenas.empty()) idle_arenas.push_back(std::make_unique<Arena>(grid->shared_bytes));
  block->shared = std::move(idle_arenas.back());
  idle_arenas.pop_back();
  block->shared->fill(kPoison);
  for (unsigned i = 0; i < block->live; i++) {
    if (idle_threads.empty()) idle_threads.push_back(std::make_unique<Thread>());
    Thread* t = idle_threads.back().release();
    idle_threads.pop_back();
    t->block = block.get();
    t->index = i;
    t->done = t->waiting = false;
    t->fiber->start(thread_main);
    block->warps[i / 32].live |= 1u << i % 32;
    block->threads.push_back(t);
  }
  block->ready = block->threads;
  return block;
}

void end_block(Block& block) {
  for (Thread* t : block.threads) idle_threads.emplace_back(t);
  close_meetings(block);
  idle_arenas.push_back(std::move(block.shared));
}

void check_guard(const Block& block) {
  const size_t written = block.shared->written_past_end();
  if (written > 0) {
    throw error(block, "a write past the end of shared memory, at byte " + std::to_string(written) +
                           " of " + std::to_string(grid->shared_bytes));
  }
}

// One turn of one thread of the block.
void turn(Block& block) {
  if (++grid->steps > limit) throw error(block, "more steps than " + std::to_string(limit));
  const size_t pick = random_below(unsigned(block.ready.size()));
  Thread* thread = std::exchange(block.ready[pick], block.ready.back());
  block.ready.pop_back();
  current = thread;
  threadIdx = position(thread->index, grid->block);
  blockIdx = block.index;
  thread->fiber->resume();
  current = nullptr;
  if (grid->error) std::rethrow_exception(grid->error);
  if (thread->done) retire(block, *thread);
}

}  // namespace

uint64_t current_seed() { return seed_; }
unsigned random_below(unsigned n) { return unsigned((random_bits() >> 32) * n >> 32); }

void seed(uint64_t value) { random_state = seed_ = value; }
void blocks_in_flight(unsigned count) { in_flight = std::max(count, 1u); }
void step_limit(uint64_t steps) { limit = steps; }

void run(const char* kernel, dim3 grid_size, dim3 block_size, size_t shared_bytes,
         const std::function<void()>& thread) {
  const std::lock_guard lock(one_launch);
  Grid launch{kernel, grid_size, block_size, shared_bytes, &thread, 0, nullptr};
  grid = &launch;
  gridDim = grid_size;
  blockDim = block_size;
  std::vector<uint32_t> order(uint64_t(grid_size.x) * grid_size.y * grid_size.z);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; i--) {
    std::swap(order[i - 1], order[random_below(unsigned(i))]);
  }
  std::vector<std::unique_ptr<Block>> alive;
  idle_arenas.clear();
  const FaultReports reports;
  try {
    while (!alive.empty() || !order.empty()) {
      while (alive.size() < in_flight && !order.empty()) {
        alive.push_back(start_block(order.back()));
        order.pop_back();
      }
      const unsigned pick = random_below(unsigned(alive.size()));
      Block& block = *alive[pick];
      if (block.ready.empty()) deadlock(block);
      turn(block);
      if (block.live == 0) {
        check_guard(block);
        end_block(block);
        alive.erase(alive.begin() + pick);
      }
    }
  } catch (...) {
    for (auto& block : alive) end_block(*block);
    grid = nullptr;
    throw;
  }
  grid = nullptr;
}

unsigned char* shared_bytes() { return current->block->shared->begin(); }

void maybe_yield() {
  if (++grid->steps > limit) {
    throw error(*current->block, "more steps than " + std::to_string(limit));
  }
  if (random_below(8) == 0) {
    current->block->ready.push_back(current);
    current->fiber->suspend();
  }
}

}  // namespace ksae::emulation

extern "C" {
__attribute__((visibility("default"))) void ksae_emulation_seed(uint64_t value) {
  ksae::emulation::seed(value);
}
__attribute__((visibility("default"))) void ksae_emulation_blocks_in_flight(unsigned count) {
  ksae::emulation::blocks_in_flight(count);
}
__attribute__((visibility("default"))) void ksae_emulation_step_limit(uint64_t steps) {
  ksae::emulation::step_limit(steps);
}
}
