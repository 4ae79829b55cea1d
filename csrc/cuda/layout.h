// A CTA's shared memory, as the kernels divide it and as the planner counts it.
#pragma once
#include "params.h"
#include "primitives/platform.h"
#include "tiles.h"

namespace fused_rnn::cuda {

constexpr int kPointwiseThreads = 256;
constexpr int kStageThreads = 256;  // of a row (by_stages.h)

// A general kernel keeps this many units in each thread's registers; the planner sees to it that they suffice. Of a cell in stages one, for
// what crosses from stage to stage needs registers, too.
constexpr int kUnitsPerThread = 2;
FUSED_RNN_HD constexpr int units_per_thread(int stages) { return stages == 1 ? kUnitsPerThread : 1; }

// Of a row of the operand: blocks of 64 bytes, and of these an odd number, so that a block of two rows, which a quarter of a warp reads at
// once, fills all 128 bytes of the banks.
FUSED_RNN_HD constexpr int operand_stride(int depth, Tile t) { return ((depth + t.depth - 1) / t.depth | 1) * t.depth; }
// Of a row of partial sums: the 4 more keep the 8 x 4 lanes of an mma's result in different banks.
FUSED_RNN_HD constexpr int partial_stride(const Team& team, Tile t) { return team.warps_m * t.mt * t.rows + 4; }

// Blocks of a warp's weights that have a place in shared memory: those that the registers do not hold, and one at least, through which
// the registers are filled where rows of W_hh are not aligned.
FUSED_RNN_HD constexpr int shared_blocks(const Team& team, Tile t) { return team.blocks > t.kr + 1 ? team.blocks - t.kr : 1; }

FUSED_RNN_HD constexpr int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// The team of so many members with the depth of its product divided into so many shares; false where it cannot be, or is that of fewer.
FUSED_RNN_HD constexpr bool lay_out(Tile t, bool backward, int gates, ExchangeKind exchange, int members, int units, int nt, int shares,
                                    Team& team) {
  const bool scatters = exchange == ExchangeKind::scatter;
  const int padded = members * units, most = kThreads / 32;
  const int depth = scatters ? gates * units : backward ? gates * padded : padded, blocks = ceil_div(depth, t.depth);
  const int rows = scatters ? padded : backward ? units : gates * units;
  int warps_m = ceil_div(ceil_div(rows, t.rows), t.mt);
  if (scatters && warps_m > most) warps_m = most;  // a warp has several tiles
  if (shares > blocks || warps_m * shares > most) return false;
  team = {exchange, members, units, 8 * nt, warps_m, shares, depth, ceil_div(blocks, shares)};
  return ceil_div(blocks, team.blocks) == shares;
}

// Of a member: those of its product's warps, or as many as its units need, so many a thread.
FUSED_RNN_HD constexpr int threads_of(const Team& team, int units_per_thread = kUnitsPerThread) {
  const int product = team.warps_m * team.warps_k, units = ceil_div(int64_t(team.units) * team.rows, units_per_thread * 32);
  return 32 * (product > units ? product : units);
}

// Arrays in the dynamic shared memory: byte offsets and numbers of elements.
struct SharedLayout {
  int operands, operands_count;  // the operand, [NB, stride], twice in clusters; none where the product reads it directly
  int partial, partial_count;  // float [WK, NB, stride]; of a team that scatters what it receives, [2, C U, NB]
  int barriers, barriers_count;  // mbarriers: one for each copy of the operand, or for each group of what is received
  int weights, weights_count;  // uint4: fragments that the registers do not hold
  int64_t total;
};
FUSED_RNN_HD constexpr SharedLayout shared_layout(const Team& team, Tile t) {
  SharedLayout at{};
  const bool scatters = team.exchange == ExchangeKind::scatter, direct = team.exchange == ExchangeKind::direct;
  const int copies = direct ? 0 : scatters || team.exchange == ExchangeKind::cluster ? 2 : 1, width = team.members * team.units;
  at.operands_count = copies * team.rows * operand_stride(team.depth, t);
  at.partial = at.operands + at.operands_count * t.size + kSharedGap;
  at.partial_count = scatters ? 2 * team.rows * width : team.warps_k * team.rows * partial_stride(team, t);
  at.barriers = at.partial + at.partial_count * 4 + kSharedGap;
  at.barriers_count = scatters ? 2 * (width / 16 / team.warps_m) : 2;
  at.weights = at.barriers + at.barriers_count * 8 + kSharedGap;
  at.weights_count = scatters ? 0 : team.warps_m * team.warps_k * shared_blocks(team, t) * t.mt * t.kept / 4 * 32;
  at.total = at.weights + int64_t(at.weights_count) * 16 + kSharedGap;
  return at;
}

// What a cell's stages need of a team, in one direction (stages.h); the most that a stage needs.
struct Stages {
  int count = 1;
  int pairs = 0;  // of numbers that a row's units are reduced to
  int operands = 0;  // of products, in all stages
  int products = 0;  // likewise, one for each block of the cell's matrices
  int at_once = 0;  // products
};

// The team as the product with one block of the cell's matrices is laid out: its rows are a member's units. No warps where it has not
// enough.
FUSED_RNN_HD constexpr Team own_team(const Team& team, Tile t, int threads) {
  Team own = team;
  own.depth = team.members * team.units;
  own.warps_m = ceil_div(team.units, t.rows);
  const int blocks = ceil_div(own.depth, t.depth), most = threads / 32 / own.warps_m, shares = most < blocks ? most : blocks;
  own.blocks = shares ? ceil_div(blocks, shares) : 0;
  own.warps_k = shares ? ceil_div(blocks, own.blocks) : 0;
  return own;
}

// 16 units are reduced to a pair of numbers; an even number of them of a row.
FUSED_RNN_HD constexpr int reduced(const Team& team) { return (team.members * team.units / 16 + 1) / 2 * 2; }

// What stages take of the shared memory, behind all else.
struct StagesLayout {
  int slots, slots_count;  // float2 [NB, pairs, reduced], twice but on the grid
  int barriers, barriers_count;  // mbarriers: two for reductions, two for each operand
  int operands, operands_count;  // of each, [NB, stride], twice in clusters
  int partial, partial_count;  // float, of each product of a stage [WK, NB, stride]
  int weights, weights_count;  // uint4, of each product
  int64_t total;
};
FUSED_RNN_HD constexpr StagesLayout stages_layout(const Team& own, Tile t, const Stages& stages, int64_t from) {
  StagesLayout at{};
  at.slots = int(from);
  at.slots_count = (own.exchange == ExchangeKind::grid ? 1 : 2) * own.rows * stages.pairs * reduced(own);
  at.barriers = at.slots + at.slots_count * 8 + kSharedGap;
  at.barriers_count = 2 + 2 * stages.operands;
  at.operands = at.barriers + at.barriers_count * 8 + kSharedGap;
  at.operands_count = (own.exchange == ExchangeKind::cluster ? 2 : 1) * own.rows * operand_stride(own.depth, t);
  at.partial = at.operands + stages.operands * (at.operands_count * t.size + kSharedGap);
  at.partial_count = own.warps_k * own.rows * partial_stride(own, t);
  at.weights = at.partial + stages.at_once * (at.partial_count * 4 + kSharedGap);
  at.weights_count = own.warps_m * own.warps_k * shared_blocks(own, t) * (32 * t.mt * t.kept / 4);
  at.total = at.weights + stages.products * (int64_t(at.weights_count) * 16 + kSharedGap);
  return at;
}

}  // namespace fused_rnn::cuda
