// The backward of a layer on CPU tensors: range by range of steps from the end, so that the gradients of the gates are used while
// they are in the cache and never fill memory over all of time. With save="recompute" a range first runs forward again from the
// state kept at its start.
#include <algorithm>
#include <cstring>

#include "../cpu/isa.h"
#include "layer.h"

namespace fused_rnn::ops {
namespace {

// Rows of T x B in one range: of gradients of gates what L2 holds; but enough to fill the weight gradients' products, since each range
// packs the weights anew.
constexpr int64_t kFewestRows = 256, kMostRows = 1024, kRangeBytes = 512 * 1024;
int64_t range_rows(const Problem& p, int64_t gradients, int64_t element_size) {
  const int64_t near = kRangeBytes / (gradients * p.H * element_size);
  return near < kFewestRows ? kMostRows : std::min(near, kMostRows);
}

// A weight gradient in the accumulation dtype, its rows padded to whole vectors, or a bias's in double; itself the result where nothing
// differs.
struct Gradient {
  Tensor sum, result;
  explicit Gradient(const Tensor& nothing) : sum(nothing), result(nothing) {}  // of what has none
  Gradient(const Tensor& like, const Tensor& weight, int64_t pad) {
    const bool matrix = weight.dim() == 2;
    const ScalarType type = matrix ? accumulation_type(like) : ScalarType::Double;
    const Sizes sizes = matrix ? Sizes{weight.size(0), (weight.size(1) + pad - 1) / pad * pad} : sizes_of(weight);
    sum = like.numel() ? empty(sizes, type) : zeros(sizes, type);
    result = weight;
  }
  void* data() const { return sum.mutable_data_ptr(); }
  Tensor finish() const {
    if (result.numel() == 0 && result.dim() == 1) return result;
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

// The ops mark a tensor that is not there by the shape [0].
bool is_absent(const Tensor& t) { return t.dim() == 1 && t.size(0) == 0; }

// h as it entered step `start`, from the outputs of the step before; where a sequence ran none, the initial one. [R, B, P].
void take_entering(const Problem& p, const Tensor& hidden, const Tensor& initial, int64_t start, const Tensor& out) {
  const size_t from_bytes = hidden.element_size(), wide_bytes = out.element_size(), row = size_t(p.P) * wide_bytes;
  const char* const outputs = static_cast<const char*>(hidden.const_data_ptr());
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t t = p.weights[r].direction > 0 ? start - 1 : p.T - start;
    for (int64_t b = 0; b < p.B; ++b) {
      const size_t to = size_t(r * p.B + b) * row;
      char* const h = static_cast<char*>(out.mutable_data_ptr()) + to;
      const char* const y = outputs + size_t(((t * p.B + b) * p.R + r) * p.P) * from_bytes;
      if (start == 0 || (p.lengths && t >= p.lengths[b])) memcpy(h, static_cast<const char*>(initial.const_data_ptr()) + to, row);
      else if (from_bytes == wide_bytes) memcpy(h, y, row);
      else cpu::kernels().convert(p.dtype, Dtype::f32, y, h, p.P);
    }
  }
}

// sums[r params + i] = over all rows what they give to param i of recurrence r, in double.
template <class S>
void sum_rows(const Problem& p, const S* rows, const std::vector<void*>& sums) {
  const int params = p.cell->params;
  for (int64_t r = 0; r < p.R; ++r)
    for (int64_t b = 0; b < p.B; ++b)
      for (int i = 0; i < params; ++i, rows += p.H) {
        auto* const sum = static_cast<double*>(sums[size_t(r * params + i)]);
        for (int64_t u = 0; u < p.H; ++u) sum[u] = (b > 0 ? sum[u] : 0) + double(rows[u]);
      }
}
void sum_params(const Problem& p, const Tensor& rows, const std::vector<void*>& sums) {
  if (rows.scalar_type() == ScalarType::Double) sum_rows(p, static_cast<const double*>(rows.const_data_ptr()), sums);
  else sum_rows(p, static_cast<const float*>(rows.const_data_ptr()), sums);
}

std::vector<Tensor> cpu_backward(MaybeTensor dy, std::vector<Tensor> dstates, Tensor x, std::vector<Tensor> weights,
                                 std::vector<Tensor> states, MaybeTensor lengths, MaybeTensor reset, Tensor hidden, Tensor saved,
                                 std::vector<Tensor> histories, StringHandle cell_name, std::vector<int64_t> directions,
                                 StringHandle save_name, bool need_dx, bool need_dw, std::vector<Tensor> dsequences) {
  const std::string cell = taken(cell_name), save = taken(save_name);
  const bool recompute = save == "recompute";
  STD_TORCH_CHECK(recompute || save == "gates", "fused_rnn: save is '", save, "', expected gates or recompute");
  const Layer layer(x, weights, states, lengths, reset, cell, directions);
  const Problem& p = layer.p;
  const int ST = p.cell->states, DG = p.cell->gates + p.cell->apart + p.cell->blocks;
  const ScalarType type = x.scalar_type(), wide = accumulation_type(x);

  if (dy) {
    layer.check("dy", *dy, {p.T, p.B, p.R * p.P});
    dy = as_contiguous(*dy);
  }
  layer.check_states("_n's gradient", dstates);
  layer.check("hidden", hidden, {p.T, p.B, p.R * p.P});
  hidden = as_contiguous(hidden);
  saved = as_contiguous(saved);
  if (!recompute) layer.check("saved", saved, {p.T, p.B, p.R, p.cell->saved, p.H});
  STD_TORCH_CHECK(int(histories.size()) == ST - 1, "fused_rnn: histories holds ", histories.size(), " tensors, expected ", ST - 1);
  for (Tensor& history : histories) {
    check_sizes("a history", history, recompute ? Sizes{checkpoint_rows(p.T), p.R, p.B, p.H} : Sizes{p.T, p.B, p.R, p.H});
    STD_TORCH_CHECK(history.scalar_type() == (recompute ? wide : type), "fused_rnn: a history is of another dtype than forward makes it");
    history = as_contiguous(history);
  }
  STD_TORCH_CHECK(dsequences.empty() || int(dsequences.size()) == ST - 1, "fused_rnn: dsequences holds ", dsequences.size(),
                  " tensors, expected none or ", ST - 1);
  for (Tensor& sequence : dsequences) {
    if (is_absent(sequence)) continue;
    layer.check("a sequence's gradient", sequence, {p.T, p.B, p.R, p.H});
    sequence = as_contiguous(sequence);
  }

  const std::vector<Tensor> d = layer.wide_states(dstates);        // in and out of each range
  const std::vector<Tensor> initial = layer.entering_states(states);
  MaybeTensor h0;
  if (!states.empty()) h0 = as_contiguous(states[0]);

  const int64_t pad = cpu::kernels().products_pad / int64_t(initial[0].element_size());
  std::vector<Gradient> gradients;
  std::vector<void*> dw_ih, dw_hh, dw_hr, dmatrices, db_ih, db_hh, dparams;
  const int params = p.cell->params;
  if (need_dw)
    for (size_t i = 0; i < weights.size();) {
      const auto take = [&](std::vector<void*>& to) {
        gradients.emplace_back(x, weights[i++], pad);
        to.push_back(gradients.back().data());
      };
      take(dw_ih);
      if (p.cell->recurrent) take(dw_hh);
      if (layer.bias) take(db_ih);
      if (layer.bias && p.cell->recurrent) take(db_hh);
      if (layer.projects) take(dw_hr);
      for (int k = 0; k < p.cell->matrices; ++k) take(dmatrices);
      for (int k = 0; k < params; ++k) take(dparams);
      for (int k = 0; k < p.cell->masks; ++k, ++i) gradients.emplace_back(empty(x, {0}));
    }
  MaybeTensor dparams_of_rows;
  if (need_dw && params > 0) dparams_of_rows = zeros({p.R, p.B, params, p.H}, wide);
  const bool share_dx = p.R > 1 && x.dim() == 3;  // several recurrences add to the same dx
  const Tensor dx = !need_dx ? empty(x, {0}) : share_dx || p.B == 0 ? zeros(sizes_of(x), type) : empty(x, sizes_of(x));

  if (p.B > 0) {
    const int64_t rows = range_rows(p, DG, int64_t(x.element_size()));
    const int64_t range = recompute ? kCheckpointEvery : std::min(p.T, (rows + p.B - 1) / p.B);
    const int64_t last = (p.T - 1) / range * range;
    const Tensor dgates = empty(x, {range, p.B, p.R, DG, p.H});
    MaybeTensor dprojected, unprojected;
    if (layer.projects) {
      dprojected = empty(x, {range, p.B, p.R, p.P});
      unprojected = empty(x, {range, p.B, p.R, p.H});
    }
    std::vector<Tensor> first = initial, running,
                        again_histories;  // recompute: what entered the range; its copy, which runs; and what that leaves
    MaybeTensor again_saved;
    if (recompute) {
      again_saved = empty(x, {range, p.B, p.R, p.cell->saved, p.H});
      for (int i = 0; i < ST; ++i) {
        first[size_t(i)] = empty({p.R, p.B, layer.width(size_t(i))}, wide);
        running.push_back(empty({p.R, p.B, layer.width(size_t(i))}, wide));
        if (i > 0) again_histories.push_back(empty(x, {range, p.B, p.R, p.H}));
      }
    }
    for (int64_t start = last; start >= 0; start -= range) {
      Backward b{};
      b.p = p;
      b.p.start = start;
      b.p.stop = std::min(p.T, start + range);
      if (recompute) {
        Forward again{};
        again.p = b.p;
        again.x = layer.input();
        again.saved = again_saved->mutable_data_ptr();
        for (int i = 0; i < ST; ++i) {
          const Tensor &entering = first[size_t(i)], &state = running[size_t(i)];
          const size_t bytes = size_t(entering.numel()) * entering.element_size();
          if (i == 0) {
            take_entering(p, hidden, initial[0], start, entering);
          } else {
            const char* const kept = static_cast<const char*>(histories[size_t(i - 1)].const_data_ptr());
            memcpy(entering.mutable_data_ptr(), kept + size_t(start / range) * bytes, bytes);
            again.histories[i] = again_histories[size_t(i - 1)].mutable_data_ptr();
          }
          memcpy(state.mutable_data_ptr(), entering.const_data_ptr(), bytes);
          again.states[i] = state.mutable_data_ptr();
        }
        cpu::kernels().forward(again);
      }
      b.dy = dy ? dy->const_data_ptr() : nullptr;
      b.hidden = hidden.const_data_ptr();
      b.saved = (recompute ? *again_saved : saved).const_data_ptr();
      b.whole = !recompute;
      for (int i = 0; i < ST; ++i) {
        if (i > 0 && !dsequences.empty() && !is_absent(dsequences[size_t(i - 1)]))
          b.dsequences[i] = dsequences[size_t(i - 1)].const_data_ptr();
        if (i > 0) b.histories[i] = (recompute ? again_histories : histories)[size_t(i - 1)].const_data_ptr();
        b.first[i] = first[size_t(i)].const_data_ptr();
        b.dstates[i] = d[size_t(i)].mutable_data_ptr();
      }
      b.dgates = dgates.mutable_data_ptr();
      if (dparams_of_rows) b.dparams = dparams_of_rows->mutable_data_ptr();
      b.need_dh = start > 0 || h0;
      if (layer.projects) {
        b.dprojected = dprojected->mutable_data_ptr();
        b.unprojected = unprojected->mutable_data_ptr();
      }
      cpu::kernels().backward(b);

      if (!need_dw && !need_dx) continue;
      Products q{};
      q.p = b.p;
      q.dgates = b.dgates;
      q.x = layer.input();
      q.hidden = b.hidden;
      q.saved = b.saved;
      q.whole = b.whole;
      q.h0 = h0 ? h0->const_data_ptr() : nullptr;
      q.dprojected = b.dprojected;
      q.unprojected = b.unprojected;
      if (need_dw) {
        q.dw_ih = dw_ih.data();
        if (p.cell->recurrent) q.dw_hh = dw_hh.data();
        if (layer.projects) q.dw_hr = dw_hr.data();
        q.dmatrices = dmatrices.data();
        if (layer.bias) q.db_ih = db_ih.data();
        if (layer.bias && p.cell->recurrent) q.db_hh = db_hh.data();
      }
      if (need_dx) q.dx = dx.mutable_data_ptr();
      q.add_dx = share_dx;
      q.first = start == last;
      cpu::kernels().products(q);
    }
  }

  if (dparams_of_rows && p.B > 0) sum_params(p, *dparams_of_rows, dparams);

  std::vector<Tensor> out{dx};
  for (size_t i = 0; i < states.size(); ++i) out.push_back(converted(d[i], type));
  for (const Gradient& g : gradients) out.push_back(g.finish());
  return out;
}

}  // namespace
}  // namespace fused_rnn::ops

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("backward", TORCH_BOX(&fused_rnn::ops::cpu_backward)); }
