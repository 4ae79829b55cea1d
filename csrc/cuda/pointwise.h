// The loops without a product of their own: a thread a unit, the recurrent product given. They serve
//   save="recompute", whose gates are made again for a chunk of steps from one large product, and
//   the stepwise path, where each step is a matrix product by cuBLAS and one of these launches for that step.
#pragma once
#include "layout.h"
#include "unit_bwd.h"
#include "unit_fwd.h"

namespace fused_rnn::cuda {

// The unit of this thread: [R, B, H] flattened, units innermost.
struct Flat {
  int r, b, u;
  bool inside;
  FUSED_RNN_DEVICE explicit Flat(const Steps& s) {
    const int64_t i = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
    inside = i < int64_t(s.R) * s.B * s.H;
    u = int(i % s.H);
    b = int(i / s.H % s.B);
    r = int(i / (int64_t(s.H) * s.B));
  }
};

// given: [window, B, R, G, H], none where the cell has no W_hh.  workspace.operand, where there is one: [R, B, H], h for the next step's
// product; then the range is one step, and given holds it alone, [B, R, G, H]: two recurrences that run in opposite directions are at
// different times.
template <class Cell, class Storage, class Math>
FUSED_RNN_KERNEL(kPointwiseThreads)
pointwise_fwd_kernel(const FUSED_RNN_GRID_CONSTANT ForwardLoop p) {
  static_assert(Cell::forward_stages == 1);
  using Acc = Accumulator<Storage>;
  constexpr int G = Cell::gates;
  const Flat flat(p.steps);
  if (!flat.inside) return;
  const TimeIndex walk(p.steps, flat.r);
  ForwardUnit<Cell, Storage, Math> unit(p, walk, flat.r, flat.b, flat.u);
  if (p.hidden) {
    unit.take(p, walk, p.hidden);
    unit.take_carried();
  }
  unit.enter();
  unit.fetch(p, walk, p.steps.step0);
  for (int step = p.steps.step0; step < p.steps.step1; ++step) {
    const int t = walk.time(step);
    const int held = p.workspace.operand ? 0 : t - walk.first_time;
    Acc recurrent[G];
    if constexpr (Cell::recurrent) {
      const Storage* given = static_cast<const Storage*>(p.given) + steps_size(p.steps, held, G) + unit.at.in_step(p.steps, G);
      const bool live = unit.at.live(p.steps, t);
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) recurrent[g] = live ? Acc(widen(given[g * p.steps.H])) : Acc(0);
    }
    unit.run(p, walk, step, recurrent);
    unit.store(p, walk, step);
    if (p.workspace.operand) static_cast<Storage*>(p.workspace.operand)[unit.at.in_state(p.steps)] = unit.hidden();
    if (step + 1 == p.steps.step1) break;
    unit.enter();
    unit.fetch(p, walk, step + 1);
  }
  unit.finish(p);
}

// One step, step0, whose product with the gradients of the step after it is given: [R, B, H]; or, to close, that product alone. Without
// W_hh all steps, from the last to the first.
template <class Cell, class Storage, class Math>
FUSED_RNN_KERNEL(kPointwiseThreads)
pointwise_bwd_kernel(const FUSED_RNN_GRID_CONSTANT BackwardLoop p) {
  static_assert(Cell::backward_stages == 1);
  using Acc = Accumulator<Storage>;
  const Flat flat(p.steps);
  if (!flat.inside) return;
  const TimeIndex walk(p.steps, flat.r);
  BackwardUnit<Cell, Storage, Math, true> unit(p, walk, flat.r, flat.b, flat.u);
  if constexpr (!Cell::recurrent) {
    for (int step = p.steps.step1 - 1; step >= p.steps.step0; --step) {
      unit.forget();
      unit.fetch(p, walk, step);
      unit.run(p);
      unit.store(p, walk, step);
    }
    return unit.finish(p);
  }
  unit.resume(p, walk);
  const Acc product = p.given ? Acc(widen(static_cast<const Storage*>(p.given)[unit.at.in_state(p.steps)])) : Acc(0);
  if (!p.close) unit.fetch(p, walk, p.steps.step0);
  unit.add(product);
  if (!p.close) {
    unit.run(p);
    unit.store(p, walk, p.steps.step0);
  }
  unit.finish(p);
}

}  // namespace fused_rnn::cuda
