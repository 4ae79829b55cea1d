#include "loaded.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <mutex>

namespace fused_rnn::cuda {
namespace {

// A function of a device's context, and what it may use.
struct Loaded {
  CUfunction function = nullptr;
  std::mutex mutex;
  Permitted permitted;
};

// The driver's functions, by the names of their versions.
struct Driver {
  decltype(&cuCtxGetCurrent) context = nullptr;
  decltype(&cuModuleLoadData) load = nullptr;
  decltype(&cuModuleGetFunction) function = nullptr;
  decltype(&cuFuncSetAttribute) permit = nullptr;
  decltype(&cuLaunchKernelEx) launch = nullptr;
  decltype(&cuGetErrorString) words = nullptr;
  std::string missing;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      missing = "libcuda.so.1 cannot be loaded";
      return;
    }
    find(library, "cuCtxGetCurrent", context);
    find(library, "cuModuleLoadData", load);
    find(library, "cuModuleGetFunction", function);
    find(library, "cuFuncSetAttribute", permit);
    find(library, "cuLaunchKernelEx", launch);
    find(library, "cuGetErrorString", words);
  }
  template <class Function>
  void find(void* library, const char* name, Function& found) {
    found = reinterpret_cast<Function>(dlsym(library, name));
    if (!found) missing = std::string("the driver is too old: it has no ") + name;
  }
  std::string text(const char* what, CUresult result) const {
    if (result == CUDA_SUCCESS) return {};
    const char* said = nullptr;
    words(result, &said);
    return std::string(what) + ": " + (said ? said : "an unknown error");
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// The driver's functions work in the thread's current context, which the runtime makes current when it is first asked for something.
std::string enter_context() {
  CUcontext current = nullptr;
  if (driver().context(&current) == CUDA_SUCCESS && current) return {};
  const cudaError_t error = cudaFree(nullptr);
  return error == cudaSuccess ? std::string() : std::string("cudaFree: ") + cudaGetErrorString(error);
}

std::string permit(Loaded& kernel, const Shape& shape) {
  const std::lock_guard<std::mutex> lock(kernel.mutex);
  const auto set = [&](CUfunction_attribute attribute, int value) { return driver().permit(kernel.function, attribute, value); };
  if (shape.cluster > 8 && !kernel.permitted.clusters) {
    const CUresult result = set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
    if (result != CUDA_SUCCESS) return driver().text("a cluster of more than 8", result);
    kernel.permitted.clusters = true;
  }
  if (shape.shared > kernel.permitted.shared) {
    const CUresult result = set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shape.shared));
    if (result != CUDA_SUCCESS) return driver().text("dynamic shared memory", result);
    kernel.permitted.shared = shape.shared;
  }
  return {};
}

}  // namespace

void* load(const void* image, const char* name, std::string& error) {
  if (!(error = driver().missing).empty()) return nullptr;
  if (!(error = enter_context()).empty()) return nullptr;
  CUmodule module = nullptr;
  if (!(error = driver().text("cuModuleLoadData", driver().load(&module, image))).empty()) return nullptr;
  auto* made = new Loaded;  // for good, as is the module: whoever launches it keeps no count
  error = driver().text("cuModuleGetFunction", driver().function(&made->function, module, name));
  return error.empty() ? made : nullptr;
}

std::string launch_loaded(void* kernel, const void* loop, const Shape& shape, void* stream) {
  Loaded& loaded = *static_cast<Loaded*>(kernel);
  if (std::string error = enter_context(); !error.empty()) return error;
  if (std::string error = permit(loaded, shape); !error.empty()) return error;
  CUlaunchAttribute attributes[2];
  CUlaunchConfig config{};
  config.gridDimX = unsigned(shape.ctas);
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = unsigned(shape.threads);
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = unsigned(shape.shared);
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[config.numAttrs].value.clusterDim = {unsigned(shape.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attributes[config.numAttrs].value.cooperative = 1;
    ++config.numAttrs;
  }
  void* arguments[] = {const_cast<void*>(loop)};
  return driver().text("launch", driver().launch(&config, loaded.function, arguments, nullptr));
}

}  // namespace fused_rnn::cuda
