// A loop over time, or a range of its steps, in as many launches as the plan asks for.
#pragma once
#include <string>

#include "../params.h"
#include "launch.h"
#include "plan.h"

namespace fused_rnn::cuda {

// Bytes of the workspace of a run: `arrived` first, then the operand. Zero but for the grid exchange.
struct WorkspaceBytes {
  int64_t arrived, operand;
};
WorkspaceBytes workspace_bytes(const Plan& plan, Precision precision, int64_t R);

// Each returns what went wrong, or an empty text. loop.team, tiles, tile0 and workspace are filled in here.
std::string run_forward(Cell cell, Precision precision, ForwardLoop loop, const Plan& plan, void* workspace, void* stream);
std::string run_backward(Cell cell, Precision precision, BackwardLoop loop, const Plan& plan, void* workspace, void* stream);

// Without a product: `given` holds it. Forward over the steps of the range, backward one step, or with `close` none.
std::string run_pointwise(Cell cell, Precision precision, const ForwardLoop& loop, void* stream);
std::string run_pointwise(Cell cell, Precision precision, const BackwardLoop& loop, void* stream);

}  // namespace fused_rnn::cuda
