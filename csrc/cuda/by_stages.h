// A step of a cell in stages without a team: a CTA has a row, and each of its threads some of the row's units, one after the other. What
// crosses from stage to stage is in global memory, where a unit's thread alone reads it, but for the sums over a row. A launch runs the
// stages up to one that ends in products with the cell's own matrices, which are made between two launches.
#pragma once
#include "pointwise.h"
#include "stages.h"

namespace fused_rnn::cuda {

template <class Cell>
constexpr bool in_stages = Cell::forward_stages > 1 || Cell::backward_stages > 1;

// One row of what crosses, [crossing, R, B, H].
template <class Cell, bool kBackward, class Acc>
class CrossingRow {
  using Facts = Publishing<Cell, kBackward>;
  static constexpr int kCrossing = kBackward ? Cell::backward_crossing : Cell::forward_crossing;

 public:
  FUSED_RNN_DEVICE CrossingRow(const OwnOperands& own, const Steps& s, int row)
      : row_(static_cast<Acc*>(own.crossing) + int64_t(row) * s.H),
        apart_(int64_t(s.R) * s.B * s.H),
        width_(s.H),
        partial_(shared_array<Acc>(0, kStageThreads)) {}

  template <int kStage, int count>
  FUSED_RNN_DEVICE void load(Acc (&values)[count], int u) const {
    FUSED_RNN_UNROLL
    for (int k = 0; k < kCrossing; ++k) values[k] = kStage > 0 ? row_[k * apart_ + u] : Acc(0);
  }
  template <int count>
  FUSED_RNN_DEVICE void store(const Acc (&values)[count], int u) const {
    FUSED_RNN_UNROLL
    for (int k = 0; k < kCrossing; ++k) row_[k * apart_ + u] = values[k];
  }

  // The sums and variances that end a stage; by all of the CTA's threads.
  template <int kStage>
  FUSED_RNN_DEVICE void reduce() const {
    each<Facts::count()>([&](auto i) {
      constexpr Published one = Facts::of(decltype(i)::value);
      if constexpr (one.stage == kStage && !Facts::is_product(decltype(i)::value)) {
        const Acc* from = row_ + one.from * apart_;
        Acc made = total([&](int u) { return from[u]; });
        if constexpr (one.what == Publish::variance) {
          const Acc mean = made / Acc(width_);
          made = total([&](int u) { return (from[u] - mean) * (from[u] - mean); }) / Acc(width_);
        }
        for (int u = int(threadIdx.x); u < width_; u += kStageThreads) row_[one.to * apart_ + u] = made;
      }
    });
  }

 private:
  // Over the row, in an order of its own.
  template <class Value>
  FUSED_RNN_DEVICE Acc total(const Value& value) const {
    const int thread = int(threadIdx.x);
    Acc sum = 0;
    for (int u = thread; u < width_; u += kStageThreads) sum += value(u);
    partial_[thread] = sum;
    sync_threads();
    for (int half = kStageThreads / 2; half > 0; half /= 2) {
      if (thread < half) partial_[thread] += partial_[thread + half];
      sync_threads();
    }
    sum = partial_[0];
    sync_threads();
    return sum;
  }

  Acc* row_;
  int64_t apart_;
  int width_;
  Acc* partial_;
};

template <int kStages, class Run>
FUSED_RNN_DEVICE void each_stage(const OwnOperands& own, const Run& run) {
  each<kStages>([&](auto stage) {
    if (int(stage) >= own.stage0 && int(stage) < own.stage1) run(stage);
  });
}

// Step step0; given and workspace.operand as the pointwise kernel has them.
template <class Cell, class Storage, class Math>
FUSED_RNN_KERNEL(kStageThreads)
stages_fwd_kernel(const FUSED_RNN_GRID_CONSTANT ForwardLoop p) {
  using Acc = Accumulator<Storage>;
  const int r = int(blockIdx.x) / p.steps.B, b = int(blockIdx.x) % p.steps.B, step = p.steps.step0;
  const TimeIndex walk(p.steps, r);
  const CrossingRow<Cell, false, Acc> row(p.own, p.steps, int(blockIdx.x));
  each_stage<Cell::forward_stages>(p.own, [&](auto stage) {
    constexpr int kStage = decltype(stage)::value;
    for (int u = int(threadIdx.x); u < p.steps.H; u += kStageThreads) {
      using Unit = ForwardUnit<Cell, Storage, Math>;
      Unit unit(p, walk, r, b, u);
      if (p.hidden && step == p.steps.window0) {
        unit.take(p, walk, p.hidden);
        unit.take_carried();
      }
      unit.enter();
      unit.fetch(p, walk, step);
      Acc recurrent[Cell::gates];
      given_product<Cell, Storage>(p, unit.at, walk, step, recurrent);
      typename Unit::Now now;
      unit.begin(now, walk, step, recurrent);
      row.template load<kStage>(now.crossing, u);
      unit.template compute<kStage>(now, p);
      row.store(now.crossing, u);
      if constexpr (kStage + 1 == Cell::forward_stages) {
        unit.end(now, walk, step);
        unit.store(p, walk, step);
        if (p.workspace.operand) static_cast<Storage*>(p.workspace.operand)[unit.at.in_state(p.steps)] = unit.hidden();
        unit.finish(p, walk);
      }
    }
    row.template reduce<kStage>();
  });
}

// Step step0, whose product is given as the pointwise kernel has it; or, to close, that product alone.
template <class Cell, class Storage, class Math>
FUSED_RNN_KERNEL(kStageThreads)
stages_bwd_kernel(const FUSED_RNN_GRID_CONSTANT BackwardLoop p) {
  using Acc = Accumulator<Storage>;
  const int r = int(blockIdx.x) / p.steps.B, b = int(blockIdx.x) % p.steps.B, step = p.steps.step0;
  const TimeIndex walk(p.steps, r);
  const CrossingRow<Cell, true, Acc> row(p.own, p.steps, int(blockIdx.x));
  each_stage<Cell::backward_stages>(p.own, [&](auto stage) {
    constexpr int kStage = decltype(stage)::value;
    for (int u = int(threadIdx.x); u < p.steps.H; u += kStageThreads) {
      using Unit = BackwardUnit<Cell, Storage, Math, true>;
      Unit unit(p, walk, r, b, u);
      unit.resume(p, walk);
      if (!p.close) unit.fetch(p, walk, step);
      unit.add(p.given ? Acc(widen(static_cast<const Storage*>(p.given)[unit.at.in_state(p.steps)])) : Acc(0));
      if (p.close) {
        unit.finish(p);
        continue;
      }
      typename Unit::Now now;
      unit.begin(now, p);
      row.template load<kStage>(now.crossing, u);
      unit.template compute<kStage>(now, p);
      row.store(now.crossing, u);
      if constexpr (kStage + 1 == Cell::backward_stages) {
        unit.end(now);
        unit.store(p, walk, step);
        unit.finish(p);
      }
    }
    row.template reduce<kStage>();
  });
}

}  // namespace fused_rnn::cuda
