// One thread's unit in the backward loops: the gradients it carries, what it reads, what it writes.
#pragma once
#include "index.h"
#include "storage.h"

namespace fused_rnn::cuda {

template <class Cell, class Storage, class Math>
class BackwardUnit {
  static_assert(!(Cell::has_cell && (Cell::needs_h || Cell::needs_h_prev)), "one state is read: c, or h");
  using Acc = Accumulator<Storage>;
  static constexpr int G = Cell::gates, kGradients = Cell::gradients;
  static constexpr bool kState = Cell::has_cell || Cell::needs_h;        // reads the state of the step
  static constexpr bool kBefore = Cell::has_cell || Cell::needs_h_prev;  // and the one that entered it

 public:
  UnitIndex at;

  FUSED_RNN_DEVICE BackwardUnit(const BackwardLoop& p, int r, int b, int u) : at(p.steps, r, b, u) {
    if (!at.inside) return;
    dh_ = static_cast<const Acc*>(p.dh)[at.in_state(p.steps)];
    if (Cell::has_cell) dc_ = static_cast<const Acc*>(p.dc)[at.in_state(p.steps)];
  }

  // Forgets what was fetched for the step before. A thread does so for all of its units before it fetches for any: loads on their way
  // would be waited for.
  FUSED_RNN_DEVICE void forget() { reset_ = 0; }

  // Asks for what `run` of this step reads from memory, the last that the step after it does: it arrives behind the exchange and the
  // product. All of it stays as it lay in memory until `run`: a conversion here would wait for it.
  FUSED_RNN_DEVICE void fetch(const BackwardLoop& p, const TimeIndex& walk, int step) {
    const int t = walk.time(step), local = t - walk.first_time;
    valid_ = at.valid(t);
    if (!valid_) return;
    const int i = at.in_step(p.steps, 1);
    const Storage* kept = static_cast<const Storage*>(p.saved) + steps_size(p.steps, local, Cell::saved) + at.in_step(p.steps, Cell::saved);
    FUSED_RNN_UNROLL
    for (int s = 0; s < Cell::saved; ++s) kept_[s] = kept[s * p.steps.H];
    if (p.dy) dy_ = static_cast<const Storage*>(p.dy)[steps_size(p.steps, t, 1) + i];
    const int64_t here = steps_size(p.steps, Cell::has_cell ? local : t, 1) + i;
    if (kState) state_.load(p, p.states, here);
    reset_ = at.reset(p.steps, t);
    if (!kBefore) return;
    const bool first = walk.starts(t, at.length) || (Cell::has_cell && step == p.steps.window0);
    const int64_t back = steps_size(p.steps, -walk.pace, 1);
    before_.load(p, first ? p.first_state : p.states, first ? at.in_state(p.steps) : here + back);
  }
  // What the step after the last one here left to it: for a loop that goes on where another one ended.
  FUSED_RNN_DEVICE void resume(const BackwardLoop& p, const TimeIndex& walk) {
    if (p.steps.step1 >= p.steps.T) return;
    reaches_ = at.live(p.steps, walk.time(p.steps.step1));
  }

  // product: dgates_{t+1} W_hh, the recurrent side; it counts only where the state entered that step.
  FUSED_RNN_DEVICE void add(Acc product) { dh_ += reaches_ ? product : Acc(0); }
  FUSED_RNN_DEVICE void run(const BackwardLoop& p) {
    reaches_ = live();
    FUSED_RNN_UNROLL
    for (int g = 0; g < kGradients; ++g) d_[g] = 0;
    if (!valid_) return;  // over, or not begun: gradients pass unchanged
    Acc kept[Cell::saved > 0 ? Cell::saved : 1];
    FUSED_RNN_UNROLL
    for (int s = 0; s < Cell::saved; ++s) kept[s] = widen(kept_[s]);
    const Acc state = state_.value(p), before = live() ? before_.value(p) : Acc(0);
    Acc dh = dh_ + widen(dy_), carry, h = state, dc = dc_;
    Cell::template backward<Math>(kept, before, state, before, h, dh, dc, carry, d_);
    dh_ = live() ? carry : Acc(0);
    if (Cell::has_cell) dc_ = live() ? dc : Acc(0);
  }

  // Gradient g of the recurrent side, as it is stored and as the next product reads it.
  FUSED_RNN_DEVICE Storage recurrent(int g) const { return narrow<Storage>(d_[g]); }

  FUSED_RNN_DEVICE void store(const BackwardLoop& p, const TimeIndex& walk, int step) const {
    if (!at.inside) return;
    Storage* out = static_cast<Storage*>(p.dgates) + steps_size(p.steps, walk.time(step), kGradients) + at.in_step(p.steps, kGradients);
    // The recurrent side's G come last, so that either side's are G vectors in a row.
    FUSED_RNN_UNROLL
    for (int g = 0; g < kGradients; ++g) out[(g < G ? g + kGradients - G : g - G) * p.steps.H] = narrow<Storage>(d_[g]);
  }

  FUSED_RNN_DEVICE void finish(const BackwardLoop& p) const {
    if (!at.inside) return;
    static_cast<Acc*>(p.dh)[at.in_state(p.steps)] = dh_;
    if (Cell::has_cell) static_cast<Acc*>(p.dc)[at.in_state(p.steps)] = dc_;
  }

 private:
  // A state as it lies in memory: in the accumulation type or, narrower, in the storage type.
  class State {
   public:
    FUSED_RNN_DEVICE void load(const BackwardLoop& p, const void* from, int64_t i) {
      if (p.states_are_wide) bits_ = static_cast<const Bits*>(from)[i];
      else bits_ = static_cast<const StorageBits*>(from)[i];
    }
    FUSED_RNN_DEVICE Acc value(const BackwardLoop& p) const {
      Acc wide;
      Storage stored;
      const StorageBits low = StorageBits(bits_);
      memcpy(&wide, &bits_, sizeof(wide));
      memcpy(&stored, &low, sizeof(stored));
      return p.states_are_wide ? wide : Acc(widen(stored));
    }

   private:
    using Bits = UnsignedOf<sizeof(Acc)>;
    using StorageBits = UnsignedOf<sizeof(Storage)>;
    Bits bits_ = 0;
  };
  // The state entered the step that was fetched.
  FUSED_RNN_DEVICE bool live() const { return valid_ && reset_ == 0; }

  Acc dh_ = 0, dc_ = 0;
  State state_, before_;
  Acc d_[kGradients] = {};
  Storage dy_{}, kept_[Cell::saved > 0 ? Cell::saved : 1]{};
  int32_t reset_ = 0;
  bool valid_ = false;
  bool reaches_ = false;  // `live()` of the step that ran before, the one after in the recurrence's order
};

}  // namespace fused_rnn::cuda
