// The stacks of the fibers: one mapping, kept from launch to launch, with a page that traps below the first of them.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "context.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fused_rnn::emulator {

inline void poison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
}

inline void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

class Stacks {
 public:
  static constexpr size_t kBytes = 64 << 10, kGuard = 4 << 10;
  // All threads run the same code; a deeper stack than the first ones' runs into its neighbour's. Each guard splits the
  // mapping, and Linux allows a process 65,530.
  static constexpr size_t kGuarded = 32;
  // Where the frames lie from which a thread that ended never returned.
  static constexpr size_t kLastFrames = 20 << 10;

  void reserve(size_t count) {
    if (count > count_) {
      if (count_) munmap(memory_, count_ * kBytes);
      void* p = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for " + std::to_string(count) + " stacks");
      memory_ = static_cast<char*>(p);
      count_ = 0;
      for (size_t i = 0; i < std::min(count, kGuarded); ++i)
        if (mprotect(memory_ + i * kBytes, kGuard, PROT_NONE)) throw std::runtime_error("emulator: no guard below a stack");
      count_ = count;
    }
    const size_t depth = abandoned_ ? kBytes - kGuard : kLastFrames;
    for (size_t i = 0; i < (abandoned_ ? count_ : count); ++i) unpoison(memory_ + (i + 1) * kBytes - depth, depth);
    abandoned_ = false;
  }

  // The launch has failed: threads stay where they were, with all their frames.
  void abandon() { abandoned_ = true; }

  char* begin(size_t i) const { return memory_ + i * kBytes + kGuard; }

  // Tops at the same offset of every page would fight for the same cache sets; hence 16 different ones.
  static size_t usable_bytes(size_t i) { return kBytes - kGuard - i % 16 * 832; }

  FUSED_RNN_EMULATOR_RAW bool contains(const void* p) const { return p >= memory_ && p < memory_ + count_ * kBytes; }

  // AddressSanitizer hears of one stack, the whole mapping, entered once a launch: an announcement for each switch
  // between fibers costs several times the switch.
  FUSED_RNN_EMULATOR_RAW void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&host_fake_stack_, memory_, count_ * kBytes);
    entering_ = true;
#endif
  }
  FUSED_RNN_EMULATOR_RAW void entered_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    if (entering_) __sanitizer_finish_switch_fiber(nullptr, &host_bottom_, &host_bytes_);
    entering_ = false;
#endif
  }
  FUSED_RNN_EMULATOR_RAW void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, host_bottom_, host_bytes_);
#endif
  }
  FUSED_RNN_EMULATOR_RAW void entered_host() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  char* memory_ = nullptr;
  size_t count_ = 0;
  bool abandoned_ = false;
#if defined(__SANITIZE_ADDRESS__)
  void* host_fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_bytes_ = 0;
  bool entering_ = false;
#endif
};

__attribute__((visibility("hidden"))) inline Stacks stacks;

}  // namespace fused_rnn::emulator
