// A CTA's shared memory, as the kernels divide it and as the planner counts it.
#pragma once
#include "params.h"
#include "primitives/platform.h"
#include "tiles.h"

namespace fused_rnn::cuda {

constexpr int kPointwiseThreads = 256;

// A launch keeps this many units in each thread's registers; the planner sees to it that they suffice.
constexpr int kUnitsPerThread = 2;

// Of a row of the operand: blocks of 64 bytes, and of these an odd number, so that a block of two rows, which a quarter of a warp reads at
// once, fills all 128 bytes of the banks.
FUSED_RNN_HD constexpr int operand_stride(int depth, Tile t) { return ((depth + t.depth - 1) / t.depth | 1) * t.depth; }
// Of a row of partial sums: the 4 more keep the 8 x 4 lanes of an mma's result in different banks.
FUSED_RNN_HD constexpr int partial_stride(const Team& team, Tile t) { return team.warps_m * t.mt * t.rows + 4; }

// Blocks of a warp's weights that have a place in shared memory: those that the registers do not hold, and one at least, through which
// the registers are filled where rows of W_hh are not aligned.
FUSED_RNN_HD constexpr int shared_blocks(const Team& team, Tile t) { return team.blocks > t.kr + 1 ? team.blocks - t.kr : 1; }

// Arrays in the dynamic shared memory: byte offsets and numbers of elements.
struct SharedLayout {
  int operands, operands_count;   // the operand, [NB, stride], twice where peers write into it
  int partial, partial_count;     // float [WK, NB, stride]
  int barriers, barriers_count;   // two mbarriers
  int weights, weights_count;     // uint4: fragments that the registers do not hold
  int64_t total;
};
FUSED_RNN_HD constexpr SharedLayout shared_layout(const Team& team, Tile t) {
  SharedLayout at{};
  at.operands_count = (team.exchange == ExchangeKind::cluster ? 2 : 1) * team.rows * operand_stride(team.depth, t);
  at.partial = at.operands + at.operands_count * t.size + kSharedGap;
  at.partial_count = team.warps_k * team.rows * partial_stride(team, t);
  at.barriers = at.partial + at.partial_count * 4 + kSharedGap;
  at.barriers_count = 2;
  at.weights = at.barriers + 16 + kSharedGap;
  at.weights_count = team.warps_m * team.warps_k * shared_blocks(team, t) * t.mt * t.registers / 4 * 32;
  at.total = at.weights + int64_t(at.weights_count) * 16 + kSharedGap;
  return at;
}

}  // namespace fused_rnn::cuda
