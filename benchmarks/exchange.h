// The exchange of a team between two steps and nothing else: what a step cannot go below, whatever its loop does beside.
//
// In each round every member tells each other member a number and goes on when it knows all of theirs: next = max(own, theirs) + 1, so that
// no round can begin before the last has ended. The least that such a round takes is one warp a member and a word a pair:
//
//   cta      the members are the warps of one CTA: shared memory and its barrier
//   cluster  thread-block cluster: st.async into the peers' shared memory, which counts towards their mbarrier
//   grid     any CTAs: words in global memory, then a counter for the whole team, with release and acquire
//   flags    any CTAs: a counter for each member, on which all others look; the count itself is what it tells
//   slices   cluster, with as many bytes as a real operand has: every member sends its slice to each of the others. A warp's store goes
//            to one peer or to several of them, and what a peer gets lies in one piece there or in several: which says what the network
//            between multiprocessors makes of that.
#pragma once
#include "../csrc/cuda/primitives/barrier.h"
#include "../csrc/cuda/primitives/copy.h"
#include "../csrc/cuda/primitives/flags.h"

namespace fused_rnn::exchange {

using namespace fused_rnn::cuda;

enum Kind : int { cta, cluster, grid, flags, slices };

constexpr int kWarp = 32, kMost = 128;  // members
constexpr int kApart = 8;  // counters lie 32 bytes apart, in sectors of their own
// Shared memory: the words of two rounds, two mbarriers.
constexpr int kWords = 2 * kMost * 4, kShared = kWords * 4 + 2 * kSharedGap + 16;
// Slices: two mbarriers, the words of two rounds, at most so many bytes of each member.
constexpr int kApartInPieces = 16;
constexpr int slice_size(int bytes, int piece) { return bytes + bytes / piece * kApartInPieces; }
constexpr int kSenders = 8, kLargestSlice = 2048, kSliceBarriers = 16 + kSharedGap;  // warps; bytes
// Global memory, zeros before the launch: one counter of the team and one of each member; the words of two rounds, 16 bytes each.
constexpr int kCounters = (1 + kMost) * kApart, kGlobalWords = 2 * kMost * 4;

constexpr uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

FUSED_RNN_DEVICE void rounds_of_a_cta(uint32_t* words, int rounds, uint32_t* result) {
  const int tid = int(threadIdx.x), size = int(blockDim.x);
  uint32_t own = uint32_t(tid);
  for (int s = 0; s < rounds; ++s) {
    uint32_t* round = words + (s & 1) * kMost * 4;
    round[tid] = own;
    sync_threads();
    own = larger(own, round[(tid + kWarp) % size]) + 1;
  }
  result[tid] = own;
}

// Lane i deals with the member i + 1 after this one.
FUSED_RNN_DEVICE void rounds_of_a_cluster(uint32_t* words, uint64_t* barriers, int members, int rounds, uint32_t* result) {
  const int rank = int(cluster_rank()), lane = int(threadIdx.x), peer = (rank + 1 + lane) % members;
  const bool speaks = lane < members - 1;
  const int bytes = 16 * (members - 1);
  if (lane == 0) {
    for (int n = 0; n < 2; ++n) barrier_init(&barriers[n], 1);
    barrier_fence();
    for (int n = 0; n < 2; ++n) barrier_expect(&barriers[n], bytes);
  }
  sync_warp();
  cluster_arrive();
  cluster_wait();
  uint32_t own = uint32_t(rank);
  for (int s = 0; s < rounds; ++s) {
    uint32_t* round = words + (s & 1) * kMost * 4;
    uint64_t* barrier = &barriers[s & 1];
    if (speaks) store_async(remote(round + rank * 4, unsigned(peer)), remote(barrier, unsigned(peer)), uint4{own, own, own, own});
    barrier_wait(barrier, unsigned(s / 2) & 1);
    if (lane == 0 && s + 2 < rounds) barrier_expect(barrier, bytes);
    sync_warp();  // all lanes know that the phase is over, and thread 0 expects the next, before any peer is told to go on
    if (speaks) own = larger(own, round[peer * 4]) + 1;
  }
  cluster_arrive();
  cluster_wait();  // a peer may still store here
  if (speaks) result[rank * kWarp + lane] = own;
}

FUSED_RNN_DEVICE void rounds_of_a_grid(uint32_t* words, uint32_t* counter, uint32_t* global, int members, int rounds, uint32_t* result) {
  const int rank = int(blockIdx.x), lane = int(threadIdx.x);
  uint32_t own = uint32_t(rank);
  for (int s = 0; s < rounds; ++s) {
    uint32_t* round = global + (s & 1) * kMost * 4;
    if (lane == 0) {
      store_global(reinterpret_cast<uint4*>(round + rank * 4), uint4{own, own, own, own});
      add_release(counter, 1);
      const SpinTimeout patience;
      while (load_acquire(counter) < uint32_t(s + 1) * uint32_t(members)) {
        patience.spend("2 s for the members of the team");
        pause();
      }
    }
    sync_warp();
    for (int m = lane; m < members; m += kWarp) copy_async16(words + m * 4, round + m * 4, true);
    copy_commit();
    copy_wait<0>();
    sync_warp();
    uint32_t most = 0;
    for (int m = lane; m < members; m += kWarp) most = larger(most, words[m * 4]);
    own = larger(own, most) + 1;
    sync_warp();  // before the words are overwritten
  }
  result[rank * kWarp + lane] = lane == 0 ? own : 0;
}

FUSED_RNN_DEVICE void rounds_of_flags(uint32_t* counters, int members, int rounds, uint32_t* result) {
  const int rank = int(blockIdx.x), lane = int(threadIdx.x);
  uint32_t seen = 0;
  for (int s = 0; s < rounds; ++s) {
    if (lane == 0) add_release(counters + rank * kApart, 1);
    for (int m = lane; m < members; m += kWarp) {
      const SpinTimeout patience;
      while ((seen = load_acquire(counters + m * kApart)) < uint32_t(s + 1)) {
        patience.spend("2 s for the members of the team");
        pause();
      }
    }
    sync_warp();
  }
  result[rank * kWarp + lane] = seen;
}

// A slice is `bytes` long, a multiple of 512; a store of a warp goes to `peers` of the others, a power of two up to 32. Its pieces of
// `piece` bytes lie kApartInPieces bytes further from each other than need be.
FUSED_RNN_DEVICE void rounds_of_slices(char* words, uint64_t* barriers, int members, int rounds, int bytes, int peers, int piece,
                                       uint32_t* result) {
  const int rank = int(cluster_rank()), tid = int(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp, others = members - 1;
  const int width = kWarp / peers, per_slice = bytes / 16 / width;  // 16-byte chunks of a peer in a store; stores until all have theirs
  const int stores = (others + peers - 1) / peers * per_slice;
  if (tid == 0) {
    for (int n = 0; n < 2; ++n) barrier_init(&barriers[n], 1);
    barrier_fence();
    for (int n = 0; n < 2; ++n) barrier_expect(&barriers[n], others * bytes);
  }
  sync_threads();
  cluster_arrive();
  cluster_wait();
  uint32_t right = 0;
  const int size = slice_size(bytes, piece);
  const auto at = [&](int chunk) { return chunk * 16 + chunk * 16 / piece * kApartInPieces; };
  for (int s = 0; s < rounds; ++s) {
    char* round = words + (s & 1) * members * size;
    uint64_t* barrier = &barriers[s & 1];
    const uint32_t told = uint32_t(s + 1);
    for (int i = warp; i < stores; i += kSenders) {
      const int after = i / per_slice * peers + lane / width, chunk = i % per_slice * width + lane % width;
      if (after >= others) continue;
      const unsigned peer = unsigned((rank + 1 + after) % members);
      store_async(remote(round + rank * size + at(chunk), peer), remote(barrier, peer), uint4{told, told, told, told});
    }
    barrier_wait(barrier, unsigned(s / 2) & 1);
    if (tid == 0 && s + 2 < rounds) barrier_expect(barrier, others * bytes);
    const char* theirs = round + (rank + 1 + tid % others) % members * size + at(tid / others % (bytes / 16));
    right += *reinterpret_cast<const uint32_t*>(theirs) == told;
    sync_threads();  // all have read, and thread 0 expects the next, before any peer is told to go on
  }
  cluster_arrive();
  cluster_wait();  // a peer may still store here
  if (warp == 0) result[rank * kWarp + lane] = right;
}

struct Exchange {
  Kind kind;
  int members, rounds;
  uint32_t* counters;  // [kCounters], zeros
  uint32_t* global;  // [kGlobalWords]
  uint32_t* result;  // of each thread of the first warp, what it knows in the end
  int bytes = 0, peers = 1, piece = 512;  // slices
};

constexpr int slices_shared(const Exchange& p) { return kSliceBarriers + 2 * p.members * slice_size(p.bytes, p.piece); }

FUSED_RNN_DEVICE void run(const Exchange& p) {
  if (p.kind == slices) {
    uint64_t* barriers = shared_array<uint64_t>(0, 2);
    char* words = shared_array<char>(kSliceBarriers, slices_shared(p) - kSliceBarriers);
    return rounds_of_slices(words, barriers, p.members, p.rounds, p.bytes, p.peers, p.piece, p.result);
  }
  uint32_t* words = shared_array<uint32_t>(0, kWords);
  uint64_t* barriers = shared_array<uint64_t>(kWords * 4 + kSharedGap, 2);
  if (p.kind == cta) rounds_of_a_cta(words, p.rounds, p.result);
  if (p.kind == cluster) rounds_of_a_cluster(words, barriers, p.members, p.rounds, p.result);
  if (p.kind == grid) rounds_of_a_grid(words, p.counters, p.global, p.members, p.rounds, p.result);
  if (p.kind == flags) rounds_of_flags(p.counters + kApart, p.members, p.rounds, p.result);
}

// The CTAs and threads of a launch; what thread `lane` of member `rank` knows after so many rounds, 0 where it says nothing.
inline int ctas(const Exchange& p) { return p.kind == cta ? 1 : p.members; }
inline int threads(const Exchange& p) { return p.kind == cta ? kWarp * p.members : p.kind == slices ? kWarp * kSenders : kWarp; }
inline uint32_t expected(const Exchange& p, int rank, int lane) {
  const int last = p.members - 1;
  const uint32_t rounds = uint32_t(p.rounds);
  switch (p.kind) {
    case cta: return uint32_t(last * kWarp + lane) + rounds;  // a number travels a warp a round: from `last` rounds on
    case cluster: return lane < last ? larger(uint32_t(rank), uint32_t((rank + 1 + lane) % p.members)) + rounds : 0;
    case grid: return lane == 0 ? larger(uint32_t(rank), uint32_t(last / kWarp * kWarp)) + rounds : 0;  // lane 0 speaks, and hears these
    case slices: return rounds;
    default: return lane < p.members ? rounds : 0;
  }
}

}  // namespace fused_rnn::exchange
