// One thread's unit in the backward loops: the gradients it carries, what it reads, what it writes.
#pragma once
#include "index.h"
#include "storage.h"

namespace fused_rnn::cuda {

// kSequences: whether it takes gradients of the other states over time.
template <class Cell, class Storage, class Math, bool kSequences, int kWidth = 0, Histories histories = Histories::told>
class BackwardUnit {
  using BackwardLoop = BackwardLoopOf<kWidth>;
  using Acc = Accumulator<Storage>;
  static constexpr bool kKnown = kWidth > 0;
  static constexpr int G = Cell::gates, kStates = Cell::states, kAll = kGradientsLeft<Cell>;

 public:
  UnitIndex at;

  FUSED_RNN_DEVICE BackwardUnit(const BackwardLoop& p, const TimeIndex& walk, int r, int b, int u) : at(p.steps, r, b, u) {
    if (kKnown) resets_.begin(p.steps, at);
    if (!at.inside) return;
    const int last = p.steps.step1 - 1;
    saved_.begin(p.saved, p.steps, walk, at, last);
    dy_at_.begin(p.dy, p.steps, walk, at, last);
    h_.begin(p.states[0], p.steps, walk, at, last);
    each<kStates - 1>([&](auto s) {
      others_[s].begin(p.states[s + 1], p.steps, walk, at, last);
      if (kSequences) dsequences_at_[s].begin(p.dsequences[s], p.steps, walk, at, last);
    });
    dgates_.begin(p.dgates, p.steps, walk, at, last);
    each<kStates>([&](auto s) { dstate_[s] = static_cast<const Acc*>(p.dstates[s])[at.in_state(p.steps)]; });
    if (Cell::linear && !Cell::reads_h && p.steps.chunk != 0)
      dstate_[0] = p.steps.step1 < walk.end(at.length) ? Acc(0) : static_cast<const Acc*>(p.last)[at.in_state(p.steps)];
    each<Cell::params>([&](auto k) {
      params_[k] = widen(static_cast<const Storage*>(p.params)[(r * Cell::params + k) * p.steps.H + u]);
      if (p.dparams) dparams_[k] = static_cast<const Acc*>(p.dparams)[in_params(p, k)];
    });
  }

  // Forgets what was fetched for the step before. A thread does so for all of its units before it fetches for any: loads on their way
  // would be waited for.
  FUSED_RNN_DEVICE void forget() {
    if (!kKnown) reset_ = 0;
  }

  // Asks for what `run` of this step reads from memory, the last that the step after it does: it arrives behind the exchange and the
  // product. All of it stays as it lay in memory until `run`: a conversion here would wait for it.
  FUSED_RNN_DEVICE void fetch(const BackwardLoop& p, const TimeIndex& walk, int step) {
    const int t = walk.time(step);
    valid_ = at.valid(t);
    if (valid_) ask(p, walk, step, t);
    if (kKnown) resets_.ask(t, valid_);
    saved_.move(walk, -1), dy_at_.move(walk, -1), h_.move(walk, -1);
    each<kStates - 1>([&](auto s) {
      others_[s].move(walk, -1);
      if (kSequences) dsequences_at_[s].move(walk, -1);
    });
  }
  // What the step after the last one here left to it: for a loop that goes on where another one ended.
  FUSED_RNN_DEVICE void resume(const BackwardLoop& p, const TimeIndex& walk) {
    if (p.steps.step1 >= p.steps.T) return;
    reaches_ = at.live(p.steps, walk.time(p.steps.step1));
  }

  // product: dgates_{t+1} W_hh, the recurrent side; it counts only where the state entered that step.
  FUSED_RNN_DEVICE void add(Acc product) { dstate_[0] += reaches_ ? product : Acc(0); }
  // A step under way. valid: it is neither over nor not begun, else gradients pass unchanged.
  struct Now {
    Acc kept[Cell::saved > 0 ? Cell::saved : 1], before[kStates], after[kStates], dstate[kStates], dparams[kParams<Cell>];
    Acc masks[Cell::masks > 0 ? Cell::masks : 1], crossing[Cell::backward_crossing > 0 ? Cell::backward_crossing : 1];
    bool valid;
  };
  FUSED_RNN_DEVICE void begin(Now& now, const BackwardLoop& p) {
    now.valid = arrive();
    if (now.valid) gather(now, p);
  }
  template <int stage>
  FUSED_RNN_DEVICE void compute(Now& now, const BackwardLoop& p) {
    if (now.valid) formula<stage>(now, p);
  }
  FUSED_RNN_DEVICE void end(const Now& now) {
    if (now.valid) leave(now);
  }
  // All of it, of a cell in one stage.
  FUSED_RNN_DEVICE void run(const BackwardLoop& p) {
    if (!arrive()) return;
    Now now;
    gather(now, p);
    formula<0>(now, p);
    leave(now);
  }

  // Gradient g of the recurrent side, as it is stored and as the next product reads it.
  FUSED_RNN_DEVICE Storage recurrent(int g) const { return narrow<Storage>(d_[Cell::apart + g]); }

  FUSED_RNN_DEVICE void store(const BackwardLoop& p, const TimeIndex& walk, int step) {
    if (!at.inside) return;
    Storage* out = dgates_.at(p.dgates, p.steps, walk, at, step);
    FUSED_RNN_UNROLL
    for (int g = 0; g < kAll; ++g) out[g * p.steps.H] = narrow<Storage>(d_[g]);
    dgates_.move(walk, -1);
  }

  FUSED_RNN_DEVICE void finish(const BackwardLoop& p) const {
    if (!at.inside) return;
    each<kStates>([&](auto s) { static_cast<Acc*>(p.dstates[s])[at.in_state(p.steps)] = dstate_[s]; });
    each<Cell::params>([&](auto k) {
      if (p.dparams) static_cast<Acc*>(p.dparams)[in_params(p, k)] = dparams_[k];
    });
  }

 private:
  // Whether the step has gradients of its own; where it has not, theirs are zero.
  FUSED_RNN_DEVICE bool arrive() {
    reaches_ = live();
    FUSED_RNN_UNROLL
    for (int g = 0; g < kAll; ++g) d_[g] = 0;
    return valid_;
  }
  FUSED_RNN_DEVICE void gather(Now& now, const BackwardLoop& p) {
    FUSED_RNN_UNROLL
    for (int s = 0; s < Cell::saved; ++s) now.kept[s] = widen(kept_[s]);
    each<kStates>([&](auto s) {
      if constexpr (reads_after(s)) now.after[s] = after_.template of<s>().value(is_wide<s>(p));
      if constexpr (reads_before(s)) now.before[s] = live() ? before_.template of<s>().value(is_wide<s>(p)) : Acc(0);
      now.dstate[s] = dstate_[s];
    });
    now.dstate[0] += widen(dy_);
    if constexpr (kSequences) each<kStates - 1>([&](auto s) { now.dstate[s + 1] += widen(dsequences_[s]); });
    each<Cell::masks>([&](auto k) { now.masks[k] = widen(masks_[k]); });
  }
  template <int stage>
  FUSED_RNN_DEVICE void formula(Now& now, const BackwardLoop& p) {
    if constexpr (!Cell::staged) Cell::template backward<Math>(now.kept, now.before, params_, now.after, now.dstate, d_, now.dparams);
    else
      Cell::template backward<Math, stage>(now.kept, now.before, params_, now.masks, Acc(int(p.steps.H)), now.crossing, now.after,
                                           now.dstate, d_, now.dparams);
  }
  FUSED_RNN_DEVICE void leave(const Now& now) {
    each<Cell::params>([&](auto k) { dparams_[k] += now.dparams[k]; });
    each<kStates>([&](auto s) { dstate_[s] = live() ? now.dstate[s] : Acc(0); });
  }

  FUSED_RNN_DEVICE int64_t in_params(const BackwardLoop& p, int k) const {
    return (int64_t(at.r * p.steps.B + at.b) * Cell::params + k) * p.steps.H + at.u;
  }
  static constexpr FUSED_RNN_DEVICE bool reads_after(int s) { return Cell::backward_after >> s & 1; }
  static constexpr FUSED_RNN_DEVICE bool reads_before(int s) { return Cell::backward_before >> s & 1; }

  FUSED_RNN_DEVICE void ask(const BackwardLoop& p, const TimeIndex& walk, int step, int t) {
    const Storage* kept = saved_.at(p.saved, p.steps, walk, at, step);
    FUSED_RNN_UNROLL
    for (int s = 0; s < Cell::saved; ++s) kept_[s] = kept[s * p.steps.H];
    if (p.dy) dy_ = *dy_at_.at(p.dy, p.steps, walk, at, step);
    each<Cell::masks>([&](auto k) { masks_[k] = at.template mask<Storage>(p, k, t); });
    if constexpr (kSequences) {
      each<kStates - 1>([&](auto s) {
        if (p.dsequences[s]) dsequences_[s] = *dsequences_at_[s].at(p.dsequences[s], p.steps, walk, at, step);
      });
    }
    each<kStates>([&](auto s) {
      constexpr int state = decltype(s)::value;  // a constant to what is nested here, too
      if constexpr (reads_after(state))
        after_.template of<state>().load(is_wide<state>(p), [&](auto type) { return here<state>(p, walk, step, type); });
    });
    if (!kKnown) reset_ = at.reset(p.steps, t);
    each<kStates>([&](auto s) {
      constexpr int state = decltype(s)::value;
      if constexpr (reads_before(state)) {
        const bool first = walk.starts(t, at.length) || (state > 0 && step == p.steps.window0);
        before_.template of<state>().load(is_wide<state>(p), [&](auto type) {
          using As = std::remove_pointer_t<decltype(type)>;
          return first ? static_cast<const As*>(p.first[state]) + at.in_state(p.steps) : here<state>(p, walk, step, type) - walk.stride;
        });
      }
    });
  }
  // State s of the step, as it lies in memory; type: a null pointer of its type.
  template <int s, class As>
  FUSED_RNN_DEVICE const As* here(const BackwardLoop& p, const TimeIndex& walk, int step, const As*) const {
    if constexpr (s == 0) return h_.template at<const As>(p.states[0], p.steps, walk, at, step);
    else return others_[s - 1].template at<const As>(p.states[s], p.steps, walk, at, step);
  }
  template <int s>
  FUSED_RNN_DEVICE static bool is_wide(const BackwardLoop& p) {
    return s > 0 && are_wide<histories>(p);
  }

  // A state as it lies in memory: h in the storage type, another one perhaps in the accumulation type.
  template <bool kMayBeWide>
  class State {
   public:
    // from(null pointer of a type): where it is, of that type.
    template <class From>
    FUSED_RNN_DEVICE void load(bool wide, const From& from) {
      if (kMayBeWide && wide) bits_ = *from(static_cast<const Bits*>(nullptr));
      else bits_ = *from(static_cast<const StorageBits*>(nullptr));
    }
    FUSED_RNN_DEVICE Acc value(bool wide) const {
      const StorageBits low = StorageBits(bits_);
      Storage stored;
      memcpy(&stored, &low, sizeof(stored));
      if constexpr (!kMayBeWide) return widen(stored);
      Acc wider;
      memcpy(&wider, &bits_, sizeof(bits_));
      return wide ? wider : Acc(widen(stored));
    }

   private:
    using StorageBits = UnsignedOf<sizeof(Storage)>;
    using Bits = UnsignedOf<kMayBeWide ? sizeof(Acc) : sizeof(Storage)>;
    Bits bits_ = 0;
  };
  struct States {
    State<false> h;
    State<true> others[kStates > 1 ? kStates - 1 : 1];
    template <int s>
    FUSED_RNN_DEVICE auto& of() {
      if constexpr (s == 0) return h;
      else return others[s - 1];
    }
  };
  // The state entered the step that was fetched.
  FUSED_RNN_DEVICE bool live() const { return valid_ && !(kKnown ? resets_.zero() : reset_ != 0); }

  // Of the step that is fetched; of the one that is stored.
  Cursor<const Storage, Cell::saved, Span::window, kWidth> saved_;
  Cursor<const Storage, 1, Span::all, kWidth> dy_at_, h_;
  Cursor<const std::conditional_t<histories == Histories::wide, Acc, Storage>, 1, Span::window, kWidth>
      others_[kStates > 1 ? kStates - 1 : 1];
  Cursor<const Storage, 1, Span::all, kWidth> dsequences_at_[kSequences && kStates > 1 ? kStates - 1 : 1];
  Cursor<Storage, kAll, Span::all, kWidth> dgates_;
  Acc dstate_[kStates] = {};
  States after_, before_;
  Acc d_[kAll] = {}, params_[kParams<Cell>] = {}, dparams_[kParams<Cell>] = {};
  Storage dsequences_[kSequences && kStates > 1 ? kStates - 1 : 1]{};
  Storage dy_{}, kept_[Cell::saved > 0 ? Cell::saved : 1]{}, masks_[Cell::masks > 0 ? Cell::masks : 1]{};
  Resets resets_;  // where H is known
  int32_t reset_ = 0;
  bool valid_ = false;
  bool reaches_ = false;  // `live()` of the step that ran before, the one after in the recurrence's order
};

}  // namespace fused_rnn::cuda
