// A stack of layers that runs step by step: weights packed once, the state in the caller's memory.
#pragma once
#include <Python.h>

#include <atomic>
#include <memory>
#include <vector>

#include "packed.h"

namespace fused_rnn::ops {

class Stream {
 public:
  // problem: of the first layer; its T, threads and weights do not matter. states: addresses of h [layers, B, P] and of the others
  // [layers, B, H], of the accumulation dtype, read and written by every run and owned by the caller, who outlives the stream.
  Stream(const Problem& problem, int64_t layers, bool projects, Narrow narrow, std::vector<uintptr_t> states);

  // Takes the weights of every layer as they are now; nothing of them is referred to later.
  void pack(const std::vector<WeightAddresses>& layers) { packed_.pack(layers); }
  // x: [T, B, D], y: [T, B, P], which may be x's memory. Throws std::runtime_error while another thread is in here.
  void run(const void* x, int64_t T, void* y);

  const Problem& problem() const { return problem_; }
  int64_t step_bytes() const { return packed_.bytes(); }  // of weights that every step reads

 private:
  Problem problem_;
  Packed packed_;
  std::vector<uintptr_t> states_;
  size_t element_, wide_;  // bytes of the dtype, of the accumulation dtype
  int64_t turn_ = 0;
  std::atomic<bool> busy_{false};
  std::vector<char> between_[2], copy_;              // outputs of the layers but the last; x where y overlaps it
};

// Adds the class Stream to the module. Its fast_path(like) makes a function step(x, out) that returns None for whatever is not an
// ordinary call on ordinary tensors; like: an empty tensor [B, P] as the results shall be.
void add_stream(PyObject* module);

}  // namespace fused_rnn::ops
