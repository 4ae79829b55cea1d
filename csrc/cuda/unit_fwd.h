// One thread's unit in the forward loops: its states, what it reads, what it writes. The loops differ only in where the
// recurrent product comes from and in where the next one reads h.
#pragma once
#include "index.h"
#include "storage.h"

namespace fused_rnn::cuda {

template <class Cell, class Storage, class Math, int kWidth = 0>
class ForwardUnit {
  using ForwardLoop = ForwardLoopOf<kWidth>;
  using Acc = Accumulator<Storage>;
  static constexpr bool kKnown = kWidth > 0;
  static constexpr int G = Cell::gates, kStates = Cell::states, kApart = Cell::apart;
  // The states from this one on are carried in the accumulation type. h is rounded to what the product reads, where that is all that
  // reads it.
  static constexpr int kFirst = Cell::reads_h ? 0 : 1, kCarried = kStates - kFirst;

 public:
  UnitIndex at;

  FUSED_RNN_DEVICE ForwardUnit(const ForwardLoop& p, const TimeIndex& walk, int r, int b, int u)
      : at(p.steps, r, b, u), place_(p.steps, walk, at, p.steps.step0 - 1) {
    if (!at.inside) return;
    const int i = at.in_state(p.steps);
    each<kCarried>([&](auto k) { carried_[k] = static_cast<const Acc*>(p.carried[k])[i]; });
    each<kApart>([&](auto k) { bias_[k] = widen(static_cast<const Storage*>(p.bias)[(r * kApart + k) * p.steps.H + u]); });
    each<Cell::params>([&](auto k) { params_[k] = widen(static_cast<const Storage*>(p.params)[(r * Cell::params + k) * p.steps.H + u]); });
    h_ = static_cast<const Storage*>(p.h0)[i];
    if (keeps_checkpoints(p) && p.steps.step0 == 0) checkpoint(p, 0);
    if (p.y) take(p, walk, p.y);
    if (at.valid(walk.time(p.steps.step0))) next_reset_ = at.reset(p.steps, walk.time(p.steps.step0));
  }

  // h as it enters step0, of the steps before it; y: [T, B, R, H].
  FUSED_RNN_DEVICE void take(const ForwardLoop& p, const TimeIndex& walk, const void* y) {
    const int before = walk.pace < 0 ? walk.T - p.steps.step0 : p.steps.step0 - 1;  // the time of the step before
    const int t = walk.pace < 0 || before < at.length ? before : at.length - 1;     // or the sequence's last
    if (t >= 0 && t < at.length) h_ = static_cast<const Storage*>(y)[steps_size(p.steps, t, 1) + at.in_step(p.steps, 1)];
  }
  // Likewise what is carried of it, where nobody kept it in the accumulation type.
  FUSED_RNN_DEVICE void take_carried() {
    if (Cell::reads_h) carried_[0] = widen(h_);
  }

  // The states as they enter the next step. Where H is not known, a thread enters all of its units before it fetches for any: loads on their
  // way would be waited for. Where it is known `run` does it, so that `fetch` may come before `store`.
  FUSED_RNN_DEVICE void enter() {
    if (kKnown) return;
    each<kCarried>([&](auto k) {
      if (next_reset_ != 0) carried_[k] = 0;
    });
    next_reset_ = 0;
    renew(at.u);  // offsets that were kept from step to step would take the registers that the weights need
  }

  // Asks for what `run` of this step reads from memory, the last that the step before does: it arrives behind the exchange and the product.
  // Whether the state enters the step after that is asked for with it, since `entering` must know a step ahead.
  FUSED_RNN_DEVICE void fetch(const ForwardLoop& p, const TimeIndex& walk, int step) {
    const int t = walk.time(step), next = t + walk.pace;
    if (kKnown) {
      reset_ = next_reset_;
      next_reset_ = 0;
    }
    const Storage* x = static_cast<const Storage*>(p.gx) + place_.in(p.steps, walk, at, step, G, 1);
    if (at.valid(t)) {
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) x_[g] = x[g * p.steps.H];
    }
    if (step + 1 < p.steps.step1 && at.valid(next)) next_reset_ = at.reset(p.steps, next);
  }

  // recurrent: h_{t-1} W_hh^T, zero where the state does not enter; nobody reads it where there is no W_hh.
  FUSED_RNN_DEVICE void run(const TimeIndex& walk, int step, const Acc (&recurrent)[G]) {
    place_.move(walk, 1);
    Acc a[kGradients<Cell>], before[kStates] = {}, after[kStates];
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) a[g] = Cell::recurrent && g < G - kApart ? widen(x_[g]) + recurrent[g] : widen(x_[g]);
    each<kApart>([&](auto k) { a[G + k] = recurrent[G - kApart + k] + bias_[k]; });
    each<kCarried>([&](auto k) { before[kFirst + k] = kKnown && reset_ != 0 ? Acc(0) : carried_[k]; });
    Cell::template forward<Math>(a, before, params_, after, kept_);
    if (!at.valid(walk.time(step))) return;
    each<kCarried>([&](auto k) { carried_[k] = after[kFirst + k]; });
    h_ = narrow<Storage>(after[0]);
  }

  // h as the product of the next step reads it.
  FUSED_RNN_DEVICE Storage entering() const { return next_reset_ == 0 ? h_ : Storage{}; }

  // h as it is; where the state does not enter the next step, the next step knows.
  FUSED_RNN_DEVICE Storage hidden() const { return h_; }

  // Writes what a step leaves behind, after the team has what it waits for.
  FUSED_RNN_DEVICE void store(const ForwardLoop& p, const TimeIndex& walk, int step) const {
    if (!at.inside) return;
    const bool valid = at.valid(walk.time(step));
    if (keeps_checkpoints(p) && (step + 1) % p.every == 0 && step + 1 < p.steps.T) checkpoint(p, step + 1);
    if (p.y) static_cast<Storage*>(p.y)[place_.of_all(p.steps, walk, at, step, 1)] = valid ? h_ : Storage{};
    if (p.saved) {
      Storage* saved = static_cast<Storage*>(p.saved) + place_.in(p.steps, walk, at, step, Cell::saved);
      FUSED_RNN_UNROLL
      for (int s = 0; s < Cell::saved; ++s) saved[s * p.steps.H] = valid ? narrow<Storage>(kept_[s]) : Storage{};
    }
    if (kStates > 1 && p.keeps_histories) {
      const int64_t i = place_.in(p.steps, walk, at, step, 1);
      each<kStates - 1>([&](auto s) {
        const Acc value = valid ? carried_[s + 1 - kFirst] : Acc(0);
        if (p.histories_are_wide) static_cast<Acc*>(p.histories[s])[i] = value;
        else static_cast<Storage*>(p.histories[s])[i] = narrow<Storage>(value);
      });
    }
  }

  FUSED_RNN_DEVICE void finish(const ForwardLoop& p) const {
    if (!at.inside) return;
    each<kCarried>([&](auto k) { static_cast<Acc*>(p.carried[k])[at.in_state(p.steps)] = carried_[k]; });
    if (p.h_n && p.steps.step1 == p.steps.T) static_cast<Storage*>(p.h_n)[at.in_state(p.steps)] = h_;
  }

 private:
  FUSED_RNN_DEVICE static bool keeps_checkpoints(const ForwardLoop& p) { return kStates > 1 && p.checkpoints[0]; }
  // The states that enter a step.
  FUSED_RNN_DEVICE void checkpoint(const ForwardLoop& p, int step) const {
    const int64_t i = steps_size(p.steps, step / p.every, 1) + at.in_state(p.steps);
    each<kStates - 1>([&](auto s) { static_cast<Acc*>(p.checkpoints[s])[i] = carried_[s + 1 - kFirst]; });
  }

  Place<kWidth> place_;  // of the step that ran
  Acc carried_[kCarried > 0 ? kCarried : 1] = {}, bias_[kApart > 0 ? kApart : 1] = {};
  Acc params_[kParams<Cell>] = {}, kept_[Cell::saved > 0 ? Cell::saved : 1] = {};
  Storage h_{}, x_[G]{};
  int32_t reset_ = 0, next_reset_ = 0;  // 0 where the state enters the next step; nobody looks before it has arrived from memory
};

}  // namespace fused_rnn::cuda
