// The ops on CPU tensors: schemas, the forward of a layer, a single step. The backward is in cpu_backward.cpp.
#include "../cpu/isa.h"
#include "layer.h"

namespace fused_rnn::ops {

std::vector<Tensor> cpu_backward(MaybeTensor dy, std::vector<Tensor> dstates, Tensor x, std::vector<Tensor> weights,
                                 std::vector<Tensor> states, MaybeTensor lengths, MaybeTensor reset, Tensor hidden, Tensor saved,
                                 std::vector<Tensor> histories, StringHandle cell_name, std::vector<int64_t> directions,
                                 StringHandle save_name, bool need_dx, bool need_dw);

namespace {

std::vector<Tensor> cpu_forward(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> states, MaybeTensor lengths, MaybeTensor reset,
                                StringHandle cell_name, std::vector<int64_t> directions, StringHandle save_name, bool keep_hidden) {
  const std::string cell = taken(cell_name), save = taken(save_name);
  const bool keep_gates = save == "gates", recompute = save == "recompute", keep = keep_gates || recompute;
  STD_TORCH_CHECK(keep || save == "none", "fused_rnn: save is '", save, "', expected none, gates or recompute");
  const Layer layer(x, weights, states, lengths, reset, cell, directions);
  const Problem& p = layer.p;

  std::vector<Tensor> out{empty(x, {p.T, p.B, p.R * p.P})};
  const Tensor& y = out[0];
  const std::vector<Tensor> after = layer.wide_states(states);
  Forward f{};
  f.p = p;
  f.x = layer.input();
  f.h_is_zero = states.empty();
  f.y = y.mutable_data_ptr();
  std::vector<Tensor> kept;
  if (keep) kept.push_back(empty(x, keep_gates ? Sizes{p.T, p.B, p.R, p.cell->saved, p.H} : Sizes{0}));
  if (keep_gates) f.saved = kept[0].mutable_data_ptr();
  for (int i = 0; i < p.cell->states; ++i) {
    f.states[i] = after[size_t(i)].mutable_data_ptr();
    if (i == 0 || !keep) continue;
    kept.push_back(keep_gates ? empty(x, {p.T, p.B, p.R, p.H}) : layer.checkpoints());
    (keep_gates ? f.histories : f.checkpoints)[i] = kept.back().mutable_data_ptr();
  }
  if (recompute) f.every = kCheckpointEvery;
  if (keep) kept.push_back(empty(x, keep_hidden ? sizes_of(y) : Sizes{0}));
  if (keep && keep_hidden) f.hidden = kept.back().mutable_data_ptr();
  if (p.B > 0) cpu::kernels().forward(f);

  for (const Tensor& state : after) out.push_back(converted(state, x.scalar_type()));
  out.insert(out.end(), kept.begin(), kept.end());
  return out;
}

// One step with as few costs around it as can be: x [B, D], states [B, width], or none for zeros -> the states after.
std::vector<Tensor> cpu_step(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> states, StringHandle cell_name) {
  const CellDescriptor* const cell = cell_of(taken(cell_name));
  const int G = cell->gates;
  const size_t count = weights.size();
  STD_TORCH_CHECK(x.dim() == 2, "fused_rnn: x has ", x.dim(), " dimensions, expected [B, D]");
  STD_TORCH_CHECK(count >= 2 && count <= (cell->projects ? 5 : 4) && (cell->projects || count != 3), "fused_rnn: weights holds ", count,
                  " tensors, which are not those of one ", cell->name);
  STD_TORCH_CHECK(states.empty() || int(states.size()) == cell->states, "fused_rnn: states holds ", states.size(),
                  " tensors, expected none or ", cell->states);
  const Tensor& w_hh = weights[1];
  const bool bias = count >= 4, projects = count % 2 == 1;
  const int64_t B = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % G == 0 && w_hh.size(0) > 0 && D > 0, "fused_rnn: w_hh has shape ", text(sizes_of(w_hh)),
                  ", expected [", G, " H, P]");
  const int64_t H = w_hh.size(0) / G, P = w_hh.size(1);
  STD_TORCH_CHECK(projects || P == H, "fused_rnn: w_hh has shape ", text(sizes_of(w_hh)), ", which does not fit the other arguments");
  const ScalarType type = x.scalar_type(), wide = accumulation_type(x);
  auto pointer = [&](const char* name, Tensor& t, std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type, "fused_rnn: ", name, " differs from x in dtype or device");
    bool same = t.dim() == int64_t(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(int64_t(i)) == sizes.begin()[i];
    STD_TORCH_CHECK(same, "fused_rnn: ", name, " has shape ", text(sizes_of(t)), ", expected ", text(sizes));
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
    return t.const_data_ptr();
  };
  Weights w{};
  w.direction = 1;
  w.w_ih = pointer("w_ih", weights[0], {G * H, D});
  w.w_hh = pointer("w_hh", weights[1], {G * H, P});
  if (bias) w.b_ih = pointer("b_ih", weights[2], {G * H}), w.b_hh = pointer("b_hh", weights[3], {G * H});
  if (projects) w.w_hr = pointer("w_hr", weights[count - 1], {P, H});
  Forward f{};
  f.p = {cell, dtype_of(x), 1, B, D, H, P, 1, 0, 1, &w, nullptr, nullptr, 1};
  f.x = {pointer("x", x, {B, D}), B * D, D, 0};
  f.h_is_zero = states.empty();
  std::vector<Tensor> after;
  after.reserve(size_t(cell->states));
  for (int i = 0; i < cell->states; ++i) {
    const int64_t width = i == 0 ? P : H;
    if (!states.empty()) pointer("a state", states[size_t(i)], {B, width});
    after.push_back(states.empty() ? zeros({B, width}, wide) : copied(states[size_t(i)], wide));
    f.states[i] = after.back().mutable_data_ptr();
  }
  if (B > 0) cpu::kernels().forward(f);
  for (Tensor& state : after) state = converted(state, type);
  return after;
}

Tensor cpu_activation(Tensor x, int64_t which) {
  const Tensor in = as_contiguous(x), out = empty(in, sizes_of(in));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "fused_rnn: x must be float32 or float64");
  cpu::kernels().activation(int(which), dtype_of(in), in.const_data_ptr(), out.mutable_data_ptr(), in.numel());
  return out;
}

}  // namespace
}  // namespace fused_rnn::ops

STABLE_TORCH_LIBRARY(fused_rnn, m) {
  m.def(
      "forward(Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? reset, str cell, int[] directions, str save, "
      "bool keep_hidden) -> Tensor[]");
  m.def(
      "backward(Tensor? dy, Tensor[] dstates, Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? reset, Tensor hidden, "
      "Tensor saved, Tensor[] histories, str cell, int[] directions, str save, bool need_dx, bool need_dw) -> Tensor[]");
  m.def("step(Tensor x, Tensor[] weights, Tensor[] states, str cell) -> Tensor[]");
  m.def("activation(Tensor x, int which) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("forward", TORCH_BOX(&fused_rnn::ops::cpu_forward));
  m.impl("backward", TORCH_BOX(&fused_rnn::ops::cpu_backward));
  m.impl("step", TORCH_BOX(&fused_rnn::ops::cpu_step));
  m.impl("activation", TORCH_BOX(&fused_rnn::ops::cpu_activation));
}
