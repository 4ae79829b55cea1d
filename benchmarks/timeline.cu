// Where the cycles of a step go, on a GPU: the LSTM's loops in bf16 with a clock read between their parts, at the sizes and in the teams
// that the planner chooses. A line of JSON for each loop: the plan, "micros" and "cycles" of a step, "parts" of each warp of the first
// member, medians over steps, and "step", of each warp its marks in one step.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a benchmarks/timeline.cu csrc/cuda/plan.cpp
//
// A part is the time from the mark before it (csrc/cuda/primitives/timeline.h). Backward's "product" has the wait and the barrier in it; of
// a team that scatters "cell" has the wait and "send" the product. Of a known team "end" has the fetch in it. Reading the clock costs some
// cycles itself: "micros" of a launch beside those of the loop without marks says how many.
#if !defined(FUSED_RNN_NO_MARKS)
#define FUSED_RNN_TIMELINE
#endif
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define FUSED_RNN_FORMULA Lstm
#define FUSED_RNN_PRECISION bf16
#include "../csrc/cuda/instantiate.cu"
#include "../csrc/cuda/plan.h"

using namespace fused_rnn;
using namespace fused_rnn::cuda;

namespace {

constexpr int kT = 512, kRuns = 5;
const char* kNames[kMarks] = {"begins", "wait", "product", "barrier", "cell", "send", "end", "store", "fetch"};
const char* kExchanges[] = {"cta", "cluster", "grid", "scatter", "direct"};

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

void* zeros(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes), "cudaMalloc");
  check(cudaMemset(p, 0, bytes), "cudaMemset");
  return p;
}

Device device() {
  Device d;
  int major = 0, minor = 0, shared = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "attribute");
  check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, 0), "attribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "attribute");
  d.arch = 10 * major + minor, d.shared = shared;
  const int counts[kLargestCluster] = {132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7};  // an H200's
  if (major >= 9) std::copy(counts, counts + kLargestCluster, d.clusters);
  return d;
}

const void* kernel_of(const ForwardLoop&, const Plan& plan) {
  const Kernels made = kernels_of<Lstm, Precision::bf16>();
  return reinterpret_cast<const void*>(plan.known < 0 ? made.persistent_fwd[plan.nt / 2] : made.known_fwd[plan.known]);
}
const void* kernel_of(const BackwardLoop&, const Plan& plan) {
  const Kernels made = kernels_of<Lstm, Precision::bf16>();
  return reinterpret_cast<const void*>(plan.known < 0 ? made.persistent_bwd[plan.nt / 2] : made.known_bwd[plan.known]);
}

template <class Loop>
float milliseconds(Loop& loop, const Plan& plan) {
  const void* kernel = kernel_of(loop, plan);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "a cluster of more than 8");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)), "dynamic shared memory");
  const bool grid = meets_in_global_memory(plan.team);
  if (grid) check(cudaMemset(loop.workspace.arrived, 0, 1 << 16), "cudaMemset");
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(loop.steps.tiles * plan.team.members));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.attrs = &attribute;
  config.numAttrs = plan.team.exchange == ExchangeKind::cta ? 0 : 1;
  attribute.id = grid ? cudaLaunchAttributeCooperative : cudaLaunchAttributeClusterDimension;
  if (grid) attribute.val.cooperative = 1;
  else attribute.val.clusterDim = {unsigned(plan.team.members), 1, 1};
  void* arguments[] = {&loop};
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(begin), "cudaEventRecord");
  check(cudaLaunchKernelExC(&config, kernel, arguments), "launch");
  check(cudaEventRecord(end), "cudaEventRecord");
  check(cudaEventSynchronize(end), "the loop");
  float taken = 0;
  check(cudaEventElapsedTime(&taken, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return taken;
}

uint32_t median(std::vector<uint32_t> v) {
  std::nth_element(v.begin(), v.begin() + int64_t(v.size() / 2), v.end());
  return v[v.size() / 2];
}

template <class Loop>
void measure(const char* way, int H, int B, int members, Loop loop, const Device& where) {
  const bool backward = std::is_same_v<Loop, BackwardLoop>;
  Request wanted{Precision::bf16, backward, 4, B, H, 1};
  const bool known = members > 0;
  wanted.known = known, wanted.members = members;
  const Plan plan = make_plan(wanted, where);
  if (!plan.refusal.empty() || (plan.known >= 0) != known || (meets_in_global_memory(plan.team) && plan.waves > 1)) return;
  loop.steps = {kT, 0, kT, 0, kT, 0, 1, nullptr, nullptr, B, 1, H, plan.tiles, 0};
  loop.team = plan.team;
  float best = 1e9f;
  for (int n = 0; n < kRuns; ++n) best = std::min(best, milliseconds(loop, plan));
  std::printf(
      "{\"way\": \"%s\", \"H\": %d, \"B\": %d, \"known\": %d, \"exchange\": \"%s\", \"members\": %d, \"units\": %d, \"rows\": %d, "
      "\"waves\": %d, "
      "\"micros\": %.3f, \"estimated\": %.0f",
      way, H, B, int(known), kExchanges[int(plan.team.exchange)], plan.team.members, plan.team.units, plan.team.rows, plan.waves,
      1e3 * double(best) / kT, plan.cycles.sum());
#if defined(FUSED_RNN_TIMELINE)
  static uint32_t times[kTimedMembers][kTimedWarps][kTimedSteps][kMarks];
  check(cudaMemcpyFromSymbol(times, timeline, sizeof(times)), "cudaMemcpyFromSymbol");
  const int warps = plan.threads / 32, ahead = backward ? -1 : 1, first = backward ? kTimedSteps - 2 : 1;
  std::vector<uint32_t> whole;
  for (int i = 1; i + 1 < kTimedSteps; ++i) whole.push_back(ahead * int(times[0][0][i][kBegins] - times[0][0][i - 1][kBegins]));
  std::printf(", \"cycles\": %u, \"parts\": {", median(whole));
  for (int m = 1; m < kMarks; ++m) {
    std::printf("%s\"%s\": [", m > 1 ? ", " : "", kNames[m]);
    for (int w = 0; w < warps; ++w) {
      std::vector<uint32_t> part;
      for (int i = 1; i + 1 < kTimedSteps; ++i) part.push_back(times[0][w][i][m] - times[0][w][i][m - 1]);
      std::printf("%s%u", w ? ", " : "", median(part));
    }
    std::printf("]");
  }
  // Of one step, each warp's marks by the clock, from the first of them on.
  uint32_t from = times[0][0][first][kBegins];
  for (int w = 1; w < warps; ++w) from = std::min(from, times[0][w][first][kBegins]);
  std::printf("}, \"step\": [");
  for (int w = 0; w < warps; ++w) {
    std::printf("%s[", w ? ", " : "");
    for (int m = 0; m < kMarks; ++m) std::printf("%s%u", m ? ", " : "", times[0][w][first][m] - from);
    std::printf("]");
  }
  std::printf("]");
#endif
  std::printf("}\n");
  std::fflush(stdout);
}

}  // namespace

int main() {
  const Device where = device();
  constexpr size_t kStates = size_t(128) * 1024 * 4, kSteps = size_t(kT) * kStates;
  ForwardLoop forward{};
  BackwardLoop backward{};
  Workspace workspace{zeros(size_t(1) << 24), static_cast<uint32_t*>(zeros(1 << 16))};
  void *gates = zeros(2 * kSteps), *more = zeros(2 * kSteps), *h = zeros(kSteps), *c = zeros(kSteps), *dy = zeros(kSteps);
  void *w = zeros(size_t(4) * 1024 * 1024 * 2), *state = zeros(kStates), *other = zeros(kStates);
  forward.workspace = backward.workspace = workspace;
  forward.gx = gates, forward.w = w, forward.h0 = state, forward.every = 1;
  forward.carried[0] = other;
  backward.dy = dy, backward.w = w, backward.saved = gates, backward.dgates = more;
  backward.states[0] = h, backward.states[1] = c, backward.first[0] = state, backward.first[1] = state;
  backward.dstates[0] = state, backward.dstates[1] = other, backward.histories_are_wide = true, backward.close = true;
  for (const int H : {64, 128, 256, 512, 1024})
    for (const int B : {8, 64, 128}) {
      for (const int members : {0, 4, 8, 16}) {  // 0: by the general kernel, else by those that are compiled for such a team
        if (members && H % members) continue;
        forward.y = h, forward.saved = nullptr, forward.keeps_histories = false;
        measure("inference", H, B, members, forward, where);
        forward.saved = more, forward.histories[0] = c, forward.keeps_histories = forward.histories_are_wide = true;
        measure("forward", H, B, members, forward, where);
        measure("backward", H, B, members, backward, where);
      }
    }
}
