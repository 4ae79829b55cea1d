// Copies from global to shared memory that run beside the arithmetic: they bypass L1, and so see what other SMs have released. And hints
// of what is read soon.
#pragma once
#include "platform.h"

namespace fused_rnn::cuda {

// 16 bytes, both addresses multiples of 16. Where not `valid`, zeros arrive and `global` is not read.
FUSED_RNN_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
#if defined(FUSED_RNN_EMULATE)
  emulator::copy_async16(shared, global, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}

// Makes one group of the copies issued since the last one.
FUSED_RNN_DEVICE void copy_commit() {
#if defined(FUSED_RNN_EMULATE)
  emulator::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until no more than kGroups of this thread's groups are under way. Other threads see the data after a barrier.
template <int kGroups>
FUSED_RNN_DEVICE void copy_wait() {
#if defined(FUSED_RNN_EMULATE)
  emulator::copy_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// The 32 bytes around an address of global memory, to L2.
FUSED_RNN_DEVICE void prefetch_l2(uintptr_t address) {
#if defined(FUSED_RNN_EMULATE)
  emulator::check_accessible("prefetch_l2", reinterpret_cast<const void*>(address), 2);  // nothing comes of it, but it shall be right
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

}  // namespace fused_rnn::cuda
