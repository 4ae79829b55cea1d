// The tiles that kernels are compiled for. The weights that a warp keeps in registers, MT x KR fragments of 8 (float: 16) registers, are
// half of the 255 that a thread of 256 may have: what is left holds the sums, the units' states and the addresses.
#pragma once
#include "../cells/math.h"

namespace fused_rnn::cuda {

enum class Precision : int { bf16, f16, tf32, ieee, f64 };  // f64 runs stepwise only

// What forward keeps W_hh in: the operand's type; bfloat16, of a float operand; or int8, whose rows have a scale each.
enum class Narrow : int { none, bf16, int8 };

struct Tile {
  int mt;         // m tiles of a warp
  int kr;         // blocks of depth in registers
  int rows;       // of an m tile: precision.h's kRows, kDepth, kRegisters
  int depth;
  int registers;
  int size;       // bytes of an element
  int kept;       // registers in which a lane keeps those weights: precision.h's kKept
};

constexpr int kThreads = 256;

// A user's cell may need more registers than the built-in ones: its kernels leave so many blocks more to shared memory.
#if !defined(FUSED_RNN_FEWER_BLOCKS)
#define FUSED_RNN_FEWER_BLOCKS 0
#endif
constexpr int kFewerBlocks = FUSED_RNN_FEWER_BLOCKS;
constexpr int kAllBlocks = 100;  // fewer: none is left in registers

constexpr int kBatchTiles[] = {1, 2, 4};  // NT: rows of the batch in eights
// Without tensor cores a lane has 8 sums for 8 rows of the batch: 32 rows leave no registers for anything else.
constexpr int most_batch_tiles(Precision precision) { return precision == Precision::ieee ? 2 : 4; }

// Forward's rows are G U, so two m tiles a warp share each fragment of the operand; backward's are only U, but its depth is G C U.
// KR is what ptxas fits without a spill.
FUSED_RNN_HD constexpr Tile built_in_tile(Precision precision, bool backward, int nt) {
  switch (precision) {
    case Precision::bf16:
    case Precision::f16:
      return backward ? Tile{1, nt == 4 ? 10 : 13, 16, 32, 8, 2, 8} : Tile{2, nt == 4 ? 4 : nt == 2 ? 6 : 8, 16, 32, 8, 2, 8};
    case Precision::tf32:
      return backward ? Tile{1, nt == 4 ? 9 : nt == 2 ? 12 : 13, 16, 16, 8, 4, 8} : Tile{2, nt == 4 ? 4 : nt == 2 ? 6 : 7, 16, 16, 8, 4, 8};
    default: return Tile{1, nt == 2 || backward ? 1 : 3, 32, 16, 16, 4, 16};
  }
}

// How often a weight that is kept so goes into an element of the operand; 1 where it would not be narrower.
FUSED_RNN_HD constexpr int narrower(Precision precision, Narrow narrow) {
  const int size = built_in_tile(precision, false, 1).size;
  return narrow == Narrow::int8 ? size : narrow == Narrow::bf16 ? size / 2 : 1;
}

// Narrow weights leave room for more blocks, less what one takes that is being widened, and the scales.
FUSED_RNN_HD constexpr int narrow_blocks(Tile t, int times) { return t.kr > 1 ? (t.kr - 1) * times : times; }

FUSED_RNN_HD constexpr Tile tile(Precision precision, bool backward, int nt, int fewer = kFewerBlocks, Narrow narrow = Narrow::none) {
  Tile t = built_in_tile(precision, backward, nt);
  const int times = narrower(precision, narrow);
  t.kept = t.registers / times;
  if (times > 1) t.kr = narrow_blocks(t, times);
  t.kr = fewer == kAllBlocks ? 0 : t.kr > fewer * times ? t.kr - fewer * times : 1;
  return t;
}

// Of a team whose product reads its operand directly (direct.h): each warp has all of the member's units, so that no other one reads its
// share of the operand. What is on its way there takes registers, and so do two units a thread, which teams of two m tiles have.
FUSED_RNN_HD constexpr Tile direct_tile(Precision precision, int units) {
  Tile t = built_in_tile(precision, true, 1);
  t.mt = units / t.rows;
  t.kr = t.mt == 2 ? 4 : precision == Precision::tf32 ? 11 : 12;
  return t;
}

// Of a product with a block of a cell's own matrices (stages.h), whose weights are all in shared memory: registers are W_hh's.
FUSED_RNN_HD constexpr Tile own_tile(Precision precision) {
  Tile t = built_in_tile(precision, true, 1);
  t.kr = 0;
  return t;
}

// An mma waits for the one before it that adds to the same sums, some four times as long as it takes: where a warp has few m tiles and
// rows, so many sets of sums take turns. An FMA lane has 8 sums, and each of them enough to do.
FUSED_RNN_HD constexpr int chains(Tile t, int nt) { return t.registers != 8 || t.mt * nt >= 4 ? 1 : 4 / (t.mt * nt); }

}  // namespace fused_rnn::cuda
