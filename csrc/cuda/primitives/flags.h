// Counters in global memory, by which CTAs anywhere on the device wait for each other.
#pragma once
#include "platform.h"

namespace fused_rnn::cuda {

FUSED_RNN_DEVICE uint32_t load_acquire(const uint32_t* flag) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::load_acquire(flag);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#endif
}

FUSED_RNN_DEVICE void add_release(uint32_t* flag, uint32_t value) {
#if defined(FUSED_RNN_EMULATE)
  emulator::add_release(flag, value);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

// Between two looks at a flag.
FUSED_RNN_DEVICE void pause() {
#if defined(FUSED_RNN_EMULATE)
  emulator::pause();
#else
  __nanosleep(20);
#endif
}

// 16 bytes that other CTAs have written: from L2, never from this multiprocessor's L1.
FUSED_RNN_DEVICE uint4 load_relaxed(const uint4* global) {
#if defined(FUSED_RNN_EMULATE)
  return *global;
#else
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global)
               : "memory");
  return v;
#endif
}

// 16 bytes that other CTAs will read by copy_async16.
FUSED_RNN_DEVICE void store_global(uint4* global, uint4 value) { *global = value; }

}  // namespace fused_rnn::cuda
