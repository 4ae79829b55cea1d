// A plain layer on a GPU, or in its emulator, from C++: what surrounds a persistent loop (fused_rnn/gpu/run.py) where there is one input
// for all recurrences and no projection or param, and gates are kept or nothing is. A short call takes the host longer than the
// device, and most of it is Python's. Whatever is not plain gets an empty list, and takes the way of Python, which has the errors too.
#include "../cuda/calls.h"
#include "../cuda/params.h"
#include "aten.h"

namespace fused_rnn::ops {
namespace {

using torch::stable::copy_;
using torch::stable::zero_;

bool starts_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Arrays in one piece of memory, each at an address that 16 divides.
class Pieces {
 public:
  // One more; returns its place.
  int64_t add(int64_t numbers) {
    const int64_t place = total_;
    total_ += (numbers + 3) / 4 * 4;
    return place;
  }
  void make(const Tensor& like, ScalarType type, bool zero) {
    if (total_ == 0) return;
    memory_ = empty_beside(like, {total_}, type);
    if (zero) zero_(*memory_);
  }
  Tensor of(int64_t place, const Sizes& sizes) const { return reshaped(*memory_, sizes, place); }

 private:
  int64_t total_ = 0;
  MaybeTensor memory_;
};

// What fused_rnn/cuda/plain.py says of a loop, and what its arguments have to fit.
struct Plain {
  cuda::RunOver run;
  const void* loop;
  void* stream;
  cuda::CopyRows copy;
  int64_t workspace, B, H, R, G, apart, saved, states, carried;
  int64_t T = 0, D = 0, each = 0;  // weights of a recurrence
  bool fits = false;
  cuda::Steps steps{};  // of one direction
  Tensor x;

  Plain(const std::vector<int64_t>& told, const Tensor& input, const std::vector<Tensor>& weights, const std::vector<Tensor>& given,
        const MaybeTensor& lengths, const MaybeTensor& reset)
      : x(input) {
    STD_TORCH_CHECK(told.size() == 13, "fused_rnn: told has ", told.size(), " numbers, expected 13");
    run = reinterpret_cast<cuda::RunOver>(told[0]);
    loop = reinterpret_cast<const void*>(told[1]);
    stream = reinterpret_cast<void*>(told[2]);
    copy = reinterpret_cast<cuda::CopyRows>(told[3]);
    workspace = told[4], B = told[5], H = told[6], R = told[7], G = told[8], apart = told[9], saved = told[10], states = told[11];
    carried = told[12];
    if (R < 1 || x.dim() != 3 || x.size(1) != B || B == 0 || !x.is_contiguous()) return;
    T = x.size(0), D = x.size(2), each = int64_t(weights.size()) / R;
    if (T == 0 || D == 0 || T > 0x7fffffff || int64_t(weights.size()) != each * R || (each != 2 && each != 4)) return;
    for (int64_t r = 0; r < R; ++r) {
      const Tensor* const w = &weights[size_t(r * each)];
      if (!is(w[0], {G * H, D}) || !is(w[1], {G * H, H}) || !starts_aligned(w[1])) return;
      if (each == 4 && (!is(w[2], {G * H}) || !is(w[3], {G * H}))) return;
    }
    if (!are_states(given)) return;
    const auto is_mask = [&](const MaybeTensor& t, ScalarType type, const Sizes& sizes) {
      return !t || (t->scalar_type() == type && has(*t, sizes));
    };
    fits = is_mask(lengths, ScalarType::Long, {B}) && is_mask(reset, ScalarType::Bool, {T, B}) && (!lengths || starts_aligned(*lengths));
    if (!fits) return;
    steps.T = int(T), steps.B = int(B), steps.R = int(R), steps.H.told = int(H), steps.period = 1;
    if (lengths) steps.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    if (reset) {
      flags_ = empty_beside(x, {T, B}, ScalarType::Int);
      copy_(*flags_, *reset);
      steps.reset = static_cast<const int32_t*>(flags_->const_data_ptr());
    }
  }

  // Of x's type and device, contiguous, of these sizes.
  bool is(const Tensor& t, const Sizes& sizes) const { return t.scalar_type() == x.scalar_type() && has(t, sizes); }
  // None of them, or one for each of the cell's.
  bool are_states(const std::vector<Tensor>& given) const {
    if (!given.empty() && int64_t(given.size()) != states) return false;
    for (const Tensor& state : given)
      if (!is(state, {R, B, H}) || !starts_aligned(state)) return false;
    return true;
  }
  Tensor rows() const { return reshaped(x, {T * B, D}); }
  Tensor w_hh(const std::vector<Tensor>& weights) const { return of_all(weights, 1); }
  // Weight i of all recurrences, one after the other.
  Tensor of_all(const std::vector<Tensor>& weights, int64_t i) const {
    std::vector<Tensor> parts;
    for (int64_t r = 0; r < R; ++r) parts.push_back(weights[size_t(r * each + i)]);
    return joined(parts);
  }
  Tensor empty(const Sizes& sizes) const { return empty_beside(x, sizes); }
  ScalarType wide() const { return accumulation_type(x); }

  template <class Loop>
  void over(Loop& arrays) const {
    arrays.steps = steps;
    const Tensor shared = empty_beside(x, {(workspace + 3) / 4}, ScalarType::Float);
    const char* const error = run(loop, &arrays, shared.mutable_data_ptr(), stream);
    STD_TORCH_CHECK(!error, "fused_rnn: ", error);
  }
  // Rows [T B, width] of an array with so many elements a row, from its element `at` on; or with `first` what entered each step.
  Tensor rows_of_steps(const Tensor& from, int64_t at, int64_t stride, int64_t width, bool backwards, const void* first = nullptr) const {
    const Tensor to = empty({T * B, width});
    const auto size = int64_t(x.element_size());
    cuda::Rows rows{
        steps, 0, int(size), int(width), stride, static_cast<const char*>(from.const_data_ptr()) + at * size, first, to.mutable_data_ptr()};
    rows.steps.reversed = backwards;
    rows.steps.window1 = rows.steps.T;
    const char* const error = copy(&rows, stream);
    STD_TORCH_CHECK(!error, "fused_rnn: ", error);
    return to;
  }

 private:
  bool has(const Tensor& t, const Sizes& sizes) const {
    if (t.dim() != int64_t(sizes.size()) || !t.is_contiguous() || t.is_cpu() != x.is_cpu() || t.is_cuda() != x.is_cuda()) return false;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (t.size(int64_t(i)) != sizes[i]) return false;
    return t.get_device_index() == x.get_device_index();
  }

  MaybeTensor flags_;
};

// x W_ih^T and the biases that are added before the cell: b_ih + b_hh, less the part of b_hh that enters the cell apart.
Tensor input_product(const Plain& p, const std::vector<Tensor>& weights) {
  MaybeTensor bias;
  if (p.each == 4) {
    std::vector<Tensor> parts;
    const int64_t both = (p.G - p.apart) * p.H;
    for (int64_t r = 0; r < p.R; ++r) {
      const Tensor &b_ih = weights[size_t(r * 4 + 2)], &b_hh = weights[size_t(r * 4 + 3)];
      parts.push_back(p.apart ? added(rows_of(b_ih, 0, both), rows_of(b_hh, 0, both)) : added(b_ih, b_hh));
      if (p.apart) parts.push_back(rows_of(b_ih, both, p.apart * p.H));
    }
    bias = joined(parts);
  }
  return linear(p.rows(), p.of_all(weights, 0), bias);
}

// As fused_rnn/gpu/run.py's `forward`, whose outputs it has.
std::vector<Tensor> plain_forward(std::vector<int64_t> told, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> states,
                                  MaybeTensor lengths, MaybeTensor reset, bool keep_gates, bool keep_hidden) {
  const Plain p(told, x, weights, states, lengths, reset);
  if (!p.fits) return {};
  const bool zero = states.empty();
  const int64_t numbers = p.R * p.B * p.H, first = p.states - p.carried;
  const Sizes shape{p.R, p.B, p.H};

  cuda::ForwardLoop loop{};
  const Tensor gx = input_product(p, weights), w = p.w_hh(weights);
  loop.gx = gx.const_data_ptr();
  loop.w = w.const_data_ptr();
  // Zeros of the type of x are zeros of a wider one, too.
  Pieces wide, zeros;
  std::vector<int64_t> carried;
  Pieces& holds_carried = zero ? zeros : wide;
  for (int64_t k = 0; k < p.carried; ++k) carried.push_back(holds_carried.add(numbers));
  const int64_t h_zero = zero ? zeros.add(numbers) : 0, bias_zero = p.apart && p.each == 2 ? zeros.add(p.R * p.apart * p.H) : 0;
  wide.make(x, p.wide(), false);
  zeros.make(x, p.wide(), true);
  std::vector<Tensor> carries;
  for (int64_t k = 0; k < p.carried; ++k) {
    carries.push_back(holds_carried.of(carried[size_t(k)], shape));
    if (!zero) copy_(carries.back(), states[size_t(first + k)]);
    loop.carried[k] = carries.back().mutable_data_ptr();
  }
  const Tensor h0 = zero ? zeros.of(h_zero, shape) : states[0];
  loop.h0 = h0.const_data_ptr();
  MaybeTensor bias;
  if (p.apart && p.each == 2) {
    bias = zeros.of(bias_zero, {p.R * p.apart * p.H});
  } else if (p.apart) {
    std::vector<Tensor> parts;
    for (int64_t r = 0; r < p.R; ++r) parts.push_back(rows_of(weights[size_t(r * 4 + 3)], (p.G - p.apart) * p.H, p.apart * p.H));
    bias = joined(parts);
    if (!starts_aligned(*bias)) bias = torch::stable::clone(*bias);
  }
  if (bias) loop.bias = bias->const_data_ptr();

  std::vector<Tensor> out{p.empty({p.T, p.B, p.R * p.H}), p.empty(shape)};
  loop.y = out[0].mutable_data_ptr();
  loop.h_n = out[1].mutable_data_ptr();
  std::vector<Tensor> kept;
  if (keep_gates) {
    kept.push_back(p.empty({p.T, p.B, p.R, p.saved, p.H}));
    loop.saved = kept[0].mutable_data_ptr();
    for (int64_t s = 1; s < p.states; ++s) {
      kept.push_back(p.empty({p.T, p.B, p.R, p.H}));
      loop.histories[s - 1] = kept.back().mutable_data_ptr();
    }
    loop.keeps_histories = p.states > 1;
  }
  loop.every = 1;
  p.over(loop);

  for (int64_t s = 1; s < p.states; ++s) {
    Tensor after = p.empty(shape);
    copy_(after, carries[size_t(s - first)]);
    out.push_back(after);
  }
  if (keep_gates) {
    kept.push_back(keep_hidden ? torch::stable::clone(out[0]) : p.empty({0}));
    out.insert(out.end(), kept.begin(), kept.end());
  }
  return out;
}

// Rows of gates as the input side of dgates has them, in which the last gates that are apart come first; or back.
Tensor reordered(const Plain& p, const Tensor& rows, bool back) {
  if (!p.apart) return rows;
  const int64_t all = p.G * p.H, front = (back ? p.apart : p.G - p.apart) * p.H;
  return joined({rows_of(rows, front, all - front), rows_of(rows, 0, front)});
}

// As fused_rnn/gpu/run.py's `backward`, whose outputs it has.
std::vector<Tensor> plain_backward(std::vector<int64_t> told, MaybeTensor dy, std::vector<Tensor> dstates, Tensor x,
                                   std::vector<Tensor> weights, std::vector<Tensor> states, MaybeTensor lengths, MaybeTensor reset,
                                   Tensor hidden, Tensor saved, std::vector<Tensor> histories, std::vector<int64_t> directions,
                                   bool need_dx, bool need_dw) {
  const Plain p(told, x, weights, states, lengths, reset);
  if (!p.fits || !p.are_states(dstates) || int64_t(histories.size()) != p.states - 1 || int64_t(directions.size()) != p.R) return {};
  const auto is_aligned = [&](const Tensor& t, const Sizes& sizes) { return p.is(t, sizes) && starts_aligned(t); };
  const Sizes shape{p.R, p.B, p.H}, over_time{p.T, p.B, p.R * p.H};
  if (!is_aligned(hidden, over_time) || (dy && !is_aligned(*dy, over_time))) return {};
  if (!is_aligned(saved, {p.T, p.B, p.R, p.saved, p.H})) return {};
  for (const Tensor& history : histories)
    if (!is_aligned(history, {p.T, p.B, p.R, p.H})) return {};
  const bool zero = states.empty(), no_dstates = dstates.empty();
  const int64_t numbers = p.R * p.B * p.H, all = p.G + p.apart;

  cuda::BackwardLoop loop{};
  const Tensor w = p.w_hh(weights), dgates = p.empty({p.T, p.B, p.R, all, p.H});
  Pieces wide, zeros;
  std::vector<int64_t> places;
  Pieces& holds = no_dstates ? zeros : wide;
  for (int64_t s = 0; s < p.states; ++s) places.push_back(holds.add(numbers));
  const int64_t initial = zero ? zeros.add(numbers) : 0;  // of all states the same
  wide.make(x, p.wide(), false);
  zeros.make(x, p.wide(), true);
  std::vector<Tensor> gradients;
  const MaybeTensor entering = zero ? MaybeTensor(zeros.of(initial, shape)) : MaybeTensor();
  for (size_t s = 0; s < size_t(p.states); ++s) {
    gradients.push_back(holds.of(places[s], shape));
    if (!no_dstates) copy_(gradients[s], dstates[s]);
    loop.dstates[s] = gradients[s].mutable_data_ptr();
    loop.states[s] = (s ? histories[s - 1] : hidden).const_data_ptr();
    loop.first[s] = (zero ? *entering : states[s]).const_data_ptr();
  }
  loop.dy = dy ? dy->const_data_ptr() : nullptr;
  loop.w = w.const_data_ptr();
  loop.saved = p.saved ? saved.const_data_ptr() : nullptr;
  loop.dgates = dgates.mutable_data_ptr();
  p.over(loop);

  // Each recurrence's gradients as a matrix: a step's vectors first .. first + count - 1 in a row.
  const int64_t row = p.R * all * p.H;
  const auto side = [&](int64_t r, int64_t first, int64_t count) {
    return view(dgates, {p.T * p.B, count * p.H}, {row, 1}, (r * all + first) * p.H);
  };
  const auto input_weights = [&](int64_t r) { return reordered(p, weights[size_t(r * p.each)], false); };
  std::vector<Tensor> out;
  if (need_dx) {
    // In 16 bits recurrences are summed within one product where that can be: rounding between two is worse (gpu/products.py). Where gates
    // are apart it is rounded once more than there, for the stable ABI has no product that adds.
    const bool at_once = p.R > 1 && !p.apart && x.element_size() == 2;
    Tensor dx = at_once ? mm(view(dgates, {p.T * p.B, row}, {row, 1}), p.of_all(weights, 0)) : mm(side(0, 0, p.G), input_weights(0));
    for (int64_t r = 1; r < p.R && !at_once; ++r) dx = added(dx, mm(side(r, 0, p.G), input_weights(r)));
    out.push_back(reshaped(dx, {p.T, p.B, p.D}));
  } else {
    out.push_back(p.empty({0}));
  }
  for (size_t s = 0; s < states.size(); ++s) {
    out.push_back(p.empty(shape));
    copy_(out.back(), gradients[s]);
  }
  // A NaN past a sequence's end, times a gradient of zero, would be one.
  const Tensor seen = need_dw && lengths ? p.rows_of_steps(x, 0, p.D, p.D, false) : p.rows();
  for (int64_t r = 0; need_dw && r < p.R; ++r) {
    const Tensor input = side(r, 0, p.G);
    out.push_back(reordered(p, mm(turned(input), seen), true));
    const auto* const h0 = static_cast<const char*>(loop.first[0]) + r * p.B * p.H * int64_t(x.element_size());
    const Tensor before = p.rows_of_steps(hidden, r * p.H, p.R * p.H, p.H, directions[size_t(r)] < 0, h0);
    out.push_back(mm(turned(side(r, p.apart, p.G)), before));
    if (p.each == 2) continue;
    out.push_back(reordered(p, summed_rows(input), true));
    out.push_back(p.apart ? summed_rows(side(r, p.apart, p.G)) : torch::stable::clone(out.back()));
  }
  return out;
}

}  // namespace
}  // namespace fused_rnn::ops

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CompositeExplicitAutograd, m) {
  m.impl("cuda_plain_forward", TORCH_BOX(&fused_rnn::ops::plain_forward));
  m.impl("cuda_plain_backward", TORCH_BOX(&fused_rnn::ops::plain_backward));
}
