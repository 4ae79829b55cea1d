// The loops without a product of their own: a thread a unit, the recurrent product given. They serve
//   save="recompute", whose gates are made again for a chunk of steps from one large product, and
//   the stepwise path, where each step is a matrix product by cuBLAS and one of these launches for that step;
//   cells without W_hh, whose units run all of time, or, of a cell that is linear in its states, chunks of it side by side.
#pragma once
#include "layout.h"
#include "unit_bwd.h"
#include "unit_fwd.h"

namespace fused_rnn::cuda {

// The unit of this thread: [chunks, R, B, H] flattened, units innermost.
struct Flat {
  int chunk, r, b, u;
  bool inside;
  FUSED_RNN_DEVICE Flat(const Steps& s, int chunks) {
    const int64_t size = int64_t(s.R) * s.B * s.H;
    int64_t i = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
    inside = i < chunks * size;
    chunk = chunks == 1 ? 0 : int(i / size);
    i -= chunk * size;
    u = int(i % s.H);
    b = int(i / s.H % s.B);
    r = int(i / (int64_t(s.H) * s.B));
  }
};

template <class Cell>
FUSED_RNN_DEVICE int chunks_of(const Steps& s) {
  return Cell::linear && s.chunk != 0 ? ceil_div(s.step1 - s.step0, s.chunk) : 1;
}

// To a chunk's own part of the arrays that have one for each.
template <class Cell, class Acc>
FUSED_RNN_DEVICE void move_to_chunk(ForwardLoop& p, int64_t elements) {
  each<kCarriedStates<Cell>>([&](auto k) { p.carried[k] = static_cast<Acc*>(p.carried[k]) + elements; });
}
template <class Cell, class Acc>
FUSED_RNN_DEVICE void move_to_chunk(BackwardLoop& p, int64_t elements) {
  each<Cell::states>([&](auto k) { p.dstates[k] = static_cast<Acc*>(p.dstates[k]) + elements; });
  if (p.dparams) p.dparams = static_cast<Acc*>(p.dparams) + elements * Cell::params;
}

// The loop over one chunk; of a cell that has none the loop itself.
template <class Cell, class Acc, class Loop>
FUSED_RNN_DEVICE decltype(auto) of_chunk(const Loop& all, int chunk) {
  if constexpr (!Cell::linear) {
    return (all);
  } else {
    Loop p = all;
    if (p.steps.chunk == 0) return p;
    p.steps.step0 += chunk * p.steps.chunk;
    if (p.steps.step1 - p.steps.step0 > p.steps.chunk) p.steps.step1 = p.steps.step0 + p.steps.chunk;
    move_to_chunk<Cell, Acc>(p, chunk * (int64_t(p.steps.R) * p.steps.B * p.steps.H));
    return p;
  }
}

// A unit's part of the product that forward is given; zero where the state does not enter, nothing without W_hh.
template <class Cell, class Storage>
FUSED_RNN_DEVICE void given_product(const ForwardLoop& p, const UnitIndex& at, const TimeIndex& walk, int step,
                                    Accumulator<Storage> (&recurrent)[Cell::gates]) {
  if constexpr (Cell::recurrent) {
    using Acc = Accumulator<Storage>;
    constexpr int G = Cell::gates;
    const int t = walk.time(step), held = p.workspace.operand ? 0 : t - walk.first_time;
    const Storage* given = static_cast<const Storage*>(p.given) + steps_size(p.steps, held, G) + at.in_step(p.steps, G);
    const bool live = at.live(p.steps, t);
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) recurrent[g] = live ? Acc(widen(given[g * p.steps.H])) : Acc(0);
  }
}

// given: [window, B, R, G, H], none where the cell has no W_hh.  workspace.operand, where there is one: [R, B, H], h for the next step's
// product; then the range is one step, and given holds it alone, [B, R, G, H]: two recurrences that run in opposite directions are at
// different times.
template <class Cell, class Storage, class Math>
FUSED_RNN_KERNEL(kPointwiseThreads)
pointwise_fwd_kernel(const FUSED_RNN_GRID_CONSTANT ForwardLoop all) {
  static_assert(Cell::forward_stages == 1);
  using Acc = Accumulator<Storage>;
  const Flat flat(all.steps, chunks_of<Cell>(all.steps));
  if (!flat.inside) return;
  decltype(auto) p = of_chunk<Cell, Acc>(all, flat.chunk);
  const TimeIndex walk(p.steps, flat.r);
  ForwardUnit<Cell, Storage, Math> unit(p, walk, flat.r, flat.b, flat.u);
  if (p.hidden) {
    unit.take(p, walk, p.hidden);
    unit.take_carried();
  }
  unit.enter();
  unit.fetch(p, walk, p.steps.step0);
  for (int step = p.steps.step0; step < p.steps.step1; ++step) {
    Acc recurrent[Cell::gates];
    given_product<Cell, Storage>(p, unit.at, walk, step, recurrent);
    unit.run(p, walk, step, recurrent);
    unit.store(p, walk, step);
    if (p.workspace.operand) static_cast<Storage*>(p.workspace.operand)[unit.at.in_state(p.steps)] = unit.hidden();
    if (step + 1 == p.steps.step1) break;
    unit.enter();
    unit.fetch(p, walk, step + 1);
  }
  unit.finish(p, walk);
}

// One step, step0, whose product with the gradients of the step after it is given: [R, B, H]; or, to close, that product alone. Without
// W_hh all steps, from the last to the first.
template <class Cell, class Storage, class Math>
FUSED_RNN_KERNEL(kPointwiseThreads)
pointwise_bwd_kernel(const FUSED_RNN_GRID_CONSTANT BackwardLoop all) {
  static_assert(Cell::backward_stages == 1);
  using Acc = Accumulator<Storage>;
  const Flat flat(all.steps, chunks_of<Cell>(all.steps));
  if (!flat.inside) return;
  decltype(auto) p = of_chunk<Cell, Acc>(all, flat.chunk);
  const TimeIndex walk(p.steps, flat.r);
  BackwardUnit<Cell, Storage, Math, true> unit(p, walk, flat.r, flat.b, flat.u);
  if constexpr (!Cell::recurrent) {
    for (int step = p.steps.step1 - 1; step >= p.steps.step0; --step) {
      unit.forget();
      unit.fetch(p, walk, step);
      unit.run(p);
      if (p.dgates) unit.store(p, walk, step);
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
