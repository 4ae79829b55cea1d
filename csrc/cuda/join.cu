#include "join.h"

#include "launch.h"

namespace fused_rnn::cuda {

std::string join(const Join& chunks, bool is_double, void* stream) {
  const Kernel<Join> kernel{is_double ? &join_kernel<double> : &join_kernel<float>};
  const int64_t elements = chunks.size * chunks.states;
  return launch(kernel, chunks, {(elements + kJoinThreads - 1) / kJoinThreads, kJoinThreads, 1, 0, false}, stream);
}

}  // namespace fused_rnn::cuda
