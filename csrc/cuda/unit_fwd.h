// One thread's unit in the forward loops: its states, what it reads, what it writes. The loops differ only in where the
// recurrent product comes from and in where the next one reads h.
#pragma once
#include "index.h"
#include "storage.h"

namespace fused_rnn::cuda {

// How many states, the last ones, are carried in the accumulation type. h is rounded to what the product reads, where that is all that
// reads it.
template <class Cell>
constexpr int kCarriedStates = Cell::states - (Cell::reads_h ? 0 : 1);

// histories: of what type they are, where that is known when this is compiled.
template <class Cell, class Storage, class Math, int kWidth = 0, Histories histories = Histories::told>
class ForwardUnit {
  using ForwardLoop = ForwardLoopOf<kWidth>;
  using Acc = Accumulator<Storage>;
  static constexpr bool kKnown = kWidth > 0;
  static constexpr int G = Cell::gates, kStates = Cell::states, kApart = Cell::apart;
  static constexpr int kCarried = kCarriedStates<Cell>, kFirst = kStates - kCarried;

 public:
  UnitIndex at;

  FUSED_RNN_DEVICE ForwardUnit(const ForwardLoop& p, const TimeIndex& walk, int r, int b, int u) : at(p.steps, r, b, u) {
    if (kKnown) resets_.begin(p.steps, at);
    if (!at.inside) return;
    gx_.begin(p.gx, p.steps, walk, at, p.steps.step0);
    y_.begin(p.y, p.steps, walk, at, p.steps.step0);
    saved_.begin(p.saved, p.steps, walk, at, p.steps.step0);
    each<kStates - 1>([&](auto s) { histories_[s].begin(p.histories[s], p.steps, walk, at, p.steps.step0); });
    const int i = at.in_state(p.steps);
    each<kCarried>([&](auto k) { carried_[k] = static_cast<const Acc*>(p.carried[k])[i]; });
    each<kApart>([&](auto k) { bias_[k] = widen(static_cast<const Storage*>(p.bias)[(r * kApart + k) * p.steps.H + u]); });
    each<Cell::params>([&](auto k) { params_[k] = widen(static_cast<const Storage*>(p.params)[(r * Cell::params + k) * p.steps.H + u]); });
    h_ = static_cast<const Storage*>(p.h0)[i];
    if (keeps_checkpoints(p) && p.steps.step0 == 0) checkpoint(p, 0);
    if (p.y && !by_chunks(p)) take(p, walk, p.y);
    const int t = walk.time(p.steps.step0);
    if constexpr (kKnown) {
      h_ = arrived(h_);
      resets_.ask(t, at.valid(t));
    } else if (at.valid(t)) {
      next_reset_ = at.reset(p.steps, t);
    }
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

  // The states as they enter the next step. Where H is not known, a thread enters all of its units before it fetches for any: loads on
  // their way would be waited for. Where it is known `run` does it, so that `fetch` may come before `store`.
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
    if (kKnown) reset_ = resets_.zero();
    const Storage* x = gx_.at(p.gx, p.steps, walk, at, step);
    gx_.move(walk, 1);
    if (at.valid(t)) {
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) x_[g] = x[g * p.steps.H];
      each<Cell::masks>([&](auto k) { masks_[k] = at.template mask<Storage>(p, k, t); });
    }
    const bool counts = step + 1 < p.steps.step1 && at.valid(next);
    if constexpr (kKnown) resets_.ask(next, counts);
    else if (counts) next_reset_ = at.reset(p.steps, next);
  }

  // The recurrent product of this step where it is given: [window, B, R, G, H].
  FUSED_RNN_DEVICE void given(const ForwardLoop& p, const TimeIndex& walk, int step, Acc (&recurrent)[G]) const {
    const int t = walk.time(step);
    if (!at.live(p.steps, t)) return;
    const Storage* from = static_cast<const Storage*>(p.given) + steps_size(p.steps, t - walk.first_time, G) + at.in_step(p.steps, G);
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) recurrent[g] += widen(from[g * p.steps.H]);
  }

  // A step under way.
  struct Now {
    Acc a[kGradients<Cell>], before[kStates], after[kStates], masks[Cell::masks > 0 ? Cell::masks : 1];
    Acc crossing[Cell::forward_crossing > 0 ? Cell::forward_crossing : 1];
    bool valid;  // the step is its sequence's
  };
  // recurrent: h_{t-1} W_hh^T, zero where the state does not enter; nobody reads it where there is no W_hh.
  FUSED_RNN_DEVICE void begin(Now& now, const TimeIndex& walk, int step, const Acc (&recurrent)[G]) const {
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) now.a[g] = Cell::recurrent && g < G - kApart ? widen(x_[g]) + recurrent[g] : widen(x_[g]);
    each<kApart>([&](auto k) { now.a[G + k] = recurrent[G - kApart + k] + bias_[k]; });
    each<kFirst>([&](auto k) { now.before[k] = 0; });
    each<kCarried>([&](auto k) { now.before[kFirst + k] = kKnown && reset_ ? Acc(0) : carried_[k]; });
    each<Cell::masks>([&](auto k) { now.masks[k] = widen(masks_[k]); });
    now.valid = at.valid(walk.time(step));
  }
  template <int stage>
  FUSED_RNN_DEVICE void compute(Now& now, const ForwardLoop& p) {
    if constexpr (!Cell::staged) Cell::template forward<Math>(now.a, now.before, params_, now.after, kept_);
    else Cell::template forward<Math, stage>(now.a, now.before, params_, now.masks, Acc(int(p.steps.H)), now.crossing, now.after, kept_);
  }
  FUSED_RNN_DEVICE void end(const Now& now, const TimeIndex& walk, int step) {
    if (!at.valid(walk.time(step))) return;
    each<kCarried>([&](auto k) { carried_[k] = now.after[kFirst + k]; });
    h_ = narrow<Storage>(now.after[0]);
  }
  // All of it, of a cell in one stage.
  FUSED_RNN_DEVICE void run(const ForwardLoop& p, const TimeIndex& walk, int step, const Acc (&recurrent)[G]) {
    Now now;
    begin(now, walk, step, recurrent);
    compute<0>(now, p);
    end(now, walk, step);
  }

  // h as the product of the next step reads it.
  FUSED_RNN_DEVICE Storage entering() const { return (kKnown ? resets_.zero() : next_reset_ != 0) ? Storage{} : h_; }

  // h as it is; where the state does not enter the next step, the next step knows.
  FUSED_RNN_DEVICE Storage hidden() const { return h_; }

  // Writes what a step leaves behind, after the team has what it waits for.
  FUSED_RNN_DEVICE void store(const ForwardLoop& p, const TimeIndex& walk, int step) {
    if (!at.inside) return;
    const bool valid = at.valid(walk.time(step));
    if (keeps_checkpoints(p) && (step + 1) % p.every == 0 && step + 1 < p.steps.T) checkpoint(p, step + 1);
    if (p.y) *y_.at(p.y, p.steps, walk, at, step) = valid ? h_ : Storage{};
    if (p.saved) {
      Storage* saved = saved_.at(p.saved, p.steps, walk, at, step);
      FUSED_RNN_UNROLL
      for (int s = 0; s < Cell::saved; ++s) saved[s * p.steps.H] = valid ? narrow<Storage>(kept_[s]) : Storage{};
    }
    if (kStates > 1 && p.keeps_histories) {
      each<kStates - 1>([&](auto s) {
        const Acc value = valid ? carried_[s + 1 - kFirst] : Acc(0);
        if (are_wide<histories>(p)) *histories_[s].template at<Acc>(p.histories[s], p.steps, walk, at, step) = value;
        else *histories_[s].template at<Storage>(p.histories[s], p.steps, walk, at, step) = narrow<Storage>(value);
        histories_[s].move(walk, 1);
      });
    }
    y_.move(walk, 1), saved_.move(walk, 1);
  }

  FUSED_RNN_DEVICE void finish(const ForwardLoop& p, const TimeIndex& walk) const {
    if (!at.inside) return;
    each<kCarried>([&](auto k) { static_cast<Acc*>(p.carried[k])[at.in_state(p.steps)] = carried_[k]; });
    if (p.h_n && (by_chunks(p) ? walk.ends(p.steps, at.length) : p.steps.step1 == p.steps.T))
      static_cast<Storage*>(p.h_n)[at.in_state(p.steps)] = h_;
  }

 private:
  // Others run its other steps meanwhile.
  FUSED_RNN_DEVICE static bool by_chunks(const ForwardLoop& p) { return Cell::linear && p.steps.chunk != 0; }
  FUSED_RNN_DEVICE static bool keeps_checkpoints(const ForwardLoop& p) { return kStates > 1 && p.checkpoints[0]; }
  // The states that enter a step.
  FUSED_RNN_DEVICE void checkpoint(const ForwardLoop& p, int step) const {
    const int64_t i = steps_size(p.steps, step / p.every, 1) + at.in_state(p.steps);
    each<kStates - 1>([&](auto s) { static_cast<Acc*>(p.checkpoints[s])[i] = carried_[s + 1 - kFirst]; });
  }

  // Of the step that is fetched; of the one that is stored.
  Cursor<const Storage, G, Span::window, kWidth> gx_;
  Cursor<Storage, 1, Span::all, kWidth> y_;
  Cursor<Storage, Cell::saved, Span::window, kWidth> saved_;
  Cursor<std::conditional_t<histories == Histories::wide, Acc, Storage>, 1, Span::window, kWidth> histories_[kStates > 1 ? kStates - 1 : 1];
  Acc carried_[kCarried > 0 ? kCarried : 1] = {}, bias_[kApart > 0 ? kApart : 1] = {};
  Acc params_[kParams<Cell>] = {}, kept_[Cell::saved > 0 ? Cell::saved : 1] = {};
  Storage h_{}, x_[G]{}, masks_[Cell::masks > 0 ? Cell::masks : 1]{};
  Resets resets_;  // where H is known, of the step that enters next
  bool reset_ = false;
  int32_t next_reset_ = 0;  // else: 0 where the state enters the next step; nobody looks before it has arrived from memory
};

}  // namespace fused_rnn::cuda
