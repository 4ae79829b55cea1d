// Cells that are linear in their states, over many steps at once: rows of T x B in strips, as a batch is, for all that needs no state
// before the step; then the states of one step after the other, which is a product and a sum; then what needs them, in strips again.
// Threads divide the steps, and for the states the units.
#pragma once
#include "layout.h"

namespace FUSED_RNN_ISA {

using fused_rnn::kNoField;
using fused_rnn::Scan;

// A program's scan, if it has one, where it is quicker than one step after the other.
static inline const Scan* scanned(const Problem& p, int64_t unit_vectors, const Scan* scan) {
  const fused_rnn::ScanLimits& limits = fused_rnn::scan_limits();
  const int64_t threads = p.threads > p.R ? p.threads / p.R : 1;
  return p.T >= limits.steps && p.B * unit_vectors <= limits.vectors * threads ? scan : nullptr;
}

// Steps that threads treat together, in the order of time.
struct Window {
  int64_t step, time, row, steps;  // the first step, the earliest time, as a row of T x B, and how many
};

// One thread's part.
template <class S>
struct ScanWork {
  static constexpr int L = kLanes<S>;
  const Scan* scan;
  Workspace<S> before, after;
  S* fields;  // of all threads: of each field and vector of units [rows, lanes]
  int64_t unit_vectors, stride;

  // Steps of a window for each thread: more where threads wait for each other.
  static int64_t steps(const Problem& p) {
    const int64_t rows = fused_rnn::scan_limits().rows * (p.threads > 1 ? 4 : 1) / p.B;
    return rows > 0 ? rows : 1;
  }
  // Rows of a window of so many threads: of few steps there are no more.
  static int64_t rows(const Problem& p, int threads) {
    const int64_t all = p.stop - p.start, most = steps(p) * threads;
    return (most < all ? most : all) * p.B;
  }
  static ScanWork take(Arena& arena, const Scan& scan, const Problem& p, int64_t unit_vectors, int more, int threads, int me) {
    ScanWork w{&scan, {}, {}, nullptr, unit_vectors, off_pages<S>(round_up(rows(p, threads) * L, 64 / int(sizeof(S))))};
    w.fields = arena.take<S>((scan.fields + more) * unit_vectors * w.stride);  // more: behind the fields of the graph
    for (int i = 0; i < threads; ++i) {
      const auto before = Workspace<S>::take(arena, scan.before), after = Workspace<S>::take(arena, scan.after);
      if (i == me) w.before = before, w.after = after;
    }
    return w;
  }
  void prepare() const { before.prepare(), after.prepare(); }
  ALWAYS_INLINE S* at(int field, int64_t u, int64_t row) const { return fields + (field * unit_vectors + u) * stride + row * L; }

  // What a step makes of what is handed on to it: by one instruction, as the interpreter does.
  struct Step {
    Place<S> factor, rest;  // of each row; factor.at: null where nothing is handed on
    ALWAYS_INLINE Vec<S> operator()(int64_t row, Vec<S> v) const {
      const Vec<S> added = load(rest.at + row * rest.stride);
      return factor.at ? load(factor.at + row * factor.stride) * v + added : added;
    }
  };
  ALWAYS_INLINE Step step(int state, int64_t u) const {
    const auto rows = [&](int field, const S* none) { return field == kNoField ? Place<S>{none, 0} : Place<S>{at(field, u, 0), L}; };
    return {rows(scan->factor[state], nullptr), rows(scan->rest[state], zero)};
  }
  static constexpr S zero[L] = {};

  // function(vector of units, first row, rows) for all vectors and rows [i0, i1).
  template <class F>
  void for_rows(const Workspace<S>& work, int64_t i0, int64_t i1, F function) const {
    for (int64_t u = 0; u < unit_vectors; ++u)
      for (int64_t i = i0; i < i1; i += work.most) function(u, i, int(i1 - i < work.most ? i1 - i : work.most));
  }
  // function(Window, first and end of this thread's steps in it) from [start, stop), in the order of the steps or from the end.
  template <class F>
  static void for_windows(const Problem& p, int r, const Share& s, bool from_end, Barrier& barrier, F function) {
    const int64_t all = p.stop - p.start, windows = (all - 1) / (steps(p) * s.size) + 1, most = (all - 1) / windows + 1;
    for (int64_t done = 0; done < all; done += most) {
      const int64_t n = all - done < most ? all - done : most, step = from_end ? p.stop - done - n : p.start + done;
      const int64_t time = p.weights[r].direction > 0 ? step : p.T - step - n;
      if (done > 0 && n < most) barrier.wait(s.me);  // each thread has other rows than before
      function(Window{step, time, time * p.B, n}, part(n, s.me, s.size), part(n, s.me + 1, s.size));
    }
  }
};

}  // namespace FUSED_RNN_ISA
