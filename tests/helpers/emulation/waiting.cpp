// SPDX-License-Identifier: Apache-2.0
// Where threads wait: barriers of a block, meetings of lanes, and what is wrong about them.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "launch.h"

namespace ksae::emulation {
namespace {

constexpr const char* kNames[] = {
    "__syncthreads", "__syncthreads_count", "__syncthreads_or", "__syncthreads_and", "__syncwarp",
    "a shuffle",     "__ballot_sync",       "a vote",           "__match_any_sync",  "a reduction"};

std::vector<std::unique_ptr<Meeting>> all_meetings;
std::vector<Meeting*> idle_meetings;

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

}  // namespace

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

void close_meetings(Block& block) {
  for (const Warp& warp : block.warps) {
    for (Meeting* m : warp.open) idle_meetings.push_back(m);
  }
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
               text(block.index) + ", seed " + std::to_string(current_seed()));
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

void fail(const std::string& what, const Site& site) {
  throw error(*current->block, what + "; thread " + text(threadIdx) + " at " + text(site));
}

}  // namespace ksae::emulation
