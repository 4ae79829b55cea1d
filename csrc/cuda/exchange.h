// How the members of a team share the operand of the next product, in one of three ways; scatter.h and direct.h have others. Which is the
// same for a whole launch, so a general kernel has all three: the branch costs two instructions a step, and there are a third as many
// kernels.
//
// A member hands its slice of the next operand to `put`, unit by unit, and to `publish` and `send`, warp by warp. `arrive` ends its step.
// `wait` makes the whole operand visible in its own shared memory.
//
//   cta      One copy of the operand. `arrive` is a barrier of the threads: behind it all have put. The barrier between product and
//            units is the other half: behind it all have read, and the units may put into the copy that was read.
//
//   cluster  Two copies of the operand; steps alternate between them. Each 16-byte chunk goes by st.async into every peer's copy and counts
//            there towards the transaction count of an mbarrier. There are two of these, one for each copy.
//            - Nothing is overwritten that is still read. A peer writes copy (s + 1) & 1 when it sends at step s. Before that it has
//              waited for what this member sent at step s - 1. This member sent that after a barrier of its threads behind its product of
//              step s - 1, which was the last to read that copy. The loads of that product had returned: the sums made from them
//              went into what was sent.
//            - No phase is missed. For the phase after next to complete, the peers need what this member sends in the next step, and all
//              of its threads have seen this phase before that. So the parity of a phase is enough to wait for it.
//            - Bytes may arrive before thread 0 expects them. The transaction count is negative for a while then, and the phase cannot
//              complete, since thread 0 has not arrived at it.
//            - st.async and the loads and stores here belong to one proxy, the generic one: no fence.proxy.async is needed.
//            - The wait acquires for the CTA only. The bytes and the barrier that counts them lie in the waiter's own shared memory, which
//              has no cache in front of it. st.async counts bytes once they are there, so loads behind the wait find them. CUTLASS
//              waits in the same way for multicast copies and for peers' shared memory. No other memory passes between members here.
//            - No CTA exits while a store to its shared memory is on its way: all that is sent is waited for.
//
//   grid     Two copies of the operand in global memory. `put` writes to them. `arrive` is a barrier of the CTA, behind which one thread
//            counts the member in with release. In `wait` one thread looks with acquire until all members are counted. Behind a barrier
//            the CTA then copies the operand to its shared memory by cp.async, which reads L2, where other CTAs' writes are. The barriers
//            make the other threads' writes and copies part of the order that release and acquire establish. Nothing is overwritten that
//            is still read, by the first argument above.
#pragma once
#include "primitives/barrier.h"
#include "primitives/copy.h"
#include "primitives/flags.h"
#include "product.h"

namespace fused_rnn::cuda {

// On the grid members are counted: each one of them, once a step, behind a barrier of its threads;
FUSED_RNN_DEVICE void count_in(uint32_t* arrived) {
  if (threadIdx.x == 0) add_release(arrived, 1);
}
// and all, before what they have put is read.
FUSED_RNN_DEVICE void wait_for(const uint32_t* arrived, uint32_t count) {
  if (threadIdx.x == 0) {
    const SpinTimeout timeout;
    while (load_acquire(arrived) < count) {
      timeout.spend("2 s for the members of the team to be counted in");
      pause();
    }
  }
  sync_threads();
}

template <class Policy, bool kBackward, bool kKnown = false>
class Exchange {
  using Operand = typename Policy::Operand;
  static constexpr int kChunk = 16 / int(sizeof(Operand));  // elements of 16 bytes
  static constexpr int kChunks = 32 / kChunk;  // of a warp's 32 units
  static constexpr int kPeers = (kLargestCluster - 1 + kChunk - 1) / kChunk;  // that a lane sends a chunk to, at most

 public:
  // operands: one of NB rows in shared memory, cluster exchange two, zero-filled; barriers: two in shared memory.
  FUSED_RNN_DEVICE Exchange(const Team& team, const Workspace& workspace, Operand* operands, uint64_t* barriers, int team_index, int teams,
                            int member)
      : team_(team),
        operands_(operands),
        barriers_(barriers),
        thread_(kKnown ? kept(int(threadIdx.x)) : 0),
        member_(member),
        stride_(operand_stride(team.depth, tile(Policy::kPrecision, kBackward, 1))),
        bytes_((team.members - 1) * team.rows * (team.depth / team.members) * int(sizeof(Operand))) {
    if (team.exchange == ExchangeKind::grid) {
      const int64_t size = int64_t(team.rows) * team.depth;
      global_ = static_cast<Operand*>(workspace.operand) + team_index * size;
      copies_apart_ = teams * size;
      arrived_ = workspace.arrived + team_index * 32;
    }
    if (team.exchange == ExchangeKind::cluster && threadIdx.x == 0) {
      barrier_init(&barriers_[0], 1);
      barrier_init(&barriers_[1], 1);
      barrier_fence();
      expect(0);
      expect(1);
    }
  }

  // Both copies are cleared, the barriers are there: peers may write. Called behind a barrier of the threads.
  FUSED_RNN_DEVICE void invite() const {
    if (team_.exchange == ExchangeKind::cluster) cluster_arrive();
  }
  // So have all peers; and the first operand is whole.
  FUSED_RNN_DEVICE void open() const {
    if (team_.exchange == ExchangeKind::cluster) cluster_wait();
    sync_threads();
  }

  FUSED_RNN_DEVICE Operand* current() const { return copy(turn_); }
  FUSED_RNN_DEVICE int stride() const { return stride_; }

  // Of a row of the batch so many numbers, in columns `apart` from each other.
  template <int kCount>
  FUSED_RNN_DEVICE void put(int b, int column, int apart, const Operand (&values)[kCount]) const {
    const bool grid = team_.exchange == ExchangeKind::grid;
    if (grid) {
      Operand* to = global_ + ((turn_ + 1) & 1) * copies_apart_ + int64_t(b) * team_.depth + column;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kCount; ++i) to[i * apart] = values[i];
    } else {
      Operand* to = copy(turn_ + 1) + b * stride_ + column;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kCount; ++i) to[i * apart] = values[i];
    }
  }

  // Of a warp's 32 elements from `element` on, where the chunk lies that this lane sends, its column counted from that of unit 0; negative
  // where there is none. element = b U + u.
  FUSED_RNN_DEVICE int chunk_of(int element) const {
    const int mine = element + lane() % kChunks * kChunk, b = mine / team_.units;
    return b < team_.rows ? b * stride_ + mine % team_.units : -1;
  }

  // The warp's units have put all that they have to put.
  FUSED_RNN_DEVICE void publish() const {
    if (team_.exchange == ExchangeKind::cluster) sync_warp();
  }
  // Then it hands 32 of them to the team, or of each of so many slices, `apart` from each other: columns from column0 on.
  template <int kSlices>
  FUSED_RNN_DEVICE void send(int chunk, int column0, int apart) const {
    if (team_.exchange != ExchangeKind::cluster || chunk < 0) return;
    const Operand* own = copy(turn_ + 1) + chunk + column0;
    uint4 values[kSlices];
    FUSED_RNN_UNROLL
    for (int s = 0; s < kSlices; ++s) values[s] = *reinterpret_cast<const uint4*>(own + s * apart);
    FUSED_RNN_UNROLL
    for (int n = 0; n < kPeers; ++n) {
      const int i = lane() / kChunks + n * kChunk, after = member_ + 1 + i;
      if (i >= team_.members - 1) break;
      const unsigned peer = unsigned(after < team_.members ? after : after - team_.members);
      const Remote barrier = remote(&barriers_[(turn_ + 1) & 1], peer);
      FUSED_RNN_UNROLL
      for (int s = 0; s < kSlices; ++s) store_async(remote(own + s * apart, peer), barrier, values[s]);
    }
  }

  // This member's step is over: its slice is out, its threads are done with the operand and with the partial sums.
  FUSED_RNN_DEVICE void arrive() {
    sync_threads();
    if (team_.exchange == ExchangeKind::grid) count_in(arrived_);
    ++turn_;
  }

  // The operand of this turn is whole; called by all threads before its product.
  FUSED_RNN_DEVICE void wait() const {
    if (turn_ == 0) return;  // the first is loaded by each member for itself
    if (team_.exchange == ExchangeKind::cluster) {
      uint64_t* barrier = &barriers_[turn_ & 1];
      barrier_wait(barrier, (turn_ - 1) / 2 & 1);
      if ((kKnown ? thread_ : int(threadIdx.x)) == 0) expect(turn_ & 1);
    } else if (team_.exchange == ExchangeKind::grid) {
      wait_for(arrived_, turn_ * uint32_t(team_.members));
      for (int b = int(threadIdx.x) / 32; b < team_.rows; b += int(blockDim.x) / 32) {
        const Operand* from = global_ + (turn_ & 1) * copies_apart_ + int64_t(b) * team_.depth;
        for (int column = lane() * kChunk; column < team_.depth; column += 32 * kChunk)
          copy_async16(current() + b * stride_ + column, from + column, true);
      }
      copy_commit();
      copy_wait<0>();
      sync_threads();
    }
  }

 private:
  FUSED_RNN_DEVICE Operand* copy(unsigned turn) const {
    return team_.exchange == ExchangeKind::cluster ? operands_ + int(turn & 1) * team_.rows * stride_ : operands_;
  }
  FUSED_RNN_DEVICE void expect(int copy) const { barrier_expect(&barriers_[copy], bytes_); }

  const Team& team_;
  Operand* operands_;
  uint64_t* barriers_;
  Operand* global_ = nullptr;
  int64_t copies_apart_ = 0;
  uint32_t* arrived_ = nullptr;
  int thread_, member_, stride_;
  int bytes_;  // that the peers send for one operand
  unsigned turn_ = 0;
};

}  // namespace fused_rnn::cuda
