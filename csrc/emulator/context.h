// Switching between stacks: a few nanoseconds by hand on x86-64, the C library's ucontext elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__) || defined(FUSED_RNN_EMULATE_UCONTEXT)
#define FUSED_RNN_UCONTEXT
#include <ucontext.h>
#endif

// For code that moves bytes of poisoned memory, or that must not be seen by the race detector.
#define FUSED_RNN_EMULATOR_RAW __attribute__((no_sanitize("address", "undefined", "thread")))

// Small functions that such code calls: g++ inlines them into it only when told to.
#define FUSED_RNN_EMULATOR_INLINE __attribute__((always_inline)) inline

namespace fused_rnn::emulator {

#if !defined(FUSED_RNN_UCONTEXT)

struct Context {
  void* stack_pointer = nullptr;
};

// Only what the ABI lets a callee keep is saved: to the compiler a switch is a call like any other.
__attribute__((naked, noinline)) FUSED_RNN_EMULATOR_RAW inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

FUSED_RNN_EMULATOR_RAW inline void switch_context(Context& from, Context& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }

// `entry` never returns. It must find the stack as after a call: 8 bytes off a multiple of 16.
FUSED_RNN_EMULATOR_RAW inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
  void** slot = reinterpret_cast<void**>(top) - 1;
  *slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  context.stack_pointer = slot;
}

#else

struct Context {
  ucontext_t saved;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

#endif

}  // namespace fused_rnn::emulator
