#include "run.h"

#include <algorithm>

#include "kernels.h"
#include "layout.h"

namespace fused_rnn::cuda {
namespace {

constexpr int kCounterWords = 32;  // each team's counter has 128 bytes to itself

int tiles_of_a_launch(const Plan& plan) {
  return plan.team.exchange == ExchangeKind::grid ? std::min(plan.tiles_at_once, plan.tiles) : plan.tiles;
}

const char* kNotBuilt = "this build has no kernel for the problem";

template <class Loop>
std::string run(void (*kernel)(Loop), Precision precision, Loop loop, const Plan& plan, void* workspace, void* stream) {
  if (!kernel) return kNotBuilt;
  const bool grid = plan.team.exchange == ExchangeKind::grid;
  const WorkspaceBytes bytes = workspace_bytes(plan, precision, loop.steps.R);
  uint32_t* arrived = static_cast<uint32_t*>(workspace);
  if (grid) {
    if (std::string error = clear(arrived, bytes.arrived / 4, stream); !error.empty()) return error;
    loop.workspace.operand = static_cast<char*>(workspace) + bytes.arrived;
  }
  loop.team = plan.team;
  const int at_once = tiles_of_a_launch(plan);
  for (int tile = 0; tile < plan.tiles; tile += at_once) {
    loop.steps.tile0 = tile;
    loop.steps.tiles = std::min(at_once, plan.tiles - tile);
    if (grid) loop.workspace.arrived = arrived + int64_t(tile) * loop.steps.R * kCounterWords;
    const Shape shape{int64_t(loop.steps.tiles) * loop.steps.R * plan.team.members, plan.threads,
                      plan.team.exchange == ExchangeKind::cluster ? plan.team.members : 1, plan.shared, grid};
    if (std::string error = launch(kernel, loop, shape, stream); !error.empty()) return error;
  }
  return {};
}

template <class Loop>
std::string run_flat(void (*kernel)(Loop), const Loop& loop, void* stream) {
  if (!kernel) return kNotBuilt;
  const int64_t units = int64_t(loop.steps.R) * loop.steps.B * loop.steps.H;
  return launch(kernel, loop, {(units + kPointwiseThreads - 1) / kPointwiseThreads, kPointwiseThreads, 1, 0, false}, stream);
}

int index_of(int nt) { return int(std::find(std::begin(kBatchTiles), std::end(kBatchTiles), nt) - std::begin(kBatchTiles)); }

}  // namespace

WorkspaceBytes workspace_bytes(const Plan& plan, Precision precision, int64_t R) {
  if (plan.team.exchange != ExchangeKind::grid) return {0, 0};
  const int64_t teams = R * tiles_of_a_launch(plan);
  return {R * plan.tiles * kCounterWords * 4, 2 * teams * plan.team.rows * plan.team.depth * tile(precision, false, plan.nt).size};
}

std::string run_forward(Cell cell, Precision precision, ForwardLoop loop, const Plan& plan, void* workspace, void* stream) {
  return run(find_kernels(cell, precision).persistent_fwd[index_of(plan.nt)], precision, loop, plan, workspace, stream);
}
std::string run_backward(Cell cell, Precision precision, BackwardLoop loop, const Plan& plan, void* workspace, void* stream) {
  return run(find_kernels(cell, precision).persistent_bwd[index_of(plan.nt)], precision, loop, plan, workspace, stream);
}
std::string run_pointwise(Cell cell, Precision precision, const ForwardLoop& loop, void* stream) {
  return run_flat(find_kernels(cell, precision).pointwise_fwd, loop, stream);
}
std::string run_pointwise(Cell cell, Precision precision, const BackwardLoop& loop, void* stream) {
  return run_flat(find_kernels(cell, precision).pointwise_bwd, loop, stream);
}

}  // namespace fused_rnn::cuda
