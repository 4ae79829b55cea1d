// ../cuda/launch.h on ../emulator: the "device" on which the tests run the CUDA loops.
#include "../cuda/launch.h"

#include <cstring>
#include <exception>
#include <mutex>

#include "../emulator/emulator.h"

namespace fused_rnn::cuda {

uint64_t emulated_seed = 0;  // of the schedule of the next launches; ../cuda/python.cpp sets it

namespace {

template <class Loop>
std::string emulate(void (*kernel)(Loop), const Loop& loop, const Shape& shape) {
  static std::mutex one_at_a_time;  // callers do not hold Python's lock, and there is but one machine
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  try {
    emulator::launch(dim3{unsigned(shape.ctas), 1, 1}, dim3{unsigned(shape.threads), 1, 1}, unsigned(shape.cluster > 1 ? shape.cluster : 0),
                     size_t(shape.shared), {emulated_seed, shape.cooperative}, [&] { kernel(loop); });
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

}  // namespace

std::string launch(void (*kernel)(ForwardLoop), const ForwardLoop& loop, const Shape& shape, void*) { return emulate(kernel, loop, shape); }
std::string launch(void (*kernel)(BackwardLoop), const BackwardLoop& loop, const Shape& shape, void*) {
  return emulate(kernel, loop, shape);
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
