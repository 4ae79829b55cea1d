// Marks in a loop whose times benchmarks/timeline.cu reads; nothing at all in any other build.
#pragma once
#include "platform.h"

namespace fused_rnn::cuda {

// Where a step of a loop is.
enum Mark : int { kBegins, kArrived, kMultiplied, kSummed, kPut, kSent, kEnded, kStored, kFetched, kMarks };

#if defined(FUSED_RNN_TIMELINE)

constexpr int kTimedFirst = 64, kTimedSteps = 128, kTimedWarps = 8, kTimedMembers = 2;
// [member, warp, step, mark]: cycles of the multiprocessor's clock, of the first team's first members.
__device__ uint32_t timeline[kTimedMembers][kTimedWarps][kTimedSteps][kMarks];

FUSED_RNN_DEVICE void mark(int step, Mark place) {
  const unsigned i = unsigned(step - kTimedFirst);
  if (threadIdx.x % 32 != 0 || blockIdx.x >= kTimedMembers || i >= kTimedSteps) return;
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  timeline[blockIdx.x][threadIdx.x / 32][i][place] = now;
}

#else

FUSED_RNN_DEVICE void mark(int, Mark) {}

#endif

}  // namespace fused_rnn::cuda
