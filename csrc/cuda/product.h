// The product of one step:  partial[share][row of the batch][row] = weights [rows x K] times the operand [NB x K].
//
// Warps stand in WM groups of MT m tiles; the WK warps of a group share the depth, and each leaves a sum of its own, which
// the cells' threads add up. A warp's weights stay with it for all of time: the first KR blocks in registers, the rest in
// shared memory in the order in which its lanes read them.
#pragma once
#include "layout.h"
#include "numbers.h"
#include "primitives/barrier.h"

namespace fused_rnn::cuda {

template <class Number, bool kBackward, int NT>
class Product {
  using Operand = typename Number::Operand;
  static constexpr Tile kTile = tile(Number::kKind, kBackward, NT);
  static constexpr int MT = kTile.mt, KR = kTile.kr, kQuads = Number::kRegisters / 4;
  // A product waits for the one before it that adds to the same sums: where a warp has but one m tile and 8 rows, two sets of sums halve
  // that chain.
  static constexpr int kChains = MT * NT == 1 && Number::kSums == 4 ? 2 : 1;
  static_assert(kTile.rows == Number::kRows && kTile.depth == Number::kDepth && kTile.registers == Number::kRegisters, "tiles.h and numbers.h");

 public:
  // weight(row, k): the weight, or zero outside. rest: this CTA's shared memory for what the registers do not hold.
  template <class Weight>
  FUSED_RNN_DEVICE Product(const Team& team, uint4* rest, const Weight& weight)
      : group_(int(threadIdx.x) / 32 % team.warps_m), share_(int(threadIdx.x) / 32 / team.warps_m) {
    const int all = (team.depth + Number::kDepth - 1) / Number::kDepth;
    first_ = share_ * team.blocks;
    count_ = first_ + team.blocks <= all ? team.blocks : first_ < all ? all - first_ : 0;
    rest_ = rest + int(threadIdx.x) / 32 * shared_blocks(team, kTile) * (MT * kQuads * 32) + lane();
    // By way of shared memory: loads straight into the registers would all be in flight at once, and spill.
    FUSED_RNN_UNROLL
    for (int i = 0; i < KR; ++i) {
      fill(0, i, weight);
      sync_warp();
      fetch(held_[i], 0);
      sync_warp();
    }
    for (int i = KR; i < count_; ++i) fill(i - KR, i, weight);
    sync_warp();
  }

  FUSED_RNN_DEVICE void run(const Team& team, const Operand* operand, float* partial) const {
    const int stride = operand_stride(team.depth, kTile);
    operand += first_ * Number::kDepth;
    float sums[kChains][NT][MT][Number::kSums] = {};
    FUSED_RNN_UNROLL
    for (int i = 0; i < KR; ++i) {
      if (i >= count_) break;
      FUSED_RNN_UNROLL
      for (int n = 0; n < NT; ++n) Number::template multiply<MT>(sums[i % kChains][n], held_[i], operand + i * Number::kDepth + n * 8 * stride, stride);
    }
    for (int i = KR; i < count_; ++i) {
      uint32_t a[MT][Number::kRegisters];
      fetch(a, i - KR);
      FUSED_RNN_UNROLL
      for (int n = 0; n < NT; ++n) Number::template multiply<MT>(sums[0][n], a, operand + i * Number::kDepth + n * 8 * stride, stride);
    }
    const int rows = partial_stride(team, kTile);
    float* out = partial + share_ * (8 * NT) * rows + group_ * (MT * Number::kRows);
    FUSED_RNN_UNROLL
    for (int n = 0; n < NT; ++n)
      FUSED_RNN_UNROLL
      for (int m = 0; m < MT; ++m)
        FUSED_RNN_UNROLL
        for (int i = 0; i < Number::kSums; ++i) out[(n * 8 + Number::column(i)) * rows + m * Number::kRows + Number::row(i)] = whole(sums, n, m, i);
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
  FUSED_RNN_DEVICE static float whole(const float (&sums)[kChains][NT][MT][Number::kSums], int n, int m, int i) {
    float total = sums[0][n][m][i];
    FUSED_RNN_UNROLL
    for (int chain = 1; chain < kChains; ++chain) total += sums[chain][n][m][i];
    return total;
  }
  FUSED_RNN_DEVICE uint4* place(int slot, int m, int quad) const { return rest_ + ((slot * MT + m) * kQuads + quad) * 32; }
  // A block's fragments, each lane's own, into a slot of shared memory and out of it.
  template <class Weight>
  FUSED_RNN_DEVICE void fill(int slot, int block, const Weight& weight) const {
    const int k0 = (first_ + block) * Number::kDepth;
    FUSED_RNN_UNROLL_BY(1)
    for (int i = 0; i < MT * kQuads; ++i) {
      const int m = i / kQuads, row0 = (group_ * MT + m) * Number::kRows;
      *place(slot, m, i % kQuads) = Number::load(i % kQuads, [&](int row, int k) { return weight(row0 + row, k0 + k); });
    }
  }
  FUSED_RNN_DEVICE void fetch(uint32_t (&a)[MT][Number::kRegisters], int slot) const {
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) {
      FUSED_RNN_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        const uint4 v = *place(slot, m, q);
        a[m][4 * q] = v.x, a[m][4 * q + 1] = v.y, a[m][4 * q + 2] = v.z, a[m][4 * q + 3] = v.w;
      }
    }
  }

  int group_, share_, first_, count_;
  uint4* rest_;
  uint32_t held_[KR][MT][Number::kRegisters];
};

}  // namespace fused_rnn::cuda
