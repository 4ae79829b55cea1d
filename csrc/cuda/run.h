// A loop over time, bound once to its kernels, its plan and its arrays, then run: all of it, in as many launches as the plan asks for,
// or step by step.
#pragma once
#include <string>

#include "kernels.h"
#include "launch.h"
#include "plan.h"

namespace fused_rnn::cuda {

template <class Loop>  // ForwardLoop or BackwardLoop
class Bound {
 public:
  // plan: of the persistent kernel; null where the product is given, or there is none. loop: its team, tiles and workspace are filled in
  // here. loaded: the kernel, where it is not among those of this module.
  Bound(std::string_view cell, Precision precision, const Plan* plan, const Loop& loop, void* loaded = nullptr);

  // Of a run: each team's counters, then the operand, then those of its stages. Zero but for the grid exchange.
  int64_t workspace_bytes() const { return arrived_bytes_ + operand_bytes_ + own_bytes_; }

  // Each returns what went wrong, or an empty text.
  // By the plan; without one by the pointwise kernel: forward, `given` holds the product of every step; or the cell has no W_hh.
  std::string run(void* workspace, void* stream) const;
  // `run` by this plan, these kernels and sizes, over other arrays and another T.
  std::string run_over(const Loop& arrays, void* workspace, void* stream) const;
  // One step by the pointwise kernel: `given` holds its product. Backward the last step has none, and a step -1 follows step 0: it takes
  // the product of step 0's gradients into that of h.
  std::string run_step(int step, void* stream) const;
  // Of such a step of a cell in stages these, from the first to past the last (by_stages.h).
  std::string run_stages(int step, int first, int last, void* stream) const;

 private:
  Loop of_step(int step) const;
  std::string run_pointwise(const Loop& loop, void* stream) const;

  Loop loop_;
  Plan plan_;
  bool has_plan_;
  Kernel<Loop> persistent_, pointwise_;
  int tiles_of_a_launch_ = 0;
  int counters_ = 1;  // of a team
  int64_t arrived_bytes_ = 0, operand_bytes_ = 0, own_bytes_ = 0;  // the last of what its stages share
};

// As calls.h has them.
template <class Loop>
const char* run_step_of(const void* loop, int step, void* stream);
template <class Loop>
const char* run_over(const void* loop, const void* arrays, void* workspace, void* stream);

const char* copy_rows_of(const void* rows, void* stream);

}  // namespace fused_rnn::cuda
