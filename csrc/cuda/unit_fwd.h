// One thread's unit in the forward loops: its state, what it reads, what it writes. The loops differ only in where the
// recurrent product comes from and in where the next one reads h.
#pragma once
#include "index.h"
#include "storage.h"

namespace fused_rnn::cuda {

template <class Cell, class Storage, class Math>
class ForwardUnit {
  static_assert(!(Cell::has_cell && Cell::needs_h_prev), "one state is carried: c, or h in full precision");
  using Acc = Accumulator<Storage>;
  static constexpr int G = Cell::gates;
  static constexpr bool kSplit = Cell::preactivations != G;  // the last gate's two sides enter the cell apart
  static constexpr bool kState = Cell::has_cell || Cell::needs_h_prev;

 public:
  UnitIndex at;

  FUSED_RNN_DEVICE ForwardUnit(const ForwardLoop& p, const TimeIndex& walk, int r, int b, int u) : at(p.steps, r, b, u) {
    if (!at.inside) return;
    const int i = at.in_state(p.steps);
    if (kState) state_ = static_cast<const Acc*>(p.state)[i];
    if (kSplit) bias_ = widen(static_cast<const Storage*>(p.bias)[r * p.steps.H + u]);
    h_ = static_cast<const Storage*>(p.h0)[i];
    const int before = walk.pace < 0 ? walk.T - p.steps.step0 : p.steps.step0 - 1;  // the time of the step before
    const int t = walk.pace < 0 || before < at.length ? before : at.length - 1;     // or the sequence's last
    if (p.checkpoints && kState && p.steps.step0 == 0) checkpoint(p, 0);
    if (p.y && t >= 0 && t < at.length) h_ = static_cast<const Storage*>(p.y)[steps_size(p.steps, t, 1) + at.in_step(p.steps, 1)];
    if (at.valid(walk.time(p.steps.step0))) next_reset_ = at.reset(p.steps, walk.time(p.steps.step0));
  }

  // The state as it enters this step. A thread enters all of its units before it fetches for any: loads on their way would be waited for.
  FUSED_RNN_DEVICE void enter() {
    if (next_reset_ != 0) state_ = 0;
    next_reset_ = 0;
    renew(at.u);  // offsets that were kept from step to step would take the registers that the weights need
  }

  // Asks for what `run` of this step reads from memory, the last that the step before does: it arrives behind the exchange and the product.
  // Whether the state enters the step after that is asked for with it, since `entering` must know a step ahead.
  FUSED_RNN_DEVICE void fetch(const ForwardLoop& p, const TimeIndex& walk, int step) {
    const int t = walk.time(step), next = t + walk.pace;
    const Storage* x = static_cast<const Storage*>(p.gx) + steps_size(p.steps, t - walk.first_time, G) + at.in_step(p.steps, G);
    if (at.valid(t)) {
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) x_[g] = x[g * p.steps.H];
    }
    if (step + 1 < p.steps.step1 && at.valid(next)) next_reset_ = at.reset(p.steps, next);
  }

  // recurrent: h_{t-1} W_hh^T, zero where the state does not enter.
  FUSED_RNN_DEVICE void run(const TimeIndex& walk, int step, const Acc (&recurrent)[G]) {
    Acc a[Cell::preactivations];
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) a[g] = widen(x_[g]) + recurrent[g];
    if (kSplit) {
      a[G - 1] = widen(x_[G - 1]);
      a[Cell::preactivations - 1] = recurrent[G - 1] + bias_;
    }
    Acc state = state_, h;
    if (Cell::has_cell) Cell::template forward<Math>(a, Acc(0), state, h, kept_);
    else Cell::template forward<Math>(a, state, state, h, kept_);
    if (!at.valid(walk.time(step))) return;
    state_ = Cell::has_cell ? state : h;
    h_ = narrow<Storage>(h);
  }

  // h as the product of the next step reads it.
  FUSED_RNN_DEVICE Storage entering() const { return next_reset_ == 0 ? h_ : Storage{}; }

  // h as it is; where the state does not enter the next step, the next step knows.
  FUSED_RNN_DEVICE Storage hidden() const { return h_; }

  // Writes what a step leaves behind, after the team has what it waits for.
  FUSED_RNN_DEVICE void store(const ForwardLoop& p, const TimeIndex& walk, int step) const {
    if (!at.inside) return;
    const int t = walk.time(step), local = t - walk.first_time;
    const bool valid = at.valid(t);
    if (p.checkpoints && kState && (step + 1) % p.every == 0 && step + 1 < p.steps.T) checkpoint(p, step + 1);
    if (p.y) static_cast<Storage*>(p.y)[steps_size(p.steps, t, 1) + at.in_step(p.steps, 1)] = valid ? h_ : Storage{};
    if (p.saved) {
      Storage* saved = static_cast<Storage*>(p.saved) + steps_size(p.steps, local, Cell::saved) + at.in_step(p.steps, Cell::saved);
      FUSED_RNN_UNROLL
      for (int s = 0; s < Cell::saved; ++s) saved[s * p.steps.H] = valid ? narrow<Storage>(kept_[s]) : Storage{};
    }
    if (p.cells) {
      const int64_t i = steps_size(p.steps, local, 1) + at.in_step(p.steps, 1);
      if (p.cells_are_wide) static_cast<Acc*>(p.cells)[i] = state_;
      else static_cast<Storage*>(p.cells)[i] = narrow<Storage>(state_);
    }
  }

  FUSED_RNN_DEVICE void finish(const ForwardLoop& p) const {
    if (!at.inside) return;
    if (kState) static_cast<Acc*>(p.state)[at.in_state(p.steps)] = state_;
    if (p.h_n && p.steps.step1 == p.steps.T) static_cast<Storage*>(p.h_n)[at.in_state(p.steps)] = h_;
  }

 private:
  // The state that enters a step.
  FUSED_RNN_DEVICE void checkpoint(const ForwardLoop& p, int step) const {
    static_cast<Acc*>(p.checkpoints)[steps_size(p.steps, step / p.every, 1) + at.in_state(p.steps)] = state_;
  }

  Acc state_ = 0, bias_ = 0;
  Acc kept_[Cell::saved > 0 ? Cell::saved : 1] = {};
  Storage h_{}, x_[G]{};
  int32_t next_reset_ = 0;  // 0 where the state enters the next step; nobody looks before it has arrived from memory
};

}  // namespace fused_rnn::cuda
