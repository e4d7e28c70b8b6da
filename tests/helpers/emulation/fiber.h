// SPDX-License-Identifier: Apache-2.0
// A stack of its own and a switch to it and back: own code on x86-64, ucontext elsewhere.
// Sanitizers are told of each switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define KSAE_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define KSAE_ASAN 0
#endif

namespace ksae::emulation {

class Fiber {
 public:
  // Sanitized frames are several times larger.
  static constexpr size_t kStackBytes = KSAE_ASAN ? 256 * 1024 : 64 * 1024;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the host: makes the next resume() call entry(), which must end in finish().
  void start(void (*entry)());
  // From the host: runs the fiber until it suspends or finishes.
  void resume();
  // On the fiber: back to the host.
  void suspend() { leave(false); }
  [[noreturn]] void finish();

 private:
  void leave(bool forever);
  static void begin();

  unsigned char* stack_;
  void (*entry_)() = nullptr;
#if defined(__x86_64__)
  void* pointer_ = nullptr;  // stack pointers while not running
  void* host_ = nullptr;
#else
  ucontext_t context_, host_;
#endif
#if KSAE_ASAN
  void* fake_ = nullptr;
  void* host_fake_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_size_ = 0;
#endif
};

}  // namespace ksae::emulation
