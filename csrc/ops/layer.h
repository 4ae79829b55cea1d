// One layer as the ops receive it, checked: sizes, dtypes and devices agree before any kernel sees a pointer.
#pragma once
#include <algorithm>

#include "tensors.h"

namespace fused_rnn::ops {

// With save="recompute" the states but h are kept every so many steps: transforms/fake.py says so too.
constexpr int64_t kCheckpointEvery = 64;
// Their number for T steps, and one or two rows more: torch.compile takes a symbolic size that may be 1 for another program.
inline int64_t checkpoint_rows(int64_t T) { return T / kCheckpointEvery + 2; }

class Layer {
 public:
  Problem p{};
  bool bias = false, projects = false;
  int64_t weights_each = 0;

  Layer(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& states, const MaybeTensor& lengths,
        const MaybeTensor& reset, const std::string& cell, const std::vector<int64_t>& directions)
      : x_(x.dim() == 3 && (x.size(2) == 1 || x.stride(2) == 1) ? x : as_contiguous(x)) {
    p.cell = cell_of(cell);
    p.dtype = dtype_of(x);
    p.R = int64_t(directions.size());
    STD_TORCH_CHECK(p.R > 0, "fused_rnn: directions is empty, expected one of +1 or -1 per recurrence");
    STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "fused_rnn: x has ", x.dim(), " dimensions, expected [T, B, D] or [T, B, R, D]");
    if (x.dim() == 4) check_sizes("x", x, {x.size(0), x.size(1), p.R, x.size(3)});
    p.T = x.size(0);
    p.B = x.size(1);
    p.D = x.size(-1);
    p.start = 0;
    p.stop = p.T;
    weights_each = int64_t(weights.size()) / p.R;
    const int sides = p.cell->recurrent ? 2 : 1, G = p.cell->gates;
    const int params = p.cell->matrices + p.cell->params + p.cell->masks;                 // and matrices and masks of the cell's own
    const int64_t matrices = weights_each - params, most = 2 * sides + p.cell->projects;  // matrices and biases
    STD_TORCH_CHECK(int64_t(weights.size()) == weights_each * p.R && matrices >= sides && matrices <= most, "fused_rnn: weights holds ",
                    weights.size(), " tensors for ", p.R, " recurrence(s), expected ", sides + params, " to ", most + params, " each");
    bias = matrices >= 2 * sides;
    projects = matrices > (bias ? 2 : 1) * sides;
    STD_TORCH_CHECK(!projects || p.cell->projects, "fused_rnn: cell '", shown(cell), "' has no projection (w_hr)");
    const Tensor& rows = weights[size_t(sides - 1)];
    STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) % G == 0, "fused_rnn: ", p.cell->recurrent ? "w_hh" : "w_ih", " has shape ",
                    text(sizes_of(rows)), ", expected [", G, " H, ", p.cell->recurrent ? "P]" : "D]");
    p.H = rows.size(0) / G;
    const int diagonal = p.cell->diagonal;
    p.P = p.cell->recurrent ? rows.size(1) * diagonal : p.H;
    STD_TORCH_CHECK(p.H > 0 && p.D > 0 && p.T > 0, "fused_rnn: T, D and H must be positive, got T=", p.T, ", D=", p.D, ", H=", p.H);
    STD_TORCH_CHECK(p.H % diagonal == 0, "fused_rnn: w_hh has shape ", text(sizes_of(rows)), ", expected [", G, " H, H / ", diagonal,
                    "] of an H that ", diagonal, " divides: it has as many blocks");
    STD_TORCH_CHECK(projects || p.P == p.H, "fused_rnn: w_hh has shape ", text(sizes_of(rows)), " without a projection, expected [",
                    G * p.H, ", ", p.H / diagonal, "]");
    held_.reserve(weights.size());
    weights_.resize(size_t(p.R));
    for (int64_t r = 0; r < p.R; ++r) {
      const size_t i = size_t(r * weights_each);
      Weights& w = weights_[size_t(r)];
      w = {};
      w.w_ih = hold("w_ih", weights[i], {G * p.H, p.D});
      if (p.cell->recurrent) w.w_hh = hold("w_hh", weights[i + 1], {G * p.H, p.P / diagonal});
      if (bias) w.b_ih = hold("b_ih", weights[i + size_t(sides)], {G * p.H});
      if (bias && p.cell->recurrent) w.b_hh = hold("b_hh", weights[i + 3], {G * p.H});
      if (projects) w.w_hr = hold("w_hr", weights[i + size_t(matrices) - 1], {p.P, p.H});
      const Tensor* own = &weights[i] + matrices;
      for (int k = 0; k < p.cell->matrices; ++k) w.matrices[k] = hold("a matrix", *own++, {p.cell->blocks_of[k] * p.H, p.H});
      for (int k = 0; k < p.cell->params; ++k) w.params[k] = hold("a param", *own++, {p.H});
      for (int k = 0; k < p.cell->masks; ++k, ++own) {
        const bool constant = own->dim() == 3 && own->size(0) == 1;
        w.masks[k] = hold("a mask", *own, {constant ? 1 : p.T, p.B, p.H});
        w.mask_time[k] = constant ? 0 : p.B * p.H;
      }
      STD_TORCH_CHECK(directions[size_t(r)] == 1 || directions[size_t(r)] == -1, "fused_rnn: a direction is ", directions[size_t(r)],
                      ", expected +1 or -1");
      w.direction = int(directions[size_t(r)]);
    }
    p.weights = weights_.data();
    check_states("0", states);
    if (lengths) {
      STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long && lengths->is_cpu(), "fused_rnn: lengths must be int64 on x's device");
      check_sizes("lengths", *lengths, {p.B});
      lengths_ = as_contiguous(*lengths);
      p.lengths = static_cast<const int64_t*>(lengths_->const_data_ptr());
    }
    if (reset) {
      STD_TORCH_CHECK(reset->scalar_type() == ScalarType::Bool && reset->is_cpu(), "fused_rnn: reset must be bool on x's device");
      check_sizes("reset", *reset, {p.T, p.B});
      reset_ = as_contiguous(*reset);
      p.reset = static_cast<const uint8_t*>(reset_->const_data_ptr());
    }
    p.threads = threads_for(p);
  }

  Input input() const { return {x_.const_data_ptr(), x_.stride(0), x_.stride(1), x_.dim() == 4 ? x_.stride(2) : 0}; }

  // What there is of each state of the cell: nothing, or all of them. suffix: what errors write behind a state's name.
  void check_states(const char* suffix, const std::vector<Tensor>& given) const {
    STD_TORCH_CHECK(given.empty() || int(given.size()) == p.cell->states, "fused_rnn: got ", given.size(), " states, expected none or the ",
                    p.cell->states, " of a ", shown(p.cell->name));
    for (size_t i = 0; i < given.size(); ++i) check((p.cell->state_names[i] + std::string(suffix)).c_str(), given[i], {p.R, p.B, width(i)});
  }
  // States, or their gradients, in the accumulation dtype, memory of its own: the loops leave there what comes out. Zero where none are
  // given.
  std::vector<Tensor> wide_states(const std::vector<Tensor>& given) const {
    const ScalarType wide = accumulation_type(x_);
    std::vector<Tensor> made;
    for (size_t i = 0; i < size_t(p.cell->states); ++i)
      made.push_back(given.empty() ? zeros({p.R, p.B, width(i)}, wide) : copied(given[i], wide));
    return made;
  }
  // The same to be read alone: where none are given all are one.
  std::vector<Tensor> entering_states(const std::vector<Tensor>& given) const {
    if (!given.empty()) return wide_states(given);
    return std::vector<Tensor>(size_t(p.cell->states), zeros({p.R, p.B, std::max(p.P, p.H)}, accumulation_type(x_)));
  }
  // The states that enter every kCheckpointEvery-th step, for the loop to fill; the rows that it will not reach are zero.
  Tensor checkpoints() const {
    const int64_t used = (p.T + kCheckpointEvery - 1) / kCheckpointEvery, rows = checkpoint_rows(p.T);
    const Tensor made = empty({rows, p.R, p.B, p.H}, accumulation_type(x_));
    const size_t row = size_t(p.R * p.B * p.H) * made.element_size();
    if (row > 0) memset(static_cast<char*>(made.mutable_data_ptr()) + size_t(used) * row, 0, size_t(rows - used) * row);
    return made;
  }
  // Of h the output's width.
  int64_t width(size_t state) const { return state == 0 ? p.P : p.H; }

  void check(const char* name, const Tensor& t, const Sizes& sizes) const {
    STD_TORCH_CHECK(t.is_cpu(), "fused_rnn: ", name, " is not on the cpu, as x is");
    STD_TORCH_CHECK(t.scalar_type() == x_.scalar_type(), "fused_rnn: ", name, " differs from x in dtype");
    check_sizes(name, t, sizes);
  }

 private:
  const void* hold(const char* name, const Tensor& t, const Sizes& sizes) {
    check(name, t, sizes);
    held_.push_back(as_contiguous(t));
    return held_.back().const_data_ptr();
  }

  Tensor x_;
  std::vector<Tensor> held_;
  std::vector<Weights> weights_;
  MaybeTensor lengths_, reset_;
};

}  // namespace fused_rnn::ops
