// How long a wait for another CTA may last. For ever; or, in a build for debugging (FUSED_RNN_CUDA_DEBUG=1, see setup.py), two
// seconds, after which the kernel says what it waited for, which block and thread it is, and fails: a launch that would hang a GPU
// ends in an error. Kernels that are compiled at first use fail likewise, without words, where that variable is set then. In all others
// this is nothing at all.
#pragma once
#include "platform.h"

#if defined(FUSED_RNN_BOUNDED_SPINS) && defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <cassert>
#endif

namespace fused_rnn::cuda {

class SpinTimeout {
 public:
#if defined(FUSED_RNN_BOUNDED_SPINS) && defined(__CUDA_ARCH__)
  FUSED_RNN_DEVICE void spend([[maybe_unused]] const char* what) const {
    constexpr uint64_t kNanoseconds = 2000000000;
    if (now() - begin_ <= kNanoseconds) return;
#if defined(__CUDACC_RTC__)
    trap();  // NVRTC has no header that declares the other one
#else
    __assert_fail(what, "fused_rnn", 0, "wait");  // as assert() does, but with this text
#endif
  }

 private:
  FUSED_RNN_DEVICE static uint64_t now() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
  }
  uint64_t begin_ = now();
#else
  FUSED_RNN_DEVICE void spend(const char*) const {}
#endif
};

}  // namespace fused_rnn::cuda
