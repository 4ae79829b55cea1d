// The ops' schemas; on CPU tensors the forward of a layer and a single step. The backward is in cpu_backward.cpp.
#include "../cpu/isa.h"
#include "layer.h"

namespace fused_rnn::ops {
namespace {

std::vector<Tensor> cpu_forward(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> states, MaybeTensor lengths, MaybeTensor reset,
                                StringHandle cell_name, std::vector<int64_t> directions, StringHandle save_name, bool keep_hidden,
                                bool sequences) {
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
  std::vector<Tensor> kept, over_time;
  if (keep) kept.push_back(empty(x, keep_gates ? Sizes{p.T, p.B, p.R, p.cell->saved, p.H} : Sizes{0}));
  if (keep_gates) f.saved = kept[0].mutable_data_ptr();
  for (int i = 0; i < p.cell->states; ++i) {
    f.states[i] = after[size_t(i)].mutable_data_ptr();
    if (i == 0) continue;
    if (sequences || keep_gates) {
      std::vector<Tensor>& to = sequences ? over_time : kept;
      to.push_back(empty(x, {p.T, p.B, p.R, p.H}));
      f.histories[i] = to.back().mutable_data_ptr();
    }
    if (recompute) {
      kept.push_back(layer.checkpoints());
      f.checkpoints[i] = kept.back().mutable_data_ptr();
    }
  }
  if (recompute) f.every = kCheckpointEvery;
  if (keep) kept.push_back(empty(x, keep_hidden ? sizes_of(y) : Sizes{0}));
  if (keep && keep_hidden) f.hidden = kept.back().mutable_data_ptr();
  if (p.B > 0) cpu::kernels().forward(f);

  for (const Tensor& state : after) out.push_back(converted(state, x.scalar_type()));
  out.insert(out.end(), over_time.begin(), over_time.end());
  out.insert(out.end(), kept.begin(), kept.end());
  return out;
}

// One step: x [B, D], states [B, width], or none for zeros -> the states after. A layer of one step, without its output.
std::vector<Tensor> cpu_step(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> states, StringHandle cell_name) {
  STD_TORCH_CHECK(x.dim() == 2, "fused_rnn: x has ", x.dim(), " dimensions, expected [B, D]");
  for (Tensor& state : states) {
    STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == x.size(0), "fused_rnn: a state has shape ", text(sizes_of(state)),
                    ", expected [B, H] with B = ", x.size(0));
    state = reshaped(as_contiguous(state), {1, state.size(0), state.size(1)});
  }
  const Layer layer(reshaped(as_contiguous(x), {1, x.size(0), x.size(1)}), weights, states, {}, {}, taken(cell_name), {1});
  std::vector<Tensor> after = layer.wide_states(states);
  Forward f{};
  f.p = layer.p;
  f.x = layer.input();
  f.h_is_zero = states.empty();
  for (size_t i = 0; i < after.size(); ++i) f.states[i] = after[i].mutable_data_ptr();
  if (layer.p.B > 0) cpu::kernels().forward(f);
  for (Tensor& state : after) state = reshaped(converted(state, x.scalar_type()), {state.size(1), state.size(2)});
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
      "bool keep_hidden, bool sequences) -> Tensor[]");
  m.def(
      "backward(Tensor? dy, Tensor[] dstates, Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? reset, Tensor hidden, "
      "Tensor saved, Tensor[] histories, str cell, int[] directions, str save, bool need_dx, bool need_dw, Tensor[] "
      "dsequences) -> Tensor[]");
  m.def("step(Tensor x, Tensor[] weights, Tensor[] states, str cell) -> Tensor[]");
  m.def("activation(Tensor x, int which) -> Tensor");
  m.def("mask(Tensor seed, Tensor like, float p, float low, float high, int stream) -> Tensor");
  m.def(
      "cuda_plain_forward(int[] told, Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? reset, bool keep_gates, "
      "bool keep_hidden) -> Tensor[]");
  m.def(
      "cuda_plain_backward(int[] told, Tensor? dy, Tensor[] dstates, Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? "
      "reset, Tensor hidden, Tensor saved, Tensor[] histories, int[] directions, bool need_dx, bool need_dw) -> Tensor[]");
  m.def("run_steps(Tensor[] a, Tensor[] b, Tensor(a!)[] out, int[] directions, int first, int last, int run, int loop, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("forward", TORCH_BOX(&fused_rnn::ops::cpu_forward));
  m.impl("step", TORCH_BOX(&fused_rnn::ops::cpu_step));
  m.impl("activation", TORCH_BOX(&fused_rnn::ops::cpu_activation));
}
