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
  MaybeTensor h0, c0;
  if (!states.empty()) h0 = states[0];
  if (states.size() > 1) c0 = states[1];
  const bool keep_gates = save == "gates", recompute = save == "recompute";
  STD_TORCH_CHECK(keep_gates || recompute || save == "none", "fused_rnn: save is '", save, "', expected none, gates or recompute");
  const Layer layer(x, weights, h0, c0, lengths, reset, cell_of(cell), directions);
  const Problem& p = layer.p;
  const bool lstm = has_cell(p.cell);

  const Tensor y = empty(layer.x(), {p.T, p.B, p.R * p.P});
  const Tensor h = layer.state(h0, p.P);
  std::vector<Tensor> out{y};
  MaybeTensor c, saved, cells, hidden;
  if (lstm) c = layer.state(c0, p.H);
  if (keep_gates) {
    saved = empty(y, {p.T, p.B, p.R, saved_of(p.cell), p.H});
    if (lstm) cells = empty(y, Sizes{p.T, p.B, p.R, p.H});
  } else if (recompute) {
    saved = empty({checkpoint_rows(p.T), p.R, p.B, p.P + (lstm ? p.H : 0)}, accumulation_type(y));
    cells = empty(y, {0});
    const int64_t used = (p.T + kCheckpointEvery - 1) / kCheckpointEvery, row = saved->numel() / saved->size(0);
    if (row > 0) {
      char* unused = static_cast<char*>(saved->mutable_data_ptr()) + size_t(used * row) * saved->element_size();
      memset(unused, 0, size_t((saved->size(0) - used) * row) * saved->element_size());
    }
  }
  if (save != "none") hidden = empty(y, keep_hidden ? Sizes{p.T, p.B, p.R * p.P} : Sizes{0});

  if (p.B > 0) {
    Forward f{};
    f.p = p;
    f.x = layer.x().const_data_ptr();
    f.x_per_recurrence = layer.x_per_recurrence;
    f.h_is_zero = !h0;
    f.h = h.mutable_data_ptr();
    f.c = lstm ? c->mutable_data_ptr() : nullptr;
    f.y = y.mutable_data_ptr();
    if (keep_gates) {
      f.saved = saved->mutable_data_ptr();
      if (lstm) f.cells = cells->mutable_data_ptr();
    }
    if (recompute) {
      f.checkpoints = saved->mutable_data_ptr();
      f.every = kCheckpointEvery;
    }
    if (keep_hidden && hidden) f.hidden = hidden->mutable_data_ptr();
    cpu::kernels().forward(f);
  }
  out.push_back(converted(h, y.scalar_type()));
  if (lstm) out.push_back(converted(*c, y.scalar_type()));
  if (save != "none") {
    out.push_back(*saved);
    if (lstm) out.push_back(*cells);
    out.push_back(*hidden);
  }
  return out;
}

// One step with as few costs around it as can be: x [B, D], h [B, P], c [B, H]; or as a sequence of one step, x [1, B, D] or
// [B, 1, D], h [1, B, P], c [1, B, H]. An absent h or c is zero. Returns h' (and c') shaped as h (and c), and before them, for a
// sequence, y in memory of its own.
std::vector<Tensor> cpu_step(Tensor x, MaybeTensor h, MaybeTensor c, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                             MaybeTensor w_hr, int64_t cell_index) {
  STD_TORCH_CHECK(cell_index >= 0 && cell_index < 4, "fused_rnn: cell is ", cell_index,
                  ", expected 0 (lstm), 1 (gru), 2 (rnn_tanh) or 3 (rnn_relu)");
  const Cell cell = Cell(cell_index);
  const int G = gates_of(cell);
  const bool lstm = has_cell(cell), sequence = x.dim() == 3;
  STD_TORCH_CHECK(sequence || x.dim() == 2, "fused_rnn: x has ", x.dim(), " dimensions, expected 2 or 3");
  STD_TORCH_CHECK(!sequence || x.size(0) == 1 || x.size(1) == 1, "fused_rnn: x has shape ", text(sizes_of(x)), ", expected one step");
  const int64_t B = sequence ? x.size(0) * x.size(1) : x.size(0), D = x.size(-1);
  STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % G == 0 && w_hh.size(0) > 0 && D > 0, "fused_rnn: w_hh has shape ", text(sizes_of(w_hh)),
                  ", expected [", G, " H, P]");
  const int64_t H = w_hh.size(0) / G, P = w_hh.size(1);
  STD_TORCH_CHECK((w_hr ? lstm : P == H) && bool(b_ih) == bool(b_hh) && (lstm || !c), "fused_rnn: w_hh has shape ", text(sizes_of(w_hh)),
                  ", which does not fit the other arguments");
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
  w.w_ih = pointer("w_ih", w_ih, {G * H, D});
  w.w_hh = pointer("w_hh", w_hh, {G * H, P});
  if (b_ih) w.b_ih = pointer("b_ih", *b_ih, {G * H}), w.b_hh = pointer("b_hh", *b_hh, {G * H});
  if (w_hr) w.w_hr = pointer("w_hr", *w_hr, {P, H});
  Forward f{};
  f.p = {cell, dtype_of(x), 1, B, D, H, P, 1, 0, 1, &w, nullptr, nullptr, 1};
  f.x = sequence ? pointer("x", x, {x.size(0), x.size(1), D}) : pointer("x", x, {B, D});
  f.h_is_zero = !h;
  auto state = [&](const char* name, MaybeTensor& given, int64_t width) {
    const Sizes sizes = sequence ? Sizes{1, B, width} : Sizes{B, width};
    if (!given) return zeros(sizes, wide);
    if (sequence) pointer(name, *given, {1, B, width});
    else pointer(name, *given, {B, width});
    return copied(*given, wide);
  };
  const Tensor h_n = state("h", h, P);
  MaybeTensor c_n;
  if (lstm) c_n = state("c", c, H);
  std::vector<Tensor> out;
  out.reserve(3);
  f.h = h_n.mutable_data_ptr();
  if (lstm) f.c = c_n->mutable_data_ptr();
  if (sequence) {
    out.push_back(empty({x.size(0), x.size(1), P}, type));
    f.y = out[0].mutable_data_ptr();
  }
  if (B > 0) cpu::kernels().forward(f);
  out.push_back(converted(h_n, type));
  if (lstm) out.push_back(converted(*c_n, type));
  return out;
}

std::vector<Tensor> cpu_step_of(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> states, StringHandle name) {
  MaybeTensor h, c, b_ih, b_hh, w_hr;
  if (!states.empty()) h = states[0];
  if (states.size() > 1) c = states[1];
  if (weights.size() >= 4) b_ih = weights[2], b_hh = weights[3];
  if (weights.size() % 2) w_hr = weights.back();
  return cpu_step(x, h, c, weights[0], weights[1], b_ih, b_hh, w_hr, int64_t(cell_of(taken(name))));
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
      "backward(Tensor? dy, Tensor[] dstates, Tensor x, Tensor[] weights, Tensor[] states, Tensor? lengths, Tensor? "
      "reset, "
      "Tensor hidden, Tensor saved, Tensor[] histories, str cell, int[] directions, str save, bool need_dx, bool need_dw) -> Tensor[]");
  m.def("step(Tensor x, Tensor[] weights, Tensor[] states, str cell) -> Tensor[]");
  m.def("activation(Tensor x, int which) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("forward", TORCH_BOX(&fused_rnn::ops::cpu_forward));
  m.impl("backward", TORCH_BOX(&fused_rnn::ops::cpu_backward));
  m.impl("step", TORCH_BOX(&fused_rnn::ops::cpu_step_of));
  m.impl("activation", TORCH_BOX(&fused_rnn::ops::cpu_activation));
}
