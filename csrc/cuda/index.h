// From a loop's step to its time, and from a thread's unit to its places in memory.
#pragma once
#include <utility>

#include "params.h"
#include "primitives/platform.h"

namespace fused_rnn::cuda {

// One recurrence's walk through time.
struct TimeIndex {
  int T, first_time;  // first_time: of the window
  int origin, pace;   // the time of step 0; what a step adds to it, 1 or -1
  int size;           // elements of a step of an array with one vector of H

  template <int kWidth>
  FUSED_RNN_DEVICE TimeIndex(const StepsOf<kWidth>& s, int r) : T(s.T), size(s.B * s.R * s.H) {
    const bool backwards = (s.reversed >> (r % s.period)) & 1;
    first_time = backwards ? T - s.window1 : s.window0;
    origin = backwards ? T - 1 : 0;
    pace = backwards ? -1 : 1;
    if constexpr (kWidth > 0) {  // else registers are dear
      for (int* number : {&first_time, &origin, &pace, &size}) *number = kept(*number);
    }
  }
  FUSED_RNN_DEVICE int time(int step) const { return origin + pace * step; }
  // The first step at which a sequence of this length is alive: a reverse one starts at its own end.
  FUSED_RNN_DEVICE bool starts(int t, int length) const { return t == (pace < 0 ? length - 1 : 0); }
};

// One element (sequence b, unit u of recurrence r): offsets within a step take 32 bits, a step's place 64.
struct UnitIndex {
  int r, b, u;
  bool inside;     // of the batch and of the hidden size
  int length;  // 0 outside

  template <int kWidth>
  FUSED_RNN_DEVICE UnitIndex(const StepsOf<kWidth>& s, int r, int b, int u) : r(r), b(b), u(u), inside(b < s.B && u < s.H) {
    const int given = inside && s.lengths ? int(s.lengths[b]) : s.T;
    length = !inside ? 0 : given < s.T ? given : s.T;  // waits for the load here, once, and not in the loop
  }
  template <int kWidth>
  FUSED_RNN_DEVICE int in_step(const StepsOf<kWidth>& s, int vectors) const { return (b * s.R + r) * vectors * s.H + u; }
  template <int kWidth>
  FUSED_RNN_DEVICE int in_state(const StepsOf<kWidth>& s) const { return (r * s.B + b) * s.H + u; }
  // The sequence is alive at t, and its state enters t as it is.
  FUSED_RNN_DEVICE bool valid(int t) const { return t < length; }
  template <int kWidth>
  FUSED_RNN_DEVICE bool live(const StepsOf<kWidth>& s, int t) const { return valid(t) && reset(s, t) == 0; }
  // As it lies in memory, so that nobody waits for it who does not use it yet. For a valid t.
  template <int kWidth>
  FUSED_RNN_DEVICE int32_t reset(const StepsOf<kWidth>& s, int t) const { return s.reset ? s.reset[int64_t(t) * s.B + b] : 0; }
};

// run(0), .., run(n - 1), each number a constant. Where a loop over a cell's states would do, ptxas found a schedule some percent slower.
template <class Run, int... i>
FUSED_RNN_DEVICE void each_of(const Run& run, std::integer_sequence<int, i...>) {
  (run(std::integral_constant<int, i>{}), ...);
}
template <int n, class Run>
FUSED_RNN_DEVICE void each(const Run& run) {
  each_of(run, std::make_integer_sequence<int, n>{});
}

// Elements of so many steps of an array with so many vectors of H.
template <int kWidth>
FUSED_RNN_DEVICE int64_t steps_size(const StepsOf<kWidth>& s, int steps, int vectors) { return int64_t(steps) * (s.B * s.R * vectors * s.H); }

// Where a unit is in arrays of the window with so many vectors of H, and in those of all time. Where H is known it moves on from step to
// step; else it is reckoned anew each time, for which there are more instructions but fewer registers.
template <int kWidth>
class Place {
 public:
  FUSED_RNN_DEVICE Place(const StepsOf<kWidth>& s, const TimeIndex& walk, const UnitIndex& at, int step)
      : now_(int64_t(walk.time(step) - walk.first_time) * walk.size + at.in_step(s, 1)) {}
  FUSED_RNN_DEVICE void move(const TimeIndex& walk, int by) { now_ += int64_t(walk.pace * by) * walk.size; }
  // At `step`, which is so many steps ahead of where it has moved to.
  FUSED_RNN_DEVICE int64_t in(const StepsOf<kWidth>&, const TimeIndex& walk, const UnitIndex& at, int, int vectors, int ahead = 0) const {
    return (now_ + int64_t(walk.pace * ahead) * walk.size) * vectors - int64_t(vectors - 1) * at.u;
  }
  FUSED_RNN_DEVICE int64_t of_all(const StepsOf<kWidth>&, const TimeIndex& walk, const UnitIndex& at, int, int vectors, int ahead = 0) const {
    return (now_ + int64_t(walk.first_time + walk.pace * ahead) * walk.size) * vectors - int64_t(vectors - 1) * at.u;
  }

 private:
  int64_t now_;
};
template <>
class Place<0> {
 public:
  FUSED_RNN_DEVICE Place(const Steps&, const TimeIndex&, const UnitIndex&, int) {}
  FUSED_RNN_DEVICE void move(const TimeIndex&, int) {}
  FUSED_RNN_DEVICE int64_t in(const Steps& s, const TimeIndex& walk, const UnitIndex& at, int step, int vectors, int = 0) const {
    return steps_size(s, walk.time(step) - walk.first_time, vectors) + at.in_step(s, vectors);
  }
  FUSED_RNN_DEVICE int64_t of_all(const Steps& s, const TimeIndex& walk, const UnitIndex& at, int step, int vectors, int = 0) const {
    return steps_size(s, walk.time(step), vectors) + at.in_step(s, vectors);
  }
};

}  // namespace fused_rnn::cuda
