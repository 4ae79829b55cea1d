// What a kernel is told: plain structs of pointers with their shapes. One layer, R recurrences side by side.
// Letters: T time, B batch, D input size, H hidden size, P output width (the projection's, else H), G gates, S saved gates.
#pragma once
#include <cstdint>

#include "cells/cell.h"

namespace fused_rnn {

enum class Dtype : int { f32, f64, bf16, f16 };
// What packed weights are kept in: the kind's own type, or fewer bits. bytes: int8, against operands of int8 where the processor multiplies
// such, and the cell is one of those compiled in; else as int8.
enum class Narrow : int { none, bf16, int8, bytes };

struct Weights {       // of one recurrence, row-major, in the tensors' dtype
  const void* w_ih;    // [G H, D]
  const void* w_hh;    // [G H, P], of N blocks on a diagonal [G H, H / N]; null where the cell is not recurrent
  const void* b_ih;    // [G H] or null
  const void* b_hh;    // [G H] or null
  const void* w_hr;    // [P, H] or null (no projection: P == H)
  int direction;       // +1: t = 0 .. T-1;  -1: t = T-1 .. 0
  const void* params[kMostParams];  // [H] each
  const void* matrices[kMostBlocks];  // [blocks H, H] each
  const void* masks[kMostMasks];  // [1, B, H] or [T, B, H] each
  int64_t mask_time[kMostMasks];  // elements from one time to the next: 0, or B H
};

struct Problem {
  const CellDescriptor* cell;
  Dtype dtype;
  int64_t T, B, D, H, P, R;
  int64_t start, stop;       // loop steps to run, 0 <= start < stop <= T; step s is time s, or T-1-s in a reverse recurrence
  const Weights* weights;    // [R]
  const int64_t* lengths;    // [B] or null: steps t >= lengths[b] leave sequence b's state alone
  const uint8_t* reset;      // [T, B] or null: the state that enters step t is zero
  int threads;
};

struct Input {         // in the tensors' dtype: element d of recurrence r's row b at time t is data[t time + b batch + r recurrence + d]
  const void* data;
  int64_t time, batch, recurrence;  // recurrence: 0 where all have the same x
};

// Arrays over time have `stop - start` rows where they belong to a range of steps: time t of recurrence r is row
// t - first_time(r). With start = 0 and stop = T that is simply t.
struct Forward {
  Problem p;
  Input x;
  bool h_is_zero;        // h entering step `start` is all zero: its product can be left out
  void* states[kMostStates];       // h [R, B, P], the others [R, B, H], accumulation dtype: entering step `start` in, after stop-1 out
  void* y;               // [T, B, R, P] or null
  void* hidden;          // [T, B, R, P] or null: a second copy of y
  void* saved;           // [stop-start, B, R, S, H] or null
  void* histories[kMostStates];    // of each state but h: [stop-start, B, R, H] or null; zero past a sequence's end
  void* checkpoints[kMostStates];  // likewise: [T / every rounded up, R, B, H] accumulation dtype, or null: entering every `every`-th step
  int64_t every;  // 0 without checkpoints
  const void* const* packed;  // the weights of each recurrence as Packing made them, or null
  Narrow narrow;  // what they are kept in
  int64_t turn;  // packed: calls before this one; every other one starts from the end of the weights
};

// Weights as the forward loop reads them, for calls that shall not pack them anew.
struct Packing {
  Problem p;  // R = 1; T does not matter
  Narrow narrow;  // for dtype f32 alone
  void* packed;  // out, 64-byte aligned, or null: only measured
  int64_t* bytes;  // out: how many it takes
};

struct Backward {
  Problem p;
  const void* dy;  // [T, B, R, P] or null
  const void* hidden;  // [T, B, R, P]
  const void* saved;  // [stop-start or T, B, R, S, H]
  const void* histories[kMostStates];  // of each state but h: [stop-start or T, B, R, H]
  bool whole;  // saved and histories cover all of T
  const void* first[kMostStates];  // h [R, B, P], the others [R, B, H], accumulation dtype: states that entered step `start`
  void* dstates[kMostStates];  // likewise: gradients of the states after step stop-1 in, of those entering `start` out
  void* dgates;  // [stop-start, B, R, gradients, H] out: of the pre-activations, then of what the matrices' blocks made
  const void* dsequences[kMostStates];  // of each state but h: [T, B, R, H], added to its gradient at every step, or null
  void* dparams;  // [R, B, params, H] accumulation dtype, added to, or null: not wanted
  bool need_dh;  // false: dh out is not wanted, which saves the last product
  void* dprojected;  // [stop-start, B, R, P] out, projection only: the whole gradient of h_t
  void* unprojected;  // [stop-start, B, R, H] out, projection only: what W_hr multiplied
};

// The products over all steps of a range that turn dgates into gradients of weights and input.
struct Products {
  Problem p;
  const void* dgates;  // [stop-start, B, R, gradients, H]
  Input x;
  const void* hidden;  // [T, B, R, P]
  const void* saved;  // as in Backward: the first values are what the matrices multiplied
  bool whole;
  const void* h0;  // [R, B, P] in the tensors' dtype, or null
  const void* dprojected;  // as in Backward, or null
  const void* unprojected;
  void* const* dw_ih;  // per recurrence, accumulation dtype, added to: [G H, D rounded up to whole vectors], or null: not wanted
  void* const* dw_hh;  // [G H, P or H / N rounded up]; null where the cell is not recurrent
  void* const* dw_hr;  // [P, H rounded up]
  void* const* dmatrices;  // of all matrices of all recurrences: [blocks H, H rounded up]
  void* const* db_ih;  // [G H], in double
  void* const* db_hh;  // [G H], in double; null where the cell is not recurrent
  void* dx;  // [T, B, D], or [T, B, R, D] where each recurrence has its x, or null
  bool add_dx;  // dx is added to, not written
  bool first;  // dw_* and db_* hold nothing yet: written, not added to
};

// Always inline: this header is part of translation units compiled for different ISAs.
inline __attribute__((always_inline)) int64_t first_time(const Problem& p, int r) {
  return p.weights[r].direction > 0 ? p.start : p.T - p.stop;
}

}  // namespace fused_rnn
