// SPDX-License-Identifier: Apache-2.0
// Shared memory of one block. Behind its end lies a page that nobody may touch, so an access past
// it stops at once; before that, up to 15 bytes of alignment, whose contents are compared. Under
// AddressSanitizer it is memory with red zones instead.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "fiber.h"

namespace ksae::emulation {

class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes), room_((bytes + 15) / 16 * 16) {
#if KSAE_ASAN
    room_ = bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
    begin_ = static_cast<unsigned char*>(memory);
#else
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    mapped_ = (room_ + page - 1) / page * page + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<unsigned char*>(memory);
    if (mprotect(map_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE) != 0) {
      munmap(map_, mapped_);
      throw std::bad_alloc();
    }
    begin_ = map_ + mapped_ - page - room_;
#endif
  }
  ~Arena() {
#if KSAE_ASAN
    std::free(begin_);
#else
    munmap(map_, mapped_);
#endif
  }
  Arena(const Arena&) = delete;

  unsigned char* begin() const { return begin_; }

  void fill(unsigned char value) {
    if (room_ == 0) return;
    std::memset(begin_, value, bytes_);
    std::memset(begin_ + bytes_, kGuard, room_ - bytes_);
  }

  // The first byte past the end that was written, 0 if there is none.
  size_t written_past_end() const {
    for (size_t i = bytes_; i < room_; i++)
      if (begin_[i] != kGuard) return i;
    return 0;
  }

  // Whether the address lies in a page before or after it.
  bool guards(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return map_ != nullptr && p >= map_ && p < map_ + mapped_;
  }

 private:
  static constexpr unsigned char kGuard = 0xa5;

  size_t bytes_, room_, mapped_ = 0;
  unsigned char *map_ = nullptr, *begin_ = nullptr;
};

}  // namespace ksae::emulation
