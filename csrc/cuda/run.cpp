#include "run.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "layout.h"

namespace fused_rnn::cuda {
namespace {

constexpr int kCounterWords = 32;  // each counter has 128 bytes to itself

const char* kNotBuilt = "this build has no kernel for the problem";

int index_of(int nt) { return int(std::find(std::begin(kBatchTiles), std::end(kBatchTiles), nt) - std::begin(kBatchTiles)); }

}  // namespace

template <class Loop>
Bound<Loop>::Bound(std::string_view cell, Precision precision, const Plan* plan, const Loop& loop, void* loaded)
    : loop_(loop), plan_(plan ? *plan : Plan{}), has_plan_(plan != nullptr) {
  constexpr bool kForward = std::is_same_v<Loop, ForwardLoop>;
  const Kernels kernels = find_kernels(cell, precision);
  if constexpr (kForward) pointwise_.built = kernels.pointwise_fwd;
  else pointwise_.built = kernels.pointwise_bwd;
  if (!has_plan_) pointwise_.loaded = loaded;
  if (!has_plan_) return;
  const int known = plan_.known, tiles = index_of(plan_.nt);
  if constexpr (kForward) persistent_.built = known < 0 ? kernels.persistent_fwd[tiles] : kernels.known_fwd[known];
  else persistent_.built = known < 0 ? kernels.persistent_bwd[tiles] : kernels.known_bwd[known];
  persistent_.loaded = loaded;
  if constexpr (!kForward) loop_.close = loop_.steps.step0 == 0;
  loop_.team = plan_.team;
  loop_.own.team = plan_.own;
  tiles_of_a_launch_ = plan_.tiles;
  if (!meets_in_global_memory(plan_.team)) return;
  tiles_of_a_launch_ = std::min(plan_.tiles_at_once, plan_.tiles);
  const Stages& stages = plan_.stages;
  counters_ = stages.count == 1 ? 1 : 2 + stages.operands;
  arrived_bytes_ = int64_t(loop_.steps.R) * plan_.tiles * counters_ * kCounterWords * 4;
  const int64_t rows = 2 * int64_t(loop_.steps.R) * tiles_of_a_launch_ * plan_.team.rows;
  const int size = tile(precision, false, plan_.nt).size;
  operand_bytes_ = rows * plan_.team.depth * size;
  if (stages.count > 1)
    own_bytes_ = rows * (int64_t(stages.operands) * plan_.own.depth * size + int64_t(stages.pairs) * reduced(plan_.own) * 8);
}

template <class Loop>
std::string Bound<Loop>::run(void* workspace, void* stream) const {
  if (!has_plan_) return run_pointwise(loop_, stream);
  if (!persistent_) return kNotBuilt;
  const bool grid = meets_in_global_memory(plan_.team);
  Loop loop = loop_;
  uint32_t* arrived = static_cast<uint32_t*>(workspace);
  if (grid) {
    if (std::string error = clear(arrived, arrived_bytes_ / 4, stream); !error.empty()) return error;
    loop.workspace.operand = static_cast<char*>(workspace) + arrived_bytes_;
    loop.own.workspace.operand = static_cast<char*>(workspace) + arrived_bytes_ + operand_bytes_;
  }
  for (int tile = 0; tile < plan_.tiles; tile += tiles_of_a_launch_) {
    loop.steps.tile0 = tile;
    loop.steps.tiles = std::min(tiles_of_a_launch_, plan_.tiles - tile);
    if (grid) {
      loop.workspace.arrived = arrived + int64_t(tile) * loop.steps.R * kCounterWords;
      loop.own.workspace.arrived = arrived + (int64_t(plan_.tiles) + int64_t(tile) * (counters_ - 1)) * loop.steps.R * kCounterWords;
    }
    const bool cluster = plan_.team.exchange == ExchangeKind::cluster || plan_.team.exchange == ExchangeKind::scatter;
    const Shape shape{int64_t(loop.steps.tiles) * loop.steps.R * plan_.team.members, plan_.threads, cluster ? plan_.team.members : 1,
                      plan_.shared, grid};
    if (std::string error = launch(persistent_, loop, shape, stream); !error.empty()) return error;
  }
  return {};
}

template <class Loop>
std::string Bound<Loop>::run_over(const Loop& arrays, void* workspace, void* stream) const {
  Bound bound = *this;
  bound.loop_ = arrays;
  bound.loop_.team = loop_.team;
  bound.loop_.own = loop_.own;
  Steps& steps = bound.loop_.steps = loop_.steps;
  steps.T = steps.step1 = steps.window1 = arrays.steps.T;
  steps.lengths = arrays.steps.lengths;
  steps.reset = arrays.steps.reset;
  if constexpr (std::is_same_v<Loop, BackwardLoop>) bound.loop_.close = true;
  return bound.run(workspace, stream);
}

template <class Loop>
Loop Bound<Loop>::of_step(int step) const {
  constexpr bool kBackward = std::is_same_v<Loop, BackwardLoop>;
  Loop loop = loop_;
  loop.steps.step0 = std::max(step, 0);
  loop.steps.step1 = step + 1;
  if constexpr (kBackward) {
    loop.close = step < 0;
    if (step + 1 == loop.steps.T) loop.given = nullptr;
  }
  return loop;
}

template <class Loop>
std::string Bound<Loop>::run_step(int step, void* stream) const {
  return run_pointwise(of_step(step), stream);
}

template <class Loop>
std::string Bound<Loop>::run_stages(int step, int first, int last, void* stream) const {
  if (!pointwise_) return kNotBuilt;
  Loop loop = of_step(step);
  loop.own.stage0 = first;
  loop.own.stage1 = last;
  return launch(pointwise_, loop, {int64_t(loop.steps.R) * loop.steps.B, kStageThreads, 1, kStageThreads * 8, false}, stream);
}

template <class Loop>
std::string Bound<Loop>::run_pointwise(const Loop& loop, void* stream) const {
  if (!pointwise_) return kNotBuilt;
  const Steps& steps = loop.steps;
  const int64_t chunks = steps.chunk ? (int64_t(steps.step1) - steps.step0 + steps.chunk - 1) / steps.chunk : 1;
  const int64_t units = chunks * steps.R * steps.B * steps.H;
  return launch(pointwise_, loop, {(units + kPointwiseThreads - 1) / kPointwiseThreads, kPointwiseThreads, 1, 0, false}, stream);
}

namespace {

const char* told(std::string error) {
  thread_local std::string kept;
  kept = std::move(error);
  return kept.empty() ? nullptr : kept.c_str();
}

}  // namespace

template <class Loop>
const char* run_step_of(const void* loop, int step, void* stream) {
  return told(static_cast<const Bound<Loop>*>(loop)->run_step(step, stream));
}
template <class Loop>
const char* run_over(const void* loop, const void* arrays, void* workspace, void* stream) {
  return told(static_cast<const Bound<Loop>*>(loop)->run_over(*static_cast<const Loop*>(arrays), workspace, stream));
}

const char* copy_rows_of(const void* rows, void* stream) { return told(copy_rows(*static_cast<const Rows*>(rows), stream)); }

template const char* run_step_of<ForwardLoop>(const void*, int, void*);
template const char* run_step_of<BackwardLoop>(const void*, int, void*);
template const char* run_over<ForwardLoop>(const void*, const void*, void*, void*);
template const char* run_over<BackwardLoop>(const void*, const void*, void*, void*);
template class Bound<ForwardLoop>;
template class Bound<BackwardLoop>;

}  // namespace fused_rnn::cuda
