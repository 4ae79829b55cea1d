// From a loop's step to its time, and from a thread's unit to its places in memory.
#pragma once
#include <type_traits>
#include <utility>

#include "params.h"
#include "primitives/platform.h"

namespace fused_rnn::cuda {

// One recurrence's walk through time.
struct TimeIndex {
  int T, first_time;  // first_time: of the window
  int origin, pace;   // the time of step 0; what a step adds to it, 1 or -1
  int stride;         // elements that a step adds, of an array with one vector of H

  template <int kWidth>
  FUSED_RNN_DEVICE TimeIndex(const StepsOf<kWidth>& s, int r) : T(s.T) {
    const bool backwards = (s.reversed >> (r % s.period)) & 1;
    first_time = backwards ? T - s.window1 : s.window0;
    origin = backwards ? T - 1 : 0;
    pace = backwards ? -1 : 1;
    stride = pace * (s.B * s.R * s.H);
    if constexpr (kWidth > 0) {  // else registers are dear
      for (int* number : {&first_time, &origin, &pace, &stride}) *number = kept(*number);
    }
  }
  FUSED_RNN_DEVICE int time(int step) const { return origin + pace * step; }
  // How many steps there are up to the last at which a sequence of this length is alive, one at least; and whether it is among these.
  FUSED_RNN_DEVICE int end(int length) const { return length == 0 ? 1 : pace < 0 ? T : length; }
  template <int kWidth>
  FUSED_RNN_DEVICE bool ends(const StepsOf<kWidth>& s, int length) const {
    return s.step0 < end(length) && end(length) <= s.step1;
  }
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
  FUSED_RNN_DEVICE int in_step(const StepsOf<kWidth>& s, int vectors) const {
    return (b * s.R + r) * vectors * s.H + u;
  }
  template <int kWidth>
  FUSED_RNN_DEVICE int in_state(const StepsOf<kWidth>& s) const {
    return (r * s.B + b) * s.H + u;
  }
  // The sequence is alive at t, and its state enters t as it is.
  FUSED_RNN_DEVICE bool valid(int t) const { return t < length; }
  template <int kWidth>
  FUSED_RNN_DEVICE bool live(const StepsOf<kWidth>& s, int t) const {
    return valid(t) && reset(s, t) == 0;
  }
  // Of mask k of a cell in stages, as it lies in memory.
  template <class Storage, class Loop>
  FUSED_RNN_DEVICE Storage mask(const Loop& p, int k, int t) const {
    const int times = p.own.times[k];
    const int64_t row = int64_t(r * times + (times > 1 ? t : 0)) * p.steps.B + b;
    return static_cast<const Storage*>(p.own.masks[k])[row * p.steps.H + u];
  }
  // As it lies in memory, so that nobody waits for it who does not use it yet. For a valid t.
  template <int kWidth>
  FUSED_RNN_DEVICE int32_t reset(const StepsOf<kWidth>& s, int t) const {
    return s.reset ? s.reset[int64_t(t) * s.B + b] : 0;
  }
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
FUSED_RNN_DEVICE int64_t steps_size(const StepsOf<kWidth>& s, int steps, int vectors) {
  return int64_t(steps) * (s.B * s.R * vectors * s.H);
}

// Of what type the histories of a loop are: `told` by the launch, or known when this is compiled.
enum class Histories { told, narrow, wide };
template <Histories histories, class Loop>
FUSED_RNN_DEVICE bool are_wide(const Loop& p) {
  return histories == Histories::told ? p.histories_are_wide : histories == Histories::wide;
}

// run(constant): where H is known histories shall be, too, and there are two loops for them.
template <bool kKnown, class Storage, class Loop, class Run>
FUSED_RNN_DEVICE void by_histories(const Loop& p, const Run& run) {
  if constexpr (!kKnown) run(std::integral_constant<Histories, Histories::told>{});
  else if (sizeof(Storage) == 4 || p.histories_are_wide) run(std::integral_constant<Histories, Histories::wide>{});
  else run(std::integral_constant<Histories, Histories::narrow>{});
}

// Where a unit is in an array with so many vectors of H a step: all of time, or the window. Where H is known it is kept, and moved on from
// step to step; else it is reckoned anew each time, for which there are more instructions but fewer registers.
enum class Span { all, window };

template <class T, int vectors, Span span, int kWidth>
class Cursor {
#if defined(FUSED_RNN_EMULATE)
  using Address = uintptr_t;  // of an array that is not there, too, which a pointer may not count from
#else
  using Address = T*;
#endif
  static constexpr int kScale = std::is_pointer_v<Address> ? 1 : int(sizeof(T));

 public:
  FUSED_RNN_DEVICE void begin(const void* array, const StepsOf<kWidth>& s, const TimeIndex& walk, const UnitIndex& at, int step) {
    const int time = walk.time(step) - (span == Span::window ? walk.first_time : 0);
    now_ = Address(array) + (steps_size(s, time, vectors) + at.in_step(s, vectors)) * kScale;
  }
  FUSED_RNN_DEVICE void move(const TimeIndex& walk, int by) { now_ += int64_t(walk.stride) * (by * vectors * kScale); }
  template <class As = T>
  FUSED_RNN_DEVICE As* at(const void*, const StepsOf<kWidth>&, const TimeIndex&, const UnitIndex&, int) const {
    return (As*)now_;
  }

 private:
#if defined(FUSED_RNN_EMULATE)
  Address now_ = 0;
#else
  Address now_;  // of a unit outside the batch it is moved, but never begun: to clear it costs registers
#endif
};

template <class T, int vectors, Span span>
class Cursor<T, vectors, span, 0> {
 public:
  FUSED_RNN_DEVICE void begin(const void*, const Steps&, const TimeIndex&, const UnitIndex&, int) {}
  FUSED_RNN_DEVICE void move(const TimeIndex&, int) {}
  template <class As = T>
  FUSED_RNN_DEVICE As* at(const void* array, const Steps& s, const TimeIndex& walk, const UnitIndex& at, int step) const {
    const int time = walk.time(step) - (span == Span::window ? walk.first_time : 0);
    return (As*)array + (steps_size(s, time, vectors) + at.in_step(s, vectors));
  }
};

#if defined(FUSED_RNN_EMULATE)
static const int32_t no_reset = 0;
#else
static __device__ const int32_t no_reset = 0;
#endif

// Whether a unit's state is zero as it enters a step, asked for ahead; where H is known. It reads memory whether there are resets or not:
// of a load under a condition the compiler makes a copy, which waits for it in the same step.
class Resets {
 public:
  template <int kWidth>
  FUSED_RNN_DEVICE void begin(const StepsOf<kWidth>& s, const UnitIndex& at) {
    const bool has = s.reset && at.inside;
    from_ = has ? s.reset + at.b : &no_reset;
    stride_ = has ? s.B : 0;
  }
  // counts: whether it matters at t, which then is a time.
  FUSED_RNN_DEVICE void ask(int t, bool counts) {
    bits_ = from_[int64_t(counts ? t : 0) * stride_];
    mask_ = counts ? stride_ : 0;
  }
  FUSED_RNN_DEVICE bool zero() const { return mask_ != 0 && bits_ != 0; }

 private:
  const int32_t* from_;
  int stride_, mask_ = 0;
  int32_t bits_ = 0;
};

}  // namespace fused_rnn::cuda
