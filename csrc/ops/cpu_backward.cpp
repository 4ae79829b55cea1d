// The backward of a layer on CPU tensors: range by range of steps from the end, so that the gradients of the gates are used while
// they are in the cache and never fill memory over all of time. With save="recompute" a range first runs forward again from the
// state kept at its start.
#include <algorithm>
#include <cstring>

#include "../cpu/isa.h"
#include "layer.h"

namespace fused_rnn::ops {
namespace {

constexpr int64_t kRangeRows = 1024;  // rows of T x B in one range: enough to fill the weight gradients' products

// A weight gradient in the accumulation dtype, its rows padded to whole vectors, or a bias's in double; itself the result where nothing
// differs.
struct Gradient {
  Tensor sum, result;
  Gradient(const Tensor& like, const Tensor& weight, int64_t pad) {
    const bool matrix = weight.dim() == 2;
    const ScalarType type = matrix ? accumulation_type(like) : ScalarType::Double;
    const Sizes sizes = matrix ? Sizes{weight.size(0), (weight.size(1) + pad - 1) / pad * pad} : sizes_of(weight);
    sum = like.numel() ? empty(sizes, type) : zeros(sizes, type);
    result = weight;
  }
  void* data() const { return sum.mutable_data_ptr(); }
  Tensor finish() const {
    if (result.dim() != 2) return result.scalar_type() == ScalarType::Double ? sum : converted(in_float(), result.scalar_type());
    if (sum.size(1) == result.size(1)) return converted(sum, result.scalar_type());
    const int64_t columns = result.size(1);
    const Tensor unpadded = empty({result.size(0), columns}, sum.scalar_type());
    const size_t bytes = sum.element_size();
    char* to = static_cast<char*>(unpadded.mutable_data_ptr());
    const char* from = static_cast<const char*>(sum.const_data_ptr());
    for (int64_t i = 0; i < result.size(0); ++i)
      memcpy(to + size_t(i * columns) * bytes, from + size_t(i * sum.size(1)) * bytes, size_t(columns) * bytes);
    return converted(unpadded, result.scalar_type());
  }

 private:
  Tensor in_float() const {
    const Tensor made = empty(sizes_of(sum), ScalarType::Float);
    const auto* from = static_cast<const double*>(sum.const_data_ptr());
    std::copy(from, from + sum.numel(), static_cast<float*>(made.mutable_data_ptr()));
    return made;
  }
};

}  // namespace

std::vector<Tensor> cpu_backward(MaybeTensor dy, std::vector<Tensor> dstates, Tensor x, std::vector<Tensor> weights,
                                 std::vector<Tensor> states, MaybeTensor lengths, MaybeTensor reset, Tensor hidden, Tensor saved,
                                 std::vector<Tensor> histories, StringHandle cell_name, std::vector<int64_t> directions,
                                 StringHandle save_name, bool need_dx, bool need_dw) {
  const std::string cell = taken(cell_name), save = taken(save_name);
  const bool recompute = save == "recompute";
  MaybeTensor h0, c0, dh_n, dc_n;
  if (!states.empty()) h0 = states[0];
  if (states.size() > 1) c0 = states[1];
  if (!dstates.empty()) dh_n = dstates[0];
  if (dstates.size() > 1) dc_n = dstates[1];
  Tensor cells = histories.empty() ? empty(x, {0}) : histories[0];
  STD_TORCH_CHECK(recompute || save == "gates", "fused_rnn: save is '", save, "', expected gates or recompute");
  const Layer layer(x, weights, h0, c0, lengths, reset, cell_of(cell), directions);
  const Problem& p = layer.p;
  const bool lstm = has_cell(p.cell);
  const int S = saved_of(p.cell), DG = gradients_of(p.cell);
  const ScalarType wide = accumulation_type(x);
  const size_t wide_bytes = wide == ScalarType::Double ? 8 : 4;

  if (dy) {
    check_sizes("dy", *dy, {p.T, p.B, p.R * p.P});
    dy = as_contiguous(*dy);
  }
  if (dh_n) check_sizes("dh_n", *dh_n, {p.R, p.B, p.P});
  if (dc_n) check_sizes("dc_n", *dc_n, {p.R, p.B, p.H});
  check_sizes("hidden", hidden, {p.T, p.B, p.R * p.P});
  hidden = as_contiguous(hidden);
  saved = as_contiguous(saved);
  cells = as_contiguous(cells);
  if (recompute) check_sizes("saved", saved, {checkpoint_rows(p.T), p.R, p.B, p.P + (lstm ? p.H : 0)});
  else check_sizes("saved", saved, {p.T, p.B, p.R, S, p.H});
  if (!recompute && lstm) check_sizes("cells", cells, {p.T, p.B, p.R, p.H});

  // Gradients of the state, in and out of each range; the initial states as the loops want them.
  const Tensor dh = layer.state(dh_n, p.P);
  MaybeTensor dc, c_first;
  if (lstm) dc = layer.state(dc_n, p.H);
  Tensor h_first = layer.state(h0, p.P);
  if (lstm) c_first = layer.state(c0, p.H);
  if (h0) h0 = as_contiguous(*h0);

  const int64_t pad = cpu::kernels().products_pad / int64_t(wide_bytes);
  std::vector<Gradient> gradients;
  std::vector<void*> dw_ih, dw_hh, dw_hr, db_ih, db_hh;
  if (need_dw)
    for (size_t i = 0; i < weights.size(); ++i) {
      gradients.emplace_back(x, weights[i], pad);
      const int64_t k = int64_t(i) % layer.weights_each;
      void* data = gradients.back().data();
      if (k == 0) dw_ih.push_back(data);
      else if (k == 1) dw_hh.push_back(data);
      else if (layer.projects && k == layer.weights_each - 1) dw_hr.push_back(data);
      else if (k == 2) db_ih.push_back(data);
      else db_hh.push_back(data);
    }
  const bool share_dx = p.R > 1 && !layer.x_per_recurrence;  // several recurrences add to the same dx
  const Tensor dx = !need_dx ? empty(x, {0}) : share_dx || p.B == 0 ? zeros(sizes_of(x), x.scalar_type()) : empty(x, sizes_of(x));

  if (p.B > 0) {
    const int64_t range = recompute ? kCheckpointEvery : std::min(p.T, std::max<int64_t>(1, (kRangeRows + p.B - 1) / p.B));
    const int64_t last = (p.T - 1) / range * range;
    const Tensor dgates = empty(x, {range, p.B, p.R, DG, p.H});
    MaybeTensor dprojected, unprojected, again_saved, again_cells, h_run, c_run;
    if (layer.projects) {
      dprojected = empty(x, {range, p.B, p.R, p.P});
      unprojected = empty(x, {range, p.B, p.R, p.H});
    }
    if (recompute) {
      again_saved = empty(x, {range, p.B, p.R, S, p.H});
      again_cells = empty(x, lstm ? Sizes{range, p.B, p.R, p.H} : Sizes{0});
      h_run = empty({p.R, p.B, p.P}, wide);
      if (lstm) c_run = empty({p.R, p.B, p.H}, wide);
    }
    for (int64_t start = last; start >= 0; start -= range) {
      Problem part = p;
      part.start = start;
      part.stop = std::min(p.T, start + range);
      if (recompute) {
        const char* kept =
            static_cast<const char*>(saved.const_data_ptr()) + size_t(start / range * p.R * p.B * (p.P + (lstm ? p.H : 0))) * wide_bytes;
        auto load_state = [&] {
          char* h = static_cast<char*>(h_first.mutable_data_ptr());
          char* c = lstm ? static_cast<char*>(c_first->mutable_data_ptr()) : nullptr;
          const size_t h_bytes = size_t(p.P) * wide_bytes, c_bytes = lstm ? size_t(p.H) * wide_bytes : 0;
          for (int64_t i = 0; i < p.R * p.B; ++i, kept += h_bytes + c_bytes) {
            memcpy(h + size_t(i) * h_bytes, kept, h_bytes);
            if (c) memcpy(c + size_t(i) * c_bytes, kept + h_bytes, c_bytes);
          }
        };
        load_state();
        memcpy(h_run->mutable_data_ptr(), h_first.const_data_ptr(), size_t(h_first.numel()) * wide_bytes);
        if (lstm) memcpy(c_run->mutable_data_ptr(), c_first->const_data_ptr(), size_t(c_first->numel()) * wide_bytes);
        Forward again{};
        again.p = part;
        again.x = layer.x().const_data_ptr();
        again.x_per_recurrence = layer.x_per_recurrence;
        again.h = h_run->mutable_data_ptr();
        again.c = lstm ? c_run->mutable_data_ptr() : nullptr;
        again.saved = again_saved->mutable_data_ptr();
        if (lstm) again.cells = again_cells->mutable_data_ptr();
        cpu::kernels().forward(again);
      }
      Backward b{};
      b.p = part;
      b.dy = dy ? dy->const_data_ptr() : nullptr;
      b.hidden = hidden.const_data_ptr();
      b.saved = (recompute ? *again_saved : saved).const_data_ptr();
      b.cells = (recompute ? *again_cells : cells).const_data_ptr();
      b.saved_whole = !recompute;
      b.h0 = h_first.const_data_ptr();
      b.c0 = lstm ? c_first->const_data_ptr() : nullptr;
      b.dh = dh.mutable_data_ptr();
      b.dc = lstm ? dc->mutable_data_ptr() : nullptr;
      b.dgates = dgates.mutable_data_ptr();
      b.need_dh = start > 0 || h0;
      if (layer.projects) {
        b.dprojected = dprojected->mutable_data_ptr();
        b.unprojected = unprojected->mutable_data_ptr();
      }
      cpu::kernels().backward(b);

      if (!need_dw && !need_dx) continue;
      Products q{};
      q.p = part;
      q.dgates = dgates.const_data_ptr();
      q.x = layer.x().const_data_ptr();
      q.x_per_recurrence = layer.x_per_recurrence;
      q.hidden = hidden.const_data_ptr();
      q.h0 = h0 ? h0->const_data_ptr() : nullptr;
      if (layer.projects) {
        q.dprojected = dprojected->const_data_ptr();
        q.unprojected = unprojected->const_data_ptr();
      }
      if (need_dw) {
        q.dw_ih = dw_ih.data();
        q.dw_hh = dw_hh.data();
        if (layer.projects) q.dw_hr = dw_hr.data();
        if (layer.bias) q.db_ih = db_ih.data(), q.db_hh = db_hh.data();
      }
      if (need_dx) q.dx = dx.mutable_data_ptr();
      q.add_dx = share_dx;
      q.first = start == last;
      cpu::kernels().products(q);
    }
  }

  std::vector<Tensor> out{dx};
  if (h0) out.push_back(converted(dh, x.scalar_type()));
  if (c0) out.push_back(converted(*dc, x.scalar_type()));
  for (const Gradient& g : gradients) out.push_back(g.finish());
  return out;
}

}  // namespace fused_rnn::ops
