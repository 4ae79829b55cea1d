// Brings what a member's units read some steps from now from DRAM to L2, 32 bytes a thread, in one instruction a warp and step: a step of a
// known team is shorter than a load from DRAM takes.
#pragma once
#include "index.h"
#include "primitives/copy.h"

namespace fused_rnn::cuda {

constexpr int kStepsAhead = 3;

template <int kWidth>
class Ahead {
 public:
  // first: the step that the loop begins with; by: 1 or -1, what it goes on by.
  FUSED_RNN_DEVICE Ahead(const StepsOf<kWidth>& s, const TimeIndex& walk, const Team& team, int r, int first_b, int first_u, int first,
                         int by)
      : steps_(s), walk_(walk), team_(team), r_(r), first_b_(first_b), first_u_(first_u), step_(first + by * kStepsAhead), by_(by) {}

  // An array of so many vectors of T a step, or null.
  template <class T>
  FUSED_RNN_DEVICE void add(const void* array, int vectors, Span span) {
    const int sectors = team_.units * int(sizeof(T)) / kSector, a_row = vectors * sectors, mine = left_;
    left_ -= team_.rows * a_row;
    if (mine < 0 || left_ >= 0 || !array || first_b_ + mine / a_row >= steps_.B) return;
    const int b = first_b_ + mine / a_row, vector = mine % a_row / sectors, sector = mine % sectors;
    const int time = walk_.time(step_) - (span == Span::window ? walk_.first_time : 0);
    const int64_t i = steps_size(steps_, time, vectors) + ((b * steps_.R + r_) * vectors + vector) * steps_.H + first_u_;
    at_ = uintptr_t(array) + i * int(sizeof(T)) + sector * kSector;
    stride_ = int64_t(walk_.stride) * by_ * vectors * int(sizeof(T));
  }

  // Of the step that lies so far ahead of this one, if it is among those of the loop.
  FUSED_RNN_DEVICE void fetch(int step) {
    const int then = step + by_ * kStepsAhead;
    if (at_ != 0 && then >= steps_.step0 && then < steps_.step1) prefetch_l2(at_);
    at_ += at_ != 0 ? stride_ : 0;
  }

 private:
  static constexpr int kSector = 32;
  const StepsOf<kWidth>& steps_;
  const TimeIndex& walk_;
  const Team& team_;
  int r_, first_b_, first_u_, step_, by_;
  int left_ = int(threadIdx.x);  // pieces before this thread's own
  uintptr_t at_ = 0;
  int64_t stride_ = 0;
};

}  // namespace fused_rnn::cuda
