// Backward's exchange by reduce-scatter, for teams that are known when this is compiled (known_teams.h).
//
// Member m of C has units m U .. m U + U - 1, and of W_hh the rows of these units' gates: as A operand of a product its rows are all C U
// units of the step before, its depth G U are this member's gates. So a product needs the gradients of this member's own gates, and gives a
// partial sum for every unit. Each of its m tiles, 16 units x 8 rows of the batch, goes by st.async straight from the accumulators to the
// one member that owns these units, which adds the C partial sums. Gathering (gather.h) moves G numbers of a unit to each member, this
// moves one.
//
//   Tile    Lane 4 r + c has rows 2 r and 2 r + 1 of the product, columns 2 c and 2 c + 1: four sums. They go to slot
//           (r/2) 8 + 2 (c ^ r/2) + r%2 of 32, a packet: a quarter of a warp fills a row of 8 slots.
//   Packet  Where storage is bf16 so are the sums that are sent, for the link bounds a step: 8 bytes, and where a warp has two tiles of one
//           owner both of them, 16. Each sum is rounded once, to what torch rounds the whole gradient of h to; the owner adds in float.
//           Otherwise a tile's four floats, 16 bytes.
//   Owner   Warp 4 tile + c, lane 4 r + i has unit 2 r + i/2 of the tile and row 2 c + i%2 of the batch: sum i of that slot. For one c
//           the four rows' pieces lie in different banks, and a warp's units are 16 neighbours: whole sectors of memory.
//   Order   Packet j of warp w is the (w kPackets + j)-th from the next member's first one on: so at no time do all send to the same, and
//           the own ones come last, by st.async as well. An owner has partial sums by the distance of their sender, and adds them in that
//           order: the same from run to run.
//   Depth   k = G u + g: a unit's gates are neighbours.
//
// Why nothing is overwritten while it is read, and no phase is missed (turn n: the n-th product and what is sent of it):
//   * The copy n & 1 of the received sums: X sends turn n + 2 behind its wait for all of turn n + 1, this member's tiles among them; and
//     this member sends those behind the barrier of its threads that follows their sums of turn n.
//   * The copy n & 1 of the operand: written for turn n + 2 behind the barrier of turn n + 1, which each warp reaches behind its product of
//     turn n. One copy would not do: a warp may pass the wait for turn n while another one still multiplies.
//   * The mbarriers of copy n & 1, one a group (what all warps of all members send as their j-th packet): bytes of turn n + 2 cannot come
//     before all threads here have seen turn n, by the first point. They may come before they are expected: the arrival that is missing
//     keeps the phase open. So parity is enough. A group is expected again by a warp that has waited for it.
//   * No CTA exits while stores to it are on their way: all that is sent is waited for.
//   * A warp's own loads and stores of its cells are ordered by the barrier between put and product; the wait acquires for the CTA, and
//     what st.async wrote is there when it is counted (exchange.h). Sums of units outside the batch go nowhere.
#pragma once
#include "cta_rank.h"
#include "known_teams.h"
#include "weights.h"

namespace fused_rnn::cuda {

template <class Policy, int G, class Known>
class Scatter {
  using Operand = typename Policy::Operand;
  using Storage = typename Policy::Storage;

 public:
  static constexpr Tile kTile = tile(Policy::kPrecision, true, 1);

 private:
  static constexpr Team team = Known::team;
  static constexpr int C = team.members, U = team.units, H = C * U, NB = 8, kWarps = team.warps_m, kBlocks = team.blocks;
  static constexpr int kStride = operand_stride(team.depth, kTile);
  static constexpr bool kNarrow = Policy::kPrecision == Precision::bf16;
  using Sum = std::conditional_t<kNarrow, bf16, float>;  // as it is sent
  static constexpr int kTiles = H / 16 / kWarps;  // of a warp's product
  static constexpr int kJoined = kNarrow && kTiles > 1 && U > 16 ? 2 : 1;  // tiles of a packet
  static constexpr int kPackets = kTiles / kJoined, kOwned = U / 16 / kJoined;  // of a warp; of an owner, from each member
  static constexpr int kSlot = 4 * kJoined, kPacket = 32 * kSlot;  // sums
  static constexpr int kOwners = kPackets > kOwned ? kPackets / kOwned : 1;  // that a warp sends to, which are as many groups to wait for
  static constexpr int kSenders = C / kOwners;  // of a group, to a unit
  static constexpr int kGroupBytes = kWarps * kPacket * int(sizeof(Sum));
  // Independent sums of a tile; fewer where weights take half of the registers.
  static constexpr int kChains = kBlocks < 2 || kTiles * kBlocks == 16 ? 2 : 4;
  static_assert(Policy::kSums == 4 && kTile.rows == 16 && team.rows == NB && kTiles * kWarps * 16 == H && kOwners * kSenders == C);
  static_assert(kPackets % kOwned == 0 || kPackets == 1);

 public:
  static constexpr int kUnits = 1;
  struct Index {
    int b, u;
    bool inside;
  };
  Index index[1];

  // As Gather's.
  template <class Left>
  FUSED_RNN_DEVICE Scatter(const Team&, const CtaRank& me, const SharedLayout& at, const Workspace&, const Storage* w, int, bool resumes,
                           const Left& left)
      : operands_(shared_array<Operand>(at.operands, at.operands_count)),
        received_(reinterpret_cast<Sum*>(shared_array<float>(at.partial, at.partial_count))),
        barriers_(shared_array<uint64_t>(at.barriers, at.barriers_count)),
        member_(me.index),
        warp_(int(threadIdx.x) / 32),
        packets_(kept(kPackets)) {
    clear(operands_, at.operands_count);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2 * kPackets; ++i) barrier_init(&barriers_[i], 1);
      barrier_fence();
      for (int i = 0; i < 2 * kPackets; ++i) barrier_expect(&barriers_[i], kGroupBytes);
    }
    sync_threads();
    cluster_arrive();
    load(w);
    // Made anew: what is kept across the loads of the weights would be spilled.
    const int thread = renewed(int(threadIdx.x)), member = kept(int(blockIdx.x)) % C;
    warp_ = kept(thread / 32);
    const int r = thread % 32 / 4, c = thread % 4, slot = slot_of(r, c);
    FUSED_RNN_UNROLL
    for (int o = 0; o < kOwners; ++o) {
      const int x = warp_ * kPackets + o * kOwned;
      const unsigned owner = unsigned((member + 1 + x / kOwned) % C);
      to_[o] = remote(received_ + x * kPacket + slot * kSlot, owner);
      barrier_[o] = remote(barriers_ + o * kOwned % kPackets, owner);
    }
    // This thread's unit.
    const int tile = warp_ / 4 % (U / 16), packet = tile / kJoined, i = c;
    const int u = tile * 16 + 2 * r + i / 2, b = 2 * (warp_ % 4) + i % 2;
    index[0] = {b, u, warp_ < U * NB / 32};
    from_ = kept(packet * kPacket + slot_of(r, warp_ % 4) * kSlot + tile % kJoined * 4 + i);
    group_ = kept(packet % kPackets);
    put_ = kept(b * kStride + u * G);
    get_ = kept(r * kStride + Policy::depth(0));
    cluster_wait();
    if (!resumes) return;
    if (index[0].inside) {
      const Storage* from = left(b);
      Operand gates[G];
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) gates[g] = from ? Policy::operand(from[g * H + member * U + u]) : Operand{};
      put(0, gates);
    }
    send();
  }
  FUSED_RNN_DEVICE void open() const {}

  FUSED_RNN_DEVICE void receive() const {}
  FUSED_RNN_DEVICE void arrive() const {}

  // The gates of this thread's unit, for the next product.
  FUSED_RNN_DEVICE void put(int, const Operand (&gates)[G]) const {
    struct alignas(G % 2 ? sizeof(Operand) : G % 4 ? 2 * sizeof(Operand) : 4 * sizeof(Operand)) All {
      Operand of[G];
    } all;
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) all.of[g] = gates[g];
    *reinterpret_cast<All*>(operands_ + put_) = all;  // in one store, of two gates or four
  }

  // All units have been put: multiplies, and hands out the sums.
  FUSED_RNN_DEVICE void send() {
    sync_threads();
    uint4 operand[kBlocks];
    FUSED_RNN_UNROLL
    for (int k = 0; k < kBlocks; ++k) operand[k] = *reinterpret_cast<const uint4*>(operands_ + get_ + k * Policy::kDepth);
    FUSED_RNN_UNROLL
    for (int j = 0; j < kPackets; ++j) {
      if (j >= packets_) break;  // never: within one basic block ptxas puts the products of all tiles before the first store
      float sums[kJoined][4];
      FUSED_RNN_UNROLL
      for (int t = 0; t < kJoined; ++t) multiply(held_[j * kJoined + t], operand, sums[t]);
      const int o = j / kOwned, place = j % kOwned;
      store_async(to_[o] + place * kPacket * int(sizeof(Sum)), barrier_[o] + place % kPackets * 8, packed(sums));
    }
    sync_warp();  // keeps ptxas from putting what follows before the product
    const int apart = turn_ & 1 ? -1 : 1;  // the other copy lies behind this one, next time before it
    put_ += apart * NB * kStride;
    get_ += apart * NB * kStride;
    FUSED_RNN_UNROLL
    for (int o = 0; o < kOwners; ++o) to_[o] += apart * H * NB * int(sizeof(Sum)), barrier_[o] += apart * kPackets * 8;
    ++turn_;
  }

  // What the last product of all members gives for this thread's unit.
  FUSED_RNN_DEVICE float sum(int) {
    const unsigned parity = (turn_ - 1) / 2 & 1;
    float part[4] = {};
    FUSED_RNN_UNROLL
    for (int o = 0; o < kOwners; ++o) {
      barrier_wait(barriers_ + group_ + o * kOwned % kPackets, parity);
      float each[kSenders];
      FUSED_RNN_UNROLL
      for (int w = 0; w < kSenders; ++w) each[w] = to_float(received_[from_ + (w * kOwners + o) * kOwned * kPacket]);
      FUSED_RNN_UNROLL
      for (int w = 0; w < kSenders; ++w) part[w % 4] += each[w];
    }
    // The phase after next, by one warp of those that wait for a group.
    if (warp_ % (4 * kJoined) == 0 && lane() < kOwners && (kPackets >= kOwned || warp_ == 0))
      barrier_expect(barriers_ + group_ + lane() * kOwned, kGroupBytes);
    const int apart = turn_ & 1 ? 1 : -1;
    from_ += apart * H * NB;
    group_ += apart * kPackets;
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

 private:
  FUSED_RNN_DEVICE void load(const Storage* w) {
    FUSED_RNN_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      if (j >= packets_ * kJoined) break;  // never; a basic block for each
      const int x = warp_ * kTiles + j, unit = (member_ + 1 + x / (U / 16)) % C * U + x % (U / 16) * 16 + lane() / 4 * 2;
      FUSED_RNN_UNROLL
      for (int k = 0; k < kBlocks; ++k) {
        const int first = k * Policy::kDepth + Policy::depth(0);
        FUSED_RNN_UNROLL
        for (int n = 0; n < 2; ++n) {
          const auto v = Quad<Policy>::gather([&](int i) {
            const int at = first + i;
            return at < G * U ? w[int64_t(at % G * H + member_ * U + at / G) * H + unit + n] : Storage{};
          });
          memcpy(held_[j][k] + 4 * n, &v, sizeof(v));
        }
        sync_warp();  // keeps the compiler from making the addresses of all blocks first, and spilling them
      }
    }
  }

  // A tile's four sums, of the lane.
  FUSED_RNN_DEVICE static void multiply(const uint32_t (&weights)[kBlocks][8], const uint4 (&operand)[kBlocks], float (&result)[4]) {
    float sums[kChains][1][4] = {};
    FUSED_RNN_UNROLL
    for (int k = 0; k < kBlocks; ++k)
      Policy::template multiply<1>(sums[2 * k % kChains], sums[(2 * k + 1) % kChains],
                                   reinterpret_cast<const uint32_t (&)[1][8]>(weights[k]), operand[k]);
    FUSED_RNN_UNROLL
    for (int width = kChains / 2; width; width /= 2) FUSED_RNN_UNROLL
    for (int h = 0; h < width; ++h) FUSED_RNN_UNROLL
    for (int n = 0; n < 4; ++n) sums[h][0][n] += sums[h + width][0][n];
    FUSED_RNN_UNROLL
    for (int n = 0; n < 4; ++n) result[n] = sums[0][0][n];
  }

  // A slot of a packet.
  FUSED_RNN_DEVICE static auto packed(const float (&sums)[kJoined][4]) {
    const float (&s)[4] = sums[0], (&t)[4] = sums[kJoined - 1];
    if constexpr (!kNarrow) return uint4{as_bits(s[0]), as_bits(s[1]), as_bits(s[2]), as_bits(s[3])};
    else if constexpr (kJoined == 1) return uint2{pack<bf16>(s[0], s[1]), pack<bf16>(s[2], s[3])};
    else return uint4{pack<bf16>(s[0], s[1]), pack<bf16>(s[2], s[3]), pack<bf16>(t[0], t[1]), pack<bf16>(t[2], t[3])};
  }

  FUSED_RNN_DEVICE static int slot_of(int r, int c) { return r / 2 * 8 + (c ^ r / 2) * 2 + r % 2; }

  Operand* operands_;
  Sum* received_;
  uint64_t* barriers_;
  int put_, get_, from_, group_;  // in these, the copy of this turn
  Remote to_[kOwners], barrier_[kOwners];
  int member_, warp_, packets_;
  unsigned turn_ = 0;
  uint32_t held_[kTiles][kBlocks][8];
};

}  // namespace fused_rnn::cuda
