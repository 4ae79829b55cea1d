// One source for both machines: g++ runs these kernels in the emulator, nvcc on a GPU. A test is a function; the program takes names of
// tests, or none for all, and returns the number of those that failed.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/primitives/platform.h"

namespace harness {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

#define TEST(name) \
  static void name(); \
  static harness::Register register_##name(#name, name); \
  static void name()

#define REQUIRE(condition, ...) \
  do { \
    if (!(condition)) throw std::runtime_error(harness::text(#condition " does not hold", ##__VA_ARGS__)); \
  } while (false)

inline std::string text(const char* what) { return what; }
template <class... Numbers>
std::string text(const char* what, Numbers... numbers) {
  std::string line = what;
  ((line += " " + std::to_string(numbers)), ...);
  return line;
}

struct Shape {
  unsigned ctas = 1, threads = 32, cluster = 0;  // 0: not launched as clusters, which is more than clusters of one
  int shared = 0;
  bool cooperative = false;
};

// ---- how a kernel runs: Kernel::body(arguments...) in every thread

#if defined(FUSED_RNN_EMULATE)

inline int seeds = 4;

template <class T>
struct Buffer {
  explicit Buffer(size_t n) : memory(n) {}
  T* data() { return memory.data(); }
  T& operator[](size_t i) { return memory[i]; }
  size_t size() const { return memory.size(); }
  std::vector<T> memory;
};

template <class Kernel, class... Arguments>
void launch(Shape shape, uint64_t seed, Arguments... arguments) {
  fused_rnn::emulator::Options options;
  options.seed = seed;
  options.cooperative = shape.cooperative;
  fused_rnn::emulator::launch(dim3(shape.ctas), dim3(shape.threads), shape.cluster, size_t(shape.shared), options,
                              [=] { Kernel::body(arguments...); });
}

inline bool has_cluster() { return true; }

#else

inline int seeds = 1;

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Each has memory on the host and on the device, by plain allocations: all go up before a launch and come back after it.
struct Mirror {
  void *host, *device;
  size_t bytes;
};
inline std::vector<Mirror>& mirrors() {
  static std::vector<Mirror> all;
  return all;
}

template <class T>
struct Buffer {
  explicit Buffer(size_t n) : memory(n) {
    check(cudaMalloc(&device, n * sizeof(T)));
    mirrors().push_back({memory.data(), device, n * sizeof(T)});
  }
  ~Buffer() {
    for (auto m = mirrors().begin(); m != mirrors().end(); ++m)
      if (m->device == device) {
        mirrors().erase(m);
        break;
      }
    cudaFree(device);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return device; }  // for kernels
  T& operator[](size_t i) { return memory[i]; }
  size_t size() const { return memory.size(); }
  std::vector<T> memory;
  T* device = nullptr;
};

template <class Kernel, class... Arguments>
__global__ void __launch_bounds__(1024) entry(Arguments... arguments) {
  Kernel::body(arguments...);
}

template <class Kernel, class... Arguments>
void launch(Shape shape, uint64_t, Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = shape.cooperative;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.ctas);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = size_t(shape.shared);
  config.attrs = attributes;
  config.numAttrs = shape.cluster ? 2 : 1;
  for (const Mirror& m : mirrors()) check(cudaMemcpy(m.device, m.host, m.bytes, cudaMemcpyHostToDevice));
  check(cudaLaunchKernelEx(&config, entry<Kernel, Arguments...>, arguments...));
  check(cudaDeviceSynchronize());
  for (const Mirror& m : mirrors()) check(cudaMemcpy(m.host, m.device, m.bytes, cudaMemcpyDeviceToHost));
}

inline bool has_cluster() {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major >= 9;
}

#endif

// What a wrong kernel must end in.
template <class Run>
void expect_error(const char* part, Run run) {
  try {
    run();
  } catch (const std::exception& error) {
    if (std::strstr(error.what(), part)) return;
    throw std::runtime_error(std::string("expected an error with \"") + part + "\", got: " + error.what());
  }
  throw std::runtime_error(std::string("expected an error with \"") + part + "\", got none");
}

inline int run_all(int count, char** names) {
  int failed = 0;
  for (const Test& test : tests()) {
    bool wanted = count <= 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(names[i], test.name) == 0;
    if (!wanted) continue;
    try {
      test.run();
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED  %s: %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  return failed;
}

}  // namespace harness
