// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace ksae::emulation {
namespace {

Fiber* starting = nullptr;

}  // namespace

#if defined(__x86_64__)
extern "C" void ksae_emulation_switch(void** save, void* load);
asm(R"(
.text
.hidden ksae_emulation_switch
.globl ksae_emulation_switch
.type ksae_emulation_switch, @function
ksae_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ksae_emulation_switch, .-ksae_emulation_switch
)");
#endif

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<unsigned char*>(memory);
  mprotect(stack_, 4096, PROT_NONE);  // a stack that overflows stops at once
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

void Fiber::start(void (*entry)()) {
  entry_ = entry;
#if KSAE_ASAN
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);  // frames of a kernel that was given up
  fake_ = nullptr;
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // the ABI: on entry the stack pointer is 8 off a multiple of 16
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
}

void Fiber::begin() {
  Fiber* self = starting;
#if KSAE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->host_stack_, &self->host_size_);
#endif
  self->entry_();
  std::abort();  // entry() ends in finish()
}

void Fiber::resume() {
  starting = this;
#if KSAE_ASAN
  __sanitizer_start_switch_fiber(&host_fake_, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
  ksae_emulation_switch(&host_, pointer_);
#else
  swapcontext(&host_, &context_);
#endif
#if KSAE_ASAN
  __sanitizer_finish_switch_fiber(host_fake_, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool forever) {
#if KSAE_ASAN
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake_, host_stack_, host_size_);
#endif
#if defined(__x86_64__)
  ksae_emulation_switch(&pointer_, host_);
#else
  swapcontext(&context_, &host_);
#endif
#if KSAE_ASAN
  __sanitizer_finish_switch_fiber(fake_, &host_stack_, &host_size_);
#endif
}

void Fiber::finish() {
  leave(true);
  std::abort();
}

}  // namespace ksae::emulation
