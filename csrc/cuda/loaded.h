// Kernels that were compiled at run time, by the CUDA driver. It is looked up when the first one is loaded: the module loads where there is
// no driver.
#pragma once
#include <cstdint>
#include <string>

#include "launch.h"

namespace fused_rnn::cuda {

// What a kernel has been permitted to use: asked for once per kernel and device, since asking costs microseconds.
struct Permitted {
  bool clusters = false;
  int64_t shared = 0;
};

// kernel: as `load` gave it.
std::string launch_loaded(void* kernel, const void* loop, const Shape& shape, void* stream);

}  // namespace fused_rnn::cuda
