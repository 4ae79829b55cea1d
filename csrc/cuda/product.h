// The product of one step:  partial[share][row of the batch][row] = weights [rows x K] times the operand [NB x K].
//
// Warps stand in WM groups of MT m tiles; the WK warps of a group share the depth, and each leaves a sum of its own, which
// the units' threads add up. Warps beyond WM x WK have units only. A warp's weights stay with it for all of time: the first KR blocks in
// registers, of most known teams all, the rest in shared memory in the order in which its lanes read them.
#pragma once
#include "known_teams.h"
#include "primitives/barrier.h"
#include "primitives/flags.h"
#include "weights.h"

namespace fused_rnn::cuda {

template <class Policy, bool kBackward, int NT, class Known = AnyTeam>
class Product {
  using Operand = typename Policy::Operand;
  using Fragment = typename Policy::Fragment;
  static constexpr Tile kTile = Known::own      ? own_tile(Policy::kPrecision)
                                : Known::direct ? direct_tile(Policy::kPrecision, Known::units)
                                                : tile(Policy::kPrecision, kBackward, NT, kFewerBlocks, Policy::kNarrow);
  static constexpr int kBlocks = Known::blocks;  // of each warp; 0 where that is not known
  static constexpr int MT = kTile.mt, KR = kTile.kr, kHeld = Known::held ? Known::held : KR;
  static constexpr int kQuads = Policy::kRegisters / 4, kVectors = MT * Policy::kKept / 4;  // of a block, the latter as it is kept
  static constexpr int kChains = chains(kTile, NT);
  // Backward's FMA lanes with 16 rows have no register to spare: LSTM's and GRU's spilled on sm_100 and sm_120. So there they ask for the
  // weights of one block at a time, and keep no offsets from step to step. Elsewhere that would only make them slower.
  static constexpr bool kTight = (kIsBlackwell && Policy::kPrecision == Precision::ieee && kBackward && NT == 2) || KR == 0;
  static constexpr int kAhead = kTight ? 1 : 2;
  static constexpr int kMostOnTheWay = 8;  // fragments of an operand in global memory, of a lane
  using Sums = float[kChains][NT][MT][Policy::kSums];
  using Kept = uint32_t[MT][Policy::kKept];  // a block's weights
  // A known team that has the registers for wide weights widens narrow ones when it loads them, not in each step.
  static constexpr bool kWidensOnce = kBlocks > 0 && MT* kBlocks <= kMostFragments;
  using Held = uint32_t[MT][kWidensOnce ? Policy::kRegisters : Policy::kKept];
  static_assert(kTile.rows == Policy::kRows && kTile.depth == Policy::kDepth && kTile.registers == Policy::kRegisters &&
                    kTile.kept == Policy::kKept,
                "tiles.h and precision.h");

 public:
  // rest: this CTA's shared memory for what the registers do not hold.
  template <class Weights>
  FUSED_RNN_DEVICE Product(const Team& team, uint4* rest, const Weights& weights)
      : group_(int(threadIdx.x) / 32 % team.warps_m), share_(int(threadIdx.x) / 32 / team.warps_m) {
    const int all = share_ < team.warps_k ? (team.depth + Policy::kDepth - 1) / Policy::kDepth : 0;
    first_ = share_ * team.blocks;
    count_ = first_ + team.blocks <= all ? team.blocks : first_ < all ? all - first_ : 0;
    rest_ = rest + int(threadIdx.x) / 32 * shared_blocks(team, kTile) * (kVectors * 32) + lane();
    if (count_ == 0) return;
    if (weights.aligned) load(weights);
    else fill(weights);
  }

  FUSED_RNN_DEVICE void run(const Team& team, const Operand* operand, float* partial) const {
    if (Known::some_idle && share_ >= team.warps_k) return;
    int stride = operand_stride(team.depth, kTile);
    if (kTight) renew(stride);
    operand += first_ * Policy::kDepth;
    Sums sums = {};
    multiply_held<0, kHeld>(sums, operand, stride);
    FUSED_RNN_UNROLL_BY(kAhead)
    for (int i = kHeld; i < count(); ++i) {
      Kept kept;
      fetch(kept, i - kHeld);
      Fragment b[NT];
      read(b, operand + i * Policy::kDepth, stride);
      multiply(0, sums, kept, b);
    }
    leave(team, sums, partial);
  }

  // Likewise of a known team, the operand in global memory: of each block this lane reads its fragments as they lie there, so many blocks
  // ahead that the way from L2 passes behind the products of those before.
  FUSED_RNN_DEVICE void run_directly(const Team& team, const uint4* operand, float* partial) const {
    if (Known::some_idle && share_ >= team.warps_k) return;
    constexpr int kOnTheWay = kBlocks < kMostOnTheWay / NT ? kBlocks : kMostOnTheWay / NT;
    operand += first_ * NT * 32 + lane();
    Fragment b[kOnTheWay][NT];
    const auto ask = [&](int i) {
      FUSED_RNN_UNROLL
      for (int n = 0; n < NT; ++n) b[i % kOnTheWay][n] = load_relaxed(operand + (i * NT + n) * 32);
    };
    FUSED_RNN_UNROLL
    for (int i = 0; i < kOnTheWay; ++i) ask(i);
    Sums sums = {};
    FUSED_RNN_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      if (i < kHeld) {
        multiply(i, sums, held_[i < kHeld ? i : 0], b[i % kOnTheWay]);
      } else {
        Kept kept;
        fetch(kept, i - kHeld);
        multiply(i, sums, kept, b[i % kOnTheWay]);
      }
      if (i + kOnTheWay < kBlocks) ask(i + kOnTheWay);
    }
    leave(team, sums, partial);
  }

  // The whole sums of so many rows, `apart` from each other, for a row of the batch; in the order of the shares, the same from run to
  // run. Several shares' loads are in flight at once: their latency is on the critical path.
  template <int kRowsWanted>
  FUSED_RNN_DEVICE static void sum(const Team& team, const float* partial, int row, int apart, int b, float (&total)[kRowsWanted]) {
    const int rows = partial_stride(team, kTile);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kRowsWanted; ++i) total[i] = 0;
    FUSED_RNN_UNROLL_BY(4)
    for (int share = 0; share < team.warps_k; ++share) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < kRowsWanted; ++i) total[i] += partial[(share * (8 * NT) + b) * rows + row + i * apart];
    }
  }

 private:
  // This warp's sums, for the units' threads.
  FUSED_RNN_DEVICE void leave(const Team& team, Sums& sums, float* partial) const {
    const int rows = partial_stride(team, kTile);
    float* out = partial + share_ * (8 * NT) * rows + group_ * (MT * Policy::kRows);
    FUSED_RNN_UNROLL
    for (int n = 0; n < NT; ++n) FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) {
      FUSED_RNN_UNROLL
      for (int chain = 1; chain < kChains; ++chain) FUSED_RNN_UNROLL
      for (int i = 0; i < Policy::kSums; ++i) sums[0][n][m][i] += sums[chain][n][m][i];
      Policy::store(sums[0][n][m], out + n * 8 * rows + m * Policy::kRows, rows);
    }
  }

  // Of the blocks from kBegin to kEnd, weights in registers, those that this warp has. A branch waits for every mma before it, so they
  // come in lines as straight as there are: all of them, or the largest power of two and then the rest. In a line, reads come ahead.
  template <int kBegin, int kEnd>
  FUSED_RNN_DEVICE void multiply_held(Sums& sums, const Operand* operand, int stride) const {
    if (kBlocks || count_ >= kEnd) {
      FUSED_RNN_UNROLL
      for (int i = kBegin; i < kEnd; ++i) {
        Fragment b[NT];
        read(b, operand + i * Policy::kDepth, stride);
        multiply(i, sums, held_[i], b);
      }
    } else if constexpr (kEnd - kBegin > 1) {
      constexpr int kMiddle = kBegin + half(kEnd - kBegin);
      multiply_held<kBegin, kMiddle>(sums, operand, stride);
      if (count_ > kMiddle) multiply_held<kMiddle, kEnd>(sums, operand, stride);
    }
  }
  // The largest power of two below n.
  static constexpr int half(int n) {
    int power = 1;
    while (2 * power < n) power *= 2;
    return power;
  }

  FUSED_RNN_DEVICE int count() const { return kBlocks ? kBlocks : count_; }
  FUSED_RNN_DEVICE static void read(Fragment (&b)[NT], const Operand* operand, int stride) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < NT; ++n) b[n] = Policy::read(operand + n * 8 * stride, stride);
  }
  FUSED_RNN_DEVICE static void multiply(int block, Sums& sums, const uint32_t (&a)[MT][Policy::kRegisters], const Fragment (&b)[NT]) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < NT; ++n) Policy::template multiply<MT>(sums[block * 2 % kChains][n], sums[(block * 2 + 1) % kChains][n], a, b[n]);
  }
  template <int kNarrow>
  FUSED_RNN_DEVICE static void multiply(int block, Sums& sums, const uint32_t (&kept)[MT][kNarrow], const Fragment (&b)[NT]) {
    uint32_t a[MT][Policy::kRegisters];
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) Policy::widen(kept[m], a[m]);
    multiply(block, sums, a, b);
  }

  // Of the registers that keep a block.
  template <class Block>
  FUSED_RNN_DEVICE static auto& word(Block& kept, int i) {
    return kept[i / Policy::kKept][i % Policy::kKept];
  }
  FUSED_RNN_DEVICE uint4* place(int slot, int vector) const { return rest_ + (slot * kVectors + vector) * 32; }
  FUSED_RNN_DEVICE int row0(int m) const { return (group_ * MT + m) * Policy::kRows; }
  FUSED_RNN_DEVICE int k0(int block) const { return (first_ + block) * Policy::kDepth; }

  FUSED_RNN_DEVICE static void hold(const Kept& kept, Held& held) {
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) {
      if constexpr (kWidensOnce && Policy::kNarrow != Narrow::none) {
        Policy::widen(kept[m], held[m]);
      } else {
        FUSED_RNN_UNROLL
        for (int i = 0; i < Policy::kKept; ++i)
          held[m][i] = kBlocks && !kWidensOnce && Policy::kNarrow != Narrow::none ? arrived(kept[m][i]) : kept[m][i];
      }
    }
  }

  // In whole vectors, all that the registers hold in flight at once: a launch waits for memory once, not once a block.
  template <class Weights>
  FUSED_RNN_DEVICE void load(const Weights& weights) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if constexpr (Policy::kNarrow == Narrow::none) {
        FUSED_RNN_UNROLL
        for (int m = 0; m < MT; ++m) weights.load(row0(m), k0(i), held_[i][m]);
      } else {
        Kept kept;
        FUSED_RNN_UNROLL
        for (int m = 0; m < MT; ++m) weights.load(row0(m), k0(i), kept[m]);
        hold(kept, held_[i]);
      }
      if (i % 2) sync_warp();  // keeps the compiler from making the addresses of all blocks first, and spilling them
    }
    FUSED_RNN_UNROLL_BY(2)
    for (int i = kHeld; i < count(); ++i) {
      constexpr int kAtOnce = Policy::kKept % 4 ? MT : 1;  // m tiles, which fill whole vectors
      FUSED_RNN_UNROLL
      for (int m = 0; m < MT; m += kAtOnce) {
        uint32_t kept[kAtOnce][Policy::kKept];
        FUSED_RNN_UNROLL
        for (int n = 0; n < kAtOnce; ++n) weights.load(row0(m + n), k0(i), kept[n]);
        constexpr int kVectorsAtOnce = kAtOnce * Policy::kKept / 4;
        FUSED_RNN_UNROLL
        for (int v = 0; v < kVectorsAtOnce; ++v)
          *place(i - kHeld, m * Policy::kKept / 4 + v) = {word(kept, 4 * v), word(kept, 4 * v + 1), word(kept, 4 * v + 2),
                                                          word(kept, 4 * v + 3)};
      }
    }
    sync_warp();
  }

  // Weight by weight, by way of shared memory: loads of two bytes straight into the registers would need more of them than there are.
  template <class Weights>
  FUSED_RNN_DEVICE void fill(const Weights& weights) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      fill(0, i, weights);
      sync_warp();
      Kept kept;
      fetch(kept, 0);
      hold(kept, held_[i]);
      sync_warp();
    }
    for (int i = kHeld; i < count(); ++i) fill(i - kHeld, i, weights);
    sync_warp();
  }
  template <class Weights>
  FUSED_RNN_DEVICE void fill(int slot, int block, const Weights& weights) const {
    FUSED_RNN_UNROLL_BY(1)
    for (int i = 0; i < MT * kQuads; ++i) {
      const int m = i / kQuads, q = i % kQuads, first = i * Quad<Policy>::kWords;
      auto* words = reinterpret_cast<typename Quad<Policy>::Words*>(reinterpret_cast<uint32_t*>(place(slot, first / 4)) + first % 4);
      *words = weights.quad(row0(m) + Policy::row(q), k0(block) + Policy::depth(q));
    }
  }
  FUSED_RNN_DEVICE void fetch(Kept& kept, int slot) const {
    FUSED_RNN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint4 found = *place(slot, v);
      word(kept, 4 * v) = found.x, word(kept, 4 * v + 1) = found.y, word(kept, 4 * v + 2) = found.z, word(kept, 4 * v + 3) = found.w;
    }
  }

  int group_, share_, first_, count_;
  uint4* rest_;
  Held held_[kHeld > 0 ? kHeld : 1];
};

}  // namespace fused_rnn::cuda
