// ../cuda/launch.h on ../emulator: the "device" on which the tests run the CUDA loops.
#include <cstring>

#include "emulate.h"

namespace fused_rnn::cuda {

uint64_t emulated_seed = 0;  // of the schedule of the next launches; ../cuda/python.cpp sets it

namespace {

template <class Loop>
std::string launch_any(Kernel<Loop> kernel, const Loop& loop, const Shape& shape) {
  if (!kernel.loaded) return emulate(kernel.built, loop, shape, emulated_seed);
  std::string error;
  reinterpret_cast<Foreign<Loop>>(kernel.loaded)(loop, shape, emulated_seed, error);
  return error;
}

}  // namespace

std::string launch(Kernel<ForwardLoop> kernel, const ForwardLoop& loop, const Shape& shape, void*) {
  return launch_any(kernel, loop, shape);
}
std::string launch(Kernel<BackwardLoop> kernel, const BackwardLoop& loop, const Shape& shape, void*) {
  return launch_any(kernel, loop, shape);
}
std::string launch(Kernel<Rows> kernel, const Rows& rows, const Shape& shape, void*) { return launch_any(kernel, rows, shape); }
std::string launch(Kernel<Join> kernel, const Join& chunks, const Shape& shape, void*) { return launch_any(kernel, chunks, shape); }
void* load(const void*, const char*, std::string& error) {
  error = "the emulator runs no machine code";
  return nullptr;
}
std::string clear(uint32_t* arrived, int64_t count, void*) {
  memset(arrived, 0, size_t(count) * 4);
  return {};
}
// As large as an H100, so that every plan for one can be run; clusters of any size.
Device device_at(int, std::string&) {
  Device device{90, 132, 227 * 1024};
  for (int size = 1; size <= kLargestCluster; ++size) device.clusters[size - 1] = device.multiprocessors / size;
  return device;
}

}  // namespace fused_rnn::cuda
