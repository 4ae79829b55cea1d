// Rows of a batch over time as the products after a loop read them: a copy, in which what is not there is zero.
#pragma once
#include "index.h"

namespace fused_rnn::cuda {

constexpr int kRowThreads = 256;

// A thread an element. Element: of whatever type, for nothing is done with it.
template <class Element>
FUSED_RNN_KERNEL(kRowThreads)
copy_rows_kernel(const FUSED_RNN_GRID_CONSTANT Rows p) {
  const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= int64_t(p.steps.T) * p.steps.B * p.width) return;
  const int u = int(i % p.width), b = int(i / p.width % p.steps.B), t = int(i / p.width / p.steps.B);
  const TimeIndex walk(p.steps, p.r);
  const UnitIndex place(p.steps, p.r, b, 0);
  const Element* from = static_cast<const Element*>(p.from) + u;
  Element value{};
  if (!p.first) {
    if (place.valid(t)) value = from[(int64_t(t) * p.steps.B + b) * p.stride];
  } else if (place.live(p.steps, t)) {
    if (walk.starts(t, place.length)) value = static_cast<const Element*>(p.first)[int64_t(b) * p.width + u];
    else value = from[(int64_t(t - walk.pace) * p.steps.B + b) * p.stride];
  }
  static_cast<Element*>(p.to)[i] = value;
}

}  // namespace fused_rnn::cuda
