// Launches on a GPU, by the CUDA runtime, which is linked statically: the module loads where there is no driver.
#include "launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "loaded.h"

namespace fused_rnn::cuda {
namespace {

std::string text(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // not left behind for somebody else's check
  return std::string(what) + ": " + cudaGetErrorString(error);
}

std::string permit(const void* kernel, const Shape& shape) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Permitted> known;
  int device = 0;
  if (std::string error = text("cudaGetDevice", cudaGetDevice(&device)); !error.empty()) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  Permitted& permitted = known[{kernel, device}];
  if (shape.cluster > 8 && !permitted.clusters) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return text("a cluster of more than 8", error);
    permitted.clusters = true;
  }
  if (shape.shared > permitted.shared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared));
    if (error != cudaSuccess) return text("dynamic shared memory", error);
    permitted.shared = shape.shared;
  }
  return {};
}

std::string launch_any(const void* kernel, const void* loop, const Shape& shape, void* stream) {
  if (std::string error = permit(kernel, shape); !error.empty()) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.ctas));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(shape.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  void* arguments[] = {const_cast<void*>(loop)};
  return text("launch", cudaLaunchKernelExC(&config, kernel, arguments));
}

// The loops' kernels differ in registers and shared memory, but the planner counts a multiprocessor for each CTA; so does a kernel that
// takes all of the shared memory, and by it the current device is asked.
__global__ void __launch_bounds__(kThreads) alone_kernel() {}

std::string count_clusters(Device& device) {
  const void* kernel = reinterpret_cast<const void*>(&alone_kernel);
  cudaFuncAttributes code;
  if (std::string error = text("cudaFuncGetAttributes", cudaFuncGetAttributes(&code, kernel)); !error.empty()) return error;
  if (code.ptxVersion < 90) return {};  // PTX of an older architecture, which the driver compiled: its kernels have no clusters
  if (std::string error = permit(kernel, {0, kThreads, kLargestCluster, device.shared, false}); !error.empty()) return error;
  for (int size = 1; size <= kLargestCluster; ++size) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(size));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(device.shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t asked = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (asked != cudaSuccess) cudaGetLastError();  // the device has no clusters of this size
    device.clusters[size - 1] = asked == cudaSuccess ? clusters : 0;
  }
  return {};
}

}  // namespace

std::string launch(Kernel<ForwardLoop> kernel, const ForwardLoop& loop, const Shape& shape, void* stream) {
  if (kernel.loaded) return launch_loaded(kernel.loaded, &loop, shape, stream);
  return launch_any(reinterpret_cast<const void*>(kernel.built), &loop, shape, stream);
}
std::string launch(Kernel<BackwardLoop> kernel, const BackwardLoop& loop, const Shape& shape, void* stream) {
  if (kernel.loaded) return launch_loaded(kernel.loaded, &loop, shape, stream);
  return launch_any(reinterpret_cast<const void*>(kernel.built), &loop, shape, stream);
}
std::string launch(Kernel<Rows> kernel, const Rows& rows, const Shape& shape, void* stream) {
  return launch_any(reinterpret_cast<const void*>(kernel.built), &rows, shape, stream);
}
std::string launch(Kernel<Join> kernel, const Join& chunks, const Shape& shape, void* stream) {
  return launch_any(reinterpret_cast<const void*>(kernel.built), &chunks, shape, stream);
}
std::string clear(uint32_t* arrived, int64_t count, void* stream) {
  return text("cudaMemsetAsync", cudaMemsetAsync(arrived, 0, size_t(count) * 4, static_cast<cudaStream_t>(stream)));
}

Device device_at(int index, std::string& error) {
  Device device;
  int major = 0, minor = 0, shared = 0, current = 0;
  for (const auto& [attribute, value] : {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
                                         {cudaDevAttrComputeCapabilityMinor, &minor},
                                         {cudaDevAttrMultiProcessorCount, &device.multiprocessors},
                                         {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}}) {
    error = text("cudaDeviceGetAttribute", cudaDeviceGetAttribute(value, attribute, index));
    if (!error.empty()) return {};
  }
  device.arch = 10 * major + minor;
  device.shared = shared;
  if (major < 9) return device;
  error = text("cudaGetDevice", cudaGetDevice(&current));
  if (error.empty()) error = text("cudaSetDevice", cudaSetDevice(index));
  if (!error.empty()) return {};
  error = count_clusters(device);
  const std::string back = text("cudaSetDevice", cudaSetDevice(current));
  if (error.empty()) error = back;
  return error.empty() ? device : Device{};
}

}  // namespace fused_rnn::cuda
