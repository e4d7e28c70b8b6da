// SPDX-License-Identifier: Apache-2.0
#include "scheduler.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "arena.h"
#include "fiber.h"

namespace ksae::emulation {
namespace {

constexpr unsigned char kPoison = 0xff;
constexpr const char* kNames[] = {
    "__syncthreads", "__syncthreads_count", "__syncthreads_or", "__syncthreads_and", "__syncwarp",
    "a shuffle",     "__ballot_sync",       "a vote",           "__match_any_sync",  "a reduction"};

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

unsigned random_below(unsigned n) { return unsigned((random_bits() >> 32) * n >> 32); }

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

std::mutex one_launch;
Grid* grid = nullptr;
Thread* current = nullptr;
std::vector<std::unique_ptr<Thread>> idle_threads;
std::vector<std::unique_ptr<Meeting>> all_meetings;
std::vector<Meeting*> idle_meetings;
std::vector<std::unique_ptr<Arena>> idle_arenas;  // of the launch's size

uint3 position(uint64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

std::string text(uint3 p) {
  return "(" + std::to_string(p.x) + "," + std::to_string(p.y) + "," + std::to_string(p.z) + ")";
}

std::string text(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string text(const Thread& t) {
  return "thread " + text(position(t.index, grid->block)) + " at " + kNames[int(t.operation)] +
         " " + text(t.site);
}

Error error(const Block& block, const std::string& what) {
  return Error(std::string("emulation of ") + grid->kernel + ": " + what + "; block " +
               text(block.index) + ", seed " + std::to_string(seed_));
}

void wake(Block& block, Thread& thread) {
  thread.waiting = false;
  block.ready.push_back(&thread);
}

void wait(Operation operation, const Site& site) {
  current->waiting = true;
  current->operation = operation;
  current->site = site;
  current->fiber->suspend();
}

// ------------------------------------------------------------------------- wild accesses

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
      b.z, static_cast<unsigned long long>(seed_));
  if (write(STDERR_FILENO, report, size_t(length)) < 0) return;
}

// While it lives, a fault is reported. On a stack of its own, for a fiber's may have overflowed.
class FaultReports {
 public:
  FaultReports() : memory_(64 * 1024) {
    if (KSAE_ASAN) return;  // it reports more
    const stack_t own{memory_.data(), 0, memory_.size()};
    sigaltstack(&own, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 2; i++) sigaction(kFaults[i], &action, &handlers_before[i]);
  }
  ~FaultReports() {
    if (KSAE_ASAN) return;
    for (int i = 0; i < 2; i++) sigaction(kFaults[i], &handlers_before[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  FaultReports(const FaultReports&) = delete;

 private:
  std::vector<char> memory_;
  stack_t stack_before_{};
};

// ------------------------------------------------------------------------- releasing who waits

bool at_barrier(const Thread& t) { return t.waiting && t.operation < Operation::syncwarp; }

void release_barrier(Block& block) {
  if (block.live == 0 || block.at_barrier < block.live) return;
  const Thread* first = nullptr;
  for (const Thread* t : block.threads) {
    if (!at_barrier(*t)) continue;
    if (first == nullptr) first = t;
    if (t->operation != first->operation || t->site.line() != first->site.line() ||
        t->site.column() != first->site.column() ||
        std::strcmp(t->site.file_name(), first->site.file_name()) != 0) {
      throw error(block, "divergent barrier: " + text(*first) + ", " + text(*t));
    }
  }
  block.released_predicates = block.predicates;
  block.released_live = int(block.live);
  block.predicates = 0;
  block.at_barrier = 0;
  for (Thread* t : block.threads) {
    if (at_barrier(*t)) wake(block, *t);
  }
}

bool complete(const Warp& warp, const Meeting& meeting) {
  return (meeting.mask & warp.live & ~meeting.arrived) == 0;
}

void release_meeting(Block& block, unsigned w, Meeting& meeting, const Thread* but) {
  std::erase(block.warps[w].open, &meeting);
  meeting.readers = unsigned(std::popcount(meeting.arrived));
  for (uint32_t lanes = meeting.arrived; lanes != 0; lanes &= lanes - 1) {
    Thread* t = block.threads[32 * w + unsigned(std::countr_zero(lanes))];
    if (t != but) wake(block, *t);
  }
}

void retire(Block& block, Thread& thread) {
  thread.done = true;
  block.live--;
  const unsigned w = thread.index / 32;
  Warp& warp = block.warps[w];
  warp.live &= ~(1u << thread.index % 32);
  // Nobody waits for a thread that has returned.
  for (Meeting* m : std::vector<Meeting*>(warp.open)) {
    if (complete(warp, *m)) release_meeting(block, w, *m, nullptr);
  }
  release_barrier(block);
}

// ------------------------------------------------------------------------- blocks

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
  for (const Warp& warp : block.warps) {
    for (Meeting* m : warp.open) idle_meetings.push_back(m);
  }
  idle_arenas.push_back(std::move(block.shared));
}

void check_guard(const Block& block) {
  const size_t written = block.shared->written_past_end();
  if (written > 0) {
    throw error(block, "a write past the end of shared memory, at byte " + std::to_string(written) +
                           " of " + std::to_string(grid->shared_bytes));
  }
}

void deadlock(const Block& block) {
  // How many wait where, and the first of them.
  std::vector<std::pair<const Thread*, unsigned>> places;
  for (const Thread* t : block.threads) {
    if (t->done) continue;
    const auto place = std::find_if(places.begin(), places.end(), [t](const auto& p) {
      return text(p.first->site) == text(t->site);
    });
    if (place == places.end()) {
      places.emplace_back(t, 1);
    } else {
      place->second++;
    }
  }
  std::string who;
  for (const auto& [thread, count] : places) {
    who += (who.empty() ? "" : ", ") + std::to_string(count) + " from " + text(*thread);
  }
  throw error(block, "deadlock of " + std::to_string(block.live) + " threads: " + who);
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

unsigned lane() { return current->index % 32; }

int barrier(Operation operation, bool predicate, int* waited, const Site& site) {
  Block& block = *current->block;
  block.at_barrier++;
  block.predicates += predicate;
  // The last to arrive does not go on at once either: who is first afterwards is random.
  current->waiting = true;
  current->operation = operation;
  current->site = site;
  release_barrier(block);
  current->fiber->suspend();
  if (waited != nullptr) *waited = block.released_live;
  return block.released_predicates;
}

Meeting& meet(uint32_t mask, Operation operation, uint64_t value, const Site& site) {
  Block& block = *current->block;
  const unsigned w = current->index / 32, bit = current->index % 32;
  Warp& warp = block.warps[w];
  if ((mask >> bit & 1) == 0) {
    fail("the mask of " + std::string(kNames[int(operation)]) + " lacks the calling lane", site);
  }
  Meeting* meeting = nullptr;
  for (Meeting* m : warp.open) {
    if (m->mask == mask) meeting = m;
  }
  if (meeting == nullptr) {
    if (idle_meetings.empty()) {
      all_meetings.push_back(std::make_unique<Meeting>());
      idle_meetings.push_back(all_meetings.back().get());
    }
    meeting = idle_meetings.back();
    idle_meetings.pop_back();
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->operation = operation;
    meeting->site = site;
    warp.open.push_back(meeting);
  }
  // __syncwarp may be met from several places; the others are one instruction.
  if (meeting->operation != operation ||
      (operation != Operation::syncwarp && meeting->site.line() != site.line())) {
    fail("divergent warp operation: " + std::string(kNames[int(operation)]) + " meets " +
             kNames[int(meeting->operation)] + " of " + text(meeting->site),
         site);
  }
  meeting->arrived |= 1u << bit;
  meeting->slots[bit] = value;
  if (complete(warp, *meeting)) {
    release_meeting(block, w, *meeting, current);
    block.ready.push_back(current);
    current->fiber->suspend();
  } else {
    wait(operation, site);
  }
  return *meeting;
}

void leave(Meeting& meeting) {
  if (--meeting.readers == 0) idle_meetings.push_back(&meeting);
}

uint64_t brought(const Meeting& meeting, unsigned source) {
  if ((meeting.arrived >> source & 1) == 0) {
    fail("reads lane " + std::to_string(source) + ", which is not in the mask or has returned",
         meeting.site);
  }
  return meeting.slots[source];
}

void maybe_yield() {
  if (++grid->steps > limit) {
    throw error(*current->block, "more steps than " + std::to_string(limit));
  }
  if (random_below(8) == 0) {
    current->block->ready.push_back(current);
    current->fiber->suspend();
  }
}

void fail(const std::string& what, const Site& site) {
  throw error(*current->block, what + "; thread " + text(threadIdx) + " at " + text(site));
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
