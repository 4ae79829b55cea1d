// What the CUDA loops are told: plain structs of pointers with their shapes, passed to the kernels by value.
// Letters: T time, B batch, H hidden size, G gates, S gate vectors saved per step, R recurrences side by side.
#pragma once
#include <cstdint>

#include "../cells/cell.h"

namespace fused_rnn::cuda {

// How a team shares what it has computed between two steps.
enum class ExchangeKind : int {
  cta,      // a team of one: a barrier of its threads
  cluster,  // a thread-block cluster: remote stores into the peers' shared memory
  grid,     // any CTAs that are resident together: global memory and a counter
  scatter,  // backward, a cluster: each member sends the others the sums that are theirs, not what they are made of (scatter.h)
  direct    // backward, the grid: the product reads the operand where it is, in global memory (direct.h)
};

constexpr int kLargestCluster = 16;  // CTAs; 8 is what every device with clusters offers

// How the products of a team are laid out: decided by plan.cpp, the same for all CTAs of a launch.
struct Team {
  ExchangeKind exchange;
  int members;     // C: CTAs of a team
  int units;       // U: hidden units of a member, a multiple of 16; member m has m U .. m U + U - 1
  int rows;        // NB: rows of the batch
  int warps_m;     // WM x WK warps: WM groups of rows of the product,
  int warps_k;     //   each with WK warps that share its depth
  int depth;       // K: forward C U, backward G C U, or G U where it scatters
  int blocks;  // of depth, of each warp; the first few have their weights in registers, of known teams all, the rest in shared memory
};

// Its members are resident together, and meet in global memory.
FUSED_RNN_HD constexpr bool meets_in_global_memory(const Team& team) {
  return team.exchange == ExchangeKind::grid || team.exchange == ExchangeKind::direct;
}

// H, as a launch tells it; or as a kernel was compiled for it, which then looks nothing up.
template <int kKnown>
struct Width {
  int told;
  FUSED_RNN_HD constexpr operator int() const { return kKnown ? kKnown : told; }
};

// The time of a loop's step, and what masks it.
template <int kWidth>
struct StepsOf {
  int T;
  int step0, step1;  // run steps step0 .. step1 - 1, in the recurrence's own order
  int window0, window1;  // steps that gx, given, saved and histories hold; all of time: 0, T
  uint64_t reversed;  // bit r % period: recurrence r runs backwards in time
  int period;
  const int64_t* lengths;  // [B] or null: steps t >= lengths[b] leave sequence b's state alone
  const int32_t* reset;  // [T, B] or null: not 0 where the state that enters step t is zero
  int B, R;
  Width<kWidth> H;
  int tiles, tile0;  // batch tiles of this launch, and the first of them
  int chunk;  // steps of each of the chunks of step0 .. step1 - 1 that run side by side, pointwise kernel only; 0: all in one
};
using Steps = StepsOf<0>;

// Where the team's exchange happens, by the grid exchange or directly.
struct Workspace {
  void* operand;  // [2, teams of the launch, NB, K]
  uint32_t* arrived;  // [teams of the launch, 32]: how often members arrived, one counter in 128 bytes
};

// Of a cell in stages.
struct OwnOperands {
  const void* masks[kMostMasks];  // [R, times, B, H] each
  int times[kMostMasks];          // T, or 1 for the same at all times
  const void* matrices;           // [R, blocks, H, H]
  Team team;            // the same, as its matrices' products are laid out
  Workspace workspace;  // as its stages meet on the grid (stages.h)
  // Without a team (by_stages.h):
  void* crossing;      // [crossing, R, B, H] accumulation type: what crosses from stage to stage
  int stage0, stage1;  // run stages stage0 .. stage1 - 1
};

template <int kWidth>
struct ForwardLoopOf {
  StepsOf<kWidth> steps;
  Team team;
  Workspace workspace;
  const void* gx;  // [window, B, R, G, H]  input product, with the biases that are added before the cell
  const void* given;  // [window, B, R, G, H]  recurrent product, of the pointwise kernel, and where a cell in stages has its gates made
                      //   again; of one step where it writes workspace.operand
  const void* w;  // [R, G, H, H]
  const void* bias;  // [R, apart, H]  recurrent biases of the gates that enter the cell apart, if there are any
  const void* h0;  // [R, B, H]
  void* carried[kMostStates];  // [R, B, H] accumulation type: h if the cell reads it, then the other states; read at step0,
                               //   written at step1; by chunks [chunks, R, B, H]
  const void* hidden;  // [T, B, R, H] or null  y that is there already, where the product is given: h at step0 is taken from it
  void* y;  // [T, B, R, H] or null
  void* h_n;  // [R, B, H] or null  written with step T - 1
  void* saved;  // [window, B, R, S, H] or null
  void* histories[kMostStates];  // [window, B, R, H]  of each state but h, zero past a sequence's end
  void* checkpoints[kMostStates];  // [ceil(T / every), R, B, H] accumulation type, or null: each state but h as it enters step j * every
  int every;
  bool keeps_histories;
  bool histories_are_wide;  // in the accumulation type, else in the storage type
  const void* params;  // [R, params, H]
  const float* scale;  // [R, G, H]  of W_hh's rows, where it is int8
  OwnOperands own;
};
using ForwardLoop = ForwardLoopOf<0>;
static_assert(sizeof(ForwardLoopOf<64>) == sizeof(ForwardLoop));  // a kernel reads one as the other

template <int kWidth>
struct BackwardLoopOf {
  StepsOf<kWidth> steps;
  Team team;
  Workspace workspace;
  const void* dy;  // [T, B, R, H] or null
  const void* given;  // [R, B, H] or null: the product, pointwise kernel only
  const void* w;  // [R, G, H, H]
  const void* states[kMostStates];  // h_t [T, B, R, H], then a history [window, B, R, H] of each other state
  const void* first[kMostStates];  // [R, B, H]  what enters the first of these
  const void* saved;  // [window, B, R, S, H]
  void* dgates;  // [T, B, R, G + apart + blocks, H]; the recurrent side's are the last G of the first G + apart
  void* dstates[kMostStates];  // [R, B, H] accumulation type, in: gradient of each state after step1 - 1; out: before step0; by
                               //   chunks [chunks, R, B, H]
  const void* last;  // [R, B, H] accumulation type, by chunks: the gradient of the last h, which no step hands on
  bool histories_are_wide;  // and what enters them: in the accumulation type, else in the storage type
  bool close;  // after step 0, take its product too, into that of h: the gradient of h0 (pointwise: only that)
  const void* params;  // [R, params, H]
  void* dparams;  // [R, B, params, H] accumulation type, in and out, or null: added to, by one thread each; by
                  //   chunks [chunks, R, B, params, H]
  const void* dsequences[kMostStates];  // [T, B, R, H] or null: of each state but h the gradient of what it is over time
  OwnOperands own;
};
using BackwardLoop = BackwardLoopOf<0>;
static_assert(sizeof(BackwardLoopOf<64>) == sizeof(BackwardLoop));

// Chunks of time (join.h), each of [chunks, size] in the accumulation type.
struct Join {
  int64_t size;  // R B H
  int chunks, states;
  bool backward;  // the last one runs first
  unsigned forgets;  // bit i: a step's factor of state i is known to be zero; that of a chunk, too, where it has a step
  void* sums[kMostStates];           // what a chunk makes of zero; out: what enters it
  const void* factors[kMostStates];  // by what it multiplies what enters it
  const void* initial[kMostStates];  // [size]: what enters the one that runs first
  const void* uncut;  // 0 where a reset cuts off what enters
};

// A copy of rows (rows.h): zero past a sequence's end.
struct Rows {
  Steps steps;  // T, B, direction, lengths, reset
  int r;
  int size;   // bytes of an element
  int width;  // elements of a row
  int64_t stride;     // from a row to that of the next sequence
  const void* from;   // [T, B, ..]
  const void* first;  // [B, width] or null: else a step's row is what entered it, that of the step before, or at the first this; zero where
                      //   it is reset
  void* to;  // [T, B, width]
};

}  // namespace fused_rnn::cuda
