// The weights of all layers and directions of a module, packed once for many calls, and narrower, if asked.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../params.h"

namespace fused_rnn::ops {

// Addresses of w_ih, w_hh, b_ih, b_hh, w_hr, and of the cell's own matrices and params, of a recurrence, as in fused_rnn::Weights; 0 where
// there is none.
using WeightAddresses = std::vector<uintptr_t>;

class Packed {
 public:
  // problem: of the first layer; its T, B, R, threads and weights do not matter.
  Packed(const Problem& problem, int64_t layers, int64_t directions, bool projects, Narrow narrow);

  // Takes the weights as they are now, of every direction of every layer; nothing of them is referred to later.
  void pack(const std::vector<WeightAddresses>& recurrences);
  // Has a call run layer l: of f.p what the weights say, and the panels. w: room for each direction's, which f then refers to.
  void give(int64_t l, Weights* w, Forward& f) const;

  const Problem& problem() const { return problem_; }
  int64_t layers() const { return layers_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  Problem problem_;
  int64_t layers_, bytes_ = 0;
  bool projects_;
  Narrow narrow_;
  std::vector<std::unique_ptr<void, Free>> panels_;  // by layer and direction
  std::vector<const void*> addresses_;               // theirs
};

}  // namespace fused_rnn::ops
