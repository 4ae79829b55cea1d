// Sums and variances over all units of a row, between two stages of a step: the same bits in all members, in every run.
//
// Each 16 lanes hold 16 units of one row, since a member's units are a multiple of 16. They reduce their numbers by shuffles to a pair: a
// sum, or two of them; or the mean and the sum of squared deviations from it. Units beyond H are left out. Every member gets the pairs of
// all, in the order of the units, and each thread merges those of its row in that order: sums by adding; variances by Chan's formula for
// many parts, sum M2_i + n_i (mean_i - mean)^2, in which nothing cancels.
//
// How the pairs travel, turn by turn:
//   cta      To slots in shared memory, of which turns have two copies in turn. A barrier of the threads stands between writing and
//   reading.
//            Copy n & 1 is written for turn n + 2 behind the barrier of turn n + 1, at which a thread arrives when it has read turn n.
//   cluster  Lane i of the 16 sends the pair to member i, itself included, by st.async into copy n & 1 of the slots, which counts it there
//            towards mbarrier n & 1. Thread 0 arrives at that one when it sends, with the bytes of this turn, which differ from stage to
//            stage; bytes that come before that make its count negative, and the phase waits.
//            - Nothing is overwritten that is still read. What is sent for turn n + 2 is sent by a warp that has waited for turn n + 1;
//            that
//              phase needs the pairs of every warp with units of every member, which each of them sent behind its loads of turn n.
//              sync_warp orders these before the store, for all lanes.
//            - No phase is missed: that of turn n + 2 needs what each warp with units sends when it has seen turn n. So its parity is
//            enough for those; a warp without units, which no phase waits for, waits for none.
//            - Which proxies and scopes: as in exchange.h. No CTA exits while pairs are on their way to it, since it waits for all of them.
//   grid     To one of two copies in global memory; members are counted in and waited for as in exchange.h, and the pairs copied to shared
//            memory by cp.async, which reads L2. Nothing is overwritten that is still read: a member writes for turn n + 2 when it has
//            waited for all members' turn n + 1, in which each was counted in behind a barrier of its threads, behind its copy of turn n.
//            The slots are written behind that barrier, too.
#pragma once
#include "cta_rank.h"

namespace fused_rnn::cuda {

// Of 16 neighbouring lanes; each gets the same bits, since a + b is b + a.
FUSED_RNN_DEVICE float sum_of_16(float value) {
  FUSED_RNN_UNROLL
  for (int mask = 8; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

class Reduction {
 public:
  // pairs: the most of a turn.  slots, barriers: in shared memory.
  FUSED_RNN_DEVICE Reduction(const Team& team, const Workspace& workspace, float2* slots, uint64_t* barriers, const CtaRank& me, int width,
                             int pairs)
      : team_(team), slots_(slots), barriers_(barriers), count_(reduced(team)), width_(width), first_u_(me.first_u) {
    copy_ = team.rows * pairs * count_;
    if (team.exchange == ExchangeKind::grid) {
      global_ = static_cast<float2*>(workspace.operand) + me.team * copy_;
      copies_apart_ = me.teams * copy_;
      arrived_ = workspace.arrived + me.team * 32;
    }
    if (team.exchange == ExchangeKind::cluster && threadIdx.x == 0) {
      barrier_init(&barriers_[0], 1);
      barrier_init(&barriers_[1], 1);
      barrier_fence();
    }
  }

  // A turn begins, of so many pairs a row.
  FUSED_RNN_DEVICE void begin(int pairs) {
    renew(count_);  // the places of all pairs, kept from step to step, would take the registers that the weights need
    if (team_.exchange == ExchangeKind::cluster && threadIdx.x == 0)
      barrier_expect(&barriers_[turn_ & 1], team_.members * (team_.units / 16) * team_.rows * pairs * 8);
    sync_warp();
  }

  FUSED_RNN_DEVICE float sum(const ThreadUnit& unit, float value) const { return sum_of_16(counts(unit) ? value : 0); }
  // The mean of 16 units and the sum of the squares of what differs from it.
  FUSED_RNN_DEVICE float2 spread(const ThreadUnit& unit, float value) const {
    const int n = units_in((first_u_ + unit.u) / 16);
    const float mean = n > 0 ? sum(unit, value) / float(n) : sum(unit, value), off = value - mean;
    return {mean, sum(unit, off * off)};
  }

  // Pair i of the unit's row, of its 16 units; by all of a warp's lanes.
  FUSED_RNN_DEVICE void send(const ThreadUnit& unit, int i, int pairs, float2 pair) const {
    const int place = (unit.b * pairs + i) * count_ + (first_u_ + unit.u) / 16, to = lane() % 16;
    if (team_.exchange == ExchangeKind::cluster) {
      uint2 bits;
      memcpy(&bits, &pair, sizeof(bits));
      if (to < team_.members) store_async(remote(slots() + place, unsigned(to)), remote(&barriers_[turn_ & 1], unsigned(to)), bits);
    } else if (to == 0) {
      (team_.exchange == ExchangeKind::grid ? global_ + int(turn_ & 1) * copies_apart_ : slots())[place] = pair;
    }
  }

  // All pairs of the turn are there; called by all threads, those without units included. reads: whether the warp has units.
  FUSED_RNN_DEVICE void wait(int pairs, bool reads) const {
    if (team_.exchange == ExchangeKind::cluster) {
      if (reads) barrier_wait(&barriers_[turn_ & 1], turn_ / 2 & 1);
      return;
    }
    sync_threads();
    if (team_.exchange != ExchangeKind::grid) return;
    count_in(arrived_);
    wait_for(arrived_, (turn_ + 1) * uint32_t(team_.members));
    const float2* from = global_ + int(turn_ & 1) * copies_apart_;
    for (int i = 2 * int(threadIdx.x); i < team_.rows * pairs * count_; i += 2 * int(blockDim.x)) copy_async16(slots_ + i, from + i, true);
    copy_commit();
    copy_wait<0>();
    sync_threads();
  }

  // Of the unit's row: of the first or the second numbers of its pairs i.
  FUSED_RNN_DEVICE float total(const ThreadUnit& unit, int i, int pairs, bool second) const {
    const float2* of = row(unit, i, pairs);
    return added([&](int k) { return second ? of[k].y : of[k].x; });
  }
  FUSED_RNN_DEVICE float variance(const ThreadUnit& unit, int i, int pairs) const {
    const float2* of = row(unit, i, pairs);
    const float mean = added([&](int k) { return float(units_in(k)) * of[k].x; }) / float(width_);
    return added([&](int k) {
             const float2 part = of[k];
             const float off = part.x - mean;
             return part.y + float(units_in(k)) * off * off;
           }) /
           float(width_);
  }
  FUSED_RNN_DEVICE void end() { ++turn_; }

 private:
  FUSED_RNN_DEVICE bool counts(const ThreadUnit& unit) const { return first_u_ + unit.u < width_; }
  // Of the k-th 16 units those that there are.
  FUSED_RNN_DEVICE int units_in(int k) const { return width_ - 16 * k < 16 ? width_ - 16 * k : 16; }
  FUSED_RNN_DEVICE float2* slots() const { return slots_ + (team_.exchange == ExchangeKind::grid ? 0 : int(turn_ & 1) * copy_); }
  FUSED_RNN_DEVICE const float2* row(const ThreadUnit& unit, int i, int pairs) const { return slots() + (unit.b * pairs + i) * count_; }

  // In four sums, which take turns.
  template <class Part>
  FUSED_RNN_DEVICE float added(const Part& part) const {
    float sums[4] = {};
    const int count = ceil_div(width_, 16);
    FUSED_RNN_UNROLL_BY(1)
    for (int k = 0; k + 4 <= count; k += 4) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] += part(k + i);
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < 3; ++i)
      if (count / 4 * 4 + i < count) sums[i] += part(count / 4 * 4 + i);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  const Team& team_;
  float2 *slots_, *global_ = nullptr;
  uint64_t* barriers_;
  uint32_t* arrived_ = nullptr;
  int count_, copy_, copies_apart_ = 0, width_, first_u_;
  unsigned turn_ = 0;
};

}  // namespace fused_rnn::cuda
