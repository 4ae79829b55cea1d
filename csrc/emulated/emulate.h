// A launch of one kernel on ../emulator.
#pragma once
#include <exception>
#include <mutex>
#include <string>

#include "../cuda/launch.h"
#include "../emulator/emulator.h"

namespace fused_rnn::cuda {

template <class Loop>
std::string emulate(void (*kernel)(Loop), const Loop& loop, const Shape& shape, uint64_t seed) {
  static std::mutex one_at_a_time;  // callers do not hold Python's lock, and there is but one machine
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  try {
    emulator::launch(dim3{unsigned(shape.ctas), 1, 1}, dim3{unsigned(shape.threads), 1, 1}, unsigned(shape.cluster > 1 ? shape.cluster : 0),
                     size_t(shape.shared), {seed, shape.cooperative}, [&] { kernel(loop); });
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

// A kernel of another library, which brings the machine it runs on: its address is what `load` stands for here.
template <class Loop>
using Foreign = void (*)(const Loop& loop, const Shape& shape, uint64_t seed, std::string& error);

}  // namespace fused_rnn::cuda
