// Measures the exchanges of exchange.h on a GPU: a line of JSON each, {"kind", "members", "seconds"} of a round;
// of slices also "bytes", of a member to each peer, "peers", that a warp's store goes to, and bytes of a "piece" of a slice.
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=sm_90a benchmarks/exchange.cu -o exchange && ./exchange
//
// Between a short launch and a long one lie only rounds; the best of a few of each. A member has a multiprocessor to itself.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "exchange.h"

using namespace fused_rnn::exchange;

namespace {

constexpr int kShort = 500, kLong = 4500, kRuns = 5;
constexpr int kAlone = 120 * 1024;  // bytes of shared memory of which no multiprocessor has twice as many

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

FUSED_RNN_KERNEL(kWarp* kSenders) rounds_kernel(const FUSED_RNN_GRID_CONSTANT Exchange p) { run(p); }

// Seconds of a launch; negative where the device has no room for the team.
double seconds(const Exchange& p, int shared) {
  check(cudaMemset(p.counters, 0, kCounters * sizeof(uint32_t)), "cudaMemset");
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(ctas(p)));
  config.blockDim = dim3(unsigned(threads(p)));
  config.dynamicSmemBytes = size_t(shared);
  config.attrs = &attribute;
  config.numAttrs = p.kind == cta ? 0 : 1;
  const bool clusters = p.kind == cluster || p.kind == slices;
  attribute.id = clusters ? cudaLaunchAttributeClusterDimension : cudaLaunchAttributeCooperative;
  if (clusters) attribute.val.clusterDim = {unsigned(p.members), 1, 1};
  else attribute.val.cooperative = 1;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(begin), "cudaEventRecord");
  if (cudaLaunchKernelEx(&config, rounds_kernel, p) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  check(cudaEventRecord(end), "cudaEventRecord");
  check(cudaEventSynchronize(end), "the rounds");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e-3 * milliseconds;
}

bool right(const Exchange& p) {
  std::vector<uint32_t> result(size_t(p.members) * kWarp);
  check(cudaMemcpy(result.data(), p.result, result.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (int rank = 0; rank < p.members; ++rank)
    for (int lane = 0; lane < kWarp; ++lane)
      if (const uint32_t wanted = expected(p, rank, lane); wanted && result[size_t(rank * kWarp + lane)] != wanted) return false;
  return true;
}

void measure(const char* name, Exchange p, int members, int shared) {
  p.members = members;
  double best[2] = {1e9, 1e9};
  for (int n = 0; n < 2 * kRuns; ++n) {
    p.rounds = n % 2 ? kLong : kShort;
    const double taken = seconds(p, shared);
    if (taken < 0) return;
    best[n % 2] = std::min(best[n % 2], taken);
    if (!right(p)) {
      std::fprintf(stderr, "%s of %d: a wrong result\n", name, members);
      std::exit(1);
    }
  }
  std::printf("{\"kind\": \"%s\", \"members\": %d, \"seconds\": %.4g", name, members, (best[1] - best[0]) / (kLong - kShort));
  if (p.kind == slices) std::printf(", \"bytes\": %d, \"peers\": %d, \"piece\": %d", p.bytes, p.peers, p.piece);
  std::printf("}\n");
  std::fflush(stdout);
}

}  // namespace

int main() {
  int multiprocessors = 0, major = 0, shared = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "cudaDeviceGetAttribute");
  shared = std::min(shared, kAlone);
  check(cudaFuncSetAttribute(rounds_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "dynamic shared memory");
  Exchange p{};
  check(cudaMalloc(&p.counters, kCounters * sizeof(uint32_t)), "cudaMalloc");
  check(cudaMalloc(&p.global, kGlobalWords * sizeof(uint32_t)), "cudaMalloc");
  check(cudaMalloc(&p.result, kMost * kWarp * sizeof(uint32_t)), "cudaMalloc");
  p.kind = cta;
  measure("cta", p, 4, shared);
  p.kind = cluster;
  if (major >= 9) {
    check(cudaFuncSetAttribute(rounds_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "a cluster of more than 8");
    for (const int members : {2, 4, 8, 16}) measure("cluster", p, members, shared);
    p.kind = slices;
    for (const int members : {2, 4, 8, 16})
      for (p.bytes = 512; p.bytes <= kLargestSlice; p.bytes *= 2)
        for (p.peers = 1; p.peers <= 8; p.peers *= 8)
          for (p.piece = 64; p.piece <= 512; p.piece *= 8) measure("slices", p, members, shared);
  }
  for (const Kind kind : {grid, flags}) {
    p.kind = kind;
    for (const int members : {2, 4, 8, 16, 32, 64, 128})
      if (members <= multiprocessors) measure(kind == grid ? "grid" : "flags", p, members, shared);
  }
}
