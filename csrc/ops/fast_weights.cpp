#include "fast_weights.h"

#include "../cpu/program.h"

namespace fused_rnn::ops {
namespace {

constexpr int kSuffixes = 1 + 2 * kMostLayers;  // none, in a single step; then of each layer there and back
// Written once, at import.
PyObject *suffixes[kSuffixes], *names[kSuffixes][5];

}  // namespace

void name_weights() {
  constexpr const char* kNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  for (int s = 0; s < kSuffixes; ++s) {
    suffixes[s] = s ? PyUnicode_FromFormat("_l%d%s", (s - 1) / 2, s % 2 ? "" : "_reverse") : PyUnicode_FromString("");
    for (int i = 0; i < 5; ++i) names[s][i] = PyUnicode_FromFormat("%s%U", kNames[i], suffixes[s]);
  }
}

PyObject* ModuleWeights::named(PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(parameters_, name);
  if (found) Py_INCREF(held_[held_count_++] = found);
  return found;
}

bool ModuleWeights::read(int layers, int directions, int64_t D, int first) {
  directions_ = directions;
  if (layers == 0) return read_one(0, D, weights_[0]);
  for (int i = 0; i < layers * directions; ++i) {
    const int layer = i / directions, way = i % directions;
    if (!read_one(1 + 2 * (first + layer) + way, layer ? directions * P : D, weights_[i])) return false;
    weights_[i].direction = way ? -1 : 1;
  }
  return true;
}

bool ModuleWeights::are(const Packed& packed, Dtype dtype, int64_t D) {
  const Problem& p = packed.problem();
  H = p.H, P = p.P;
  return p.dtype == dtype && p.D == D;
}

bool ModuleWeights::read_one(int place, int64_t D, Weights& w) {
  w = {};
  w.direction = 1;
  const int G = cell_.gates;
  const bool recurrent = cell_.recurrent, first = held_count_ == 0;
  PyObject* own[5];
  for (int i = 0; i < 5; ++i) own[i] = named(names[place][i]);
  dlpack::Tensor ih{}, hh{}, t{};
  if (!lies(own[0], ih, first ? -1 : G * H, D)) return false;
  if (first) {
    H = ih.shape[0] / G;
    projects = cell_.projects && own[4];
    if (H == 0 || ih.shape[0] != G * H) return false;
  }
  w.w_ih = ih.data;
  if (recurrent && !lies(own[1], hh, G * H, first ? -1 : P / cell_.diagonal)) return false;
  if (first) P = recurrent ? hh.shape[1] * cell_.diagonal : H;
  if (!projects && P != H) return false;
  w.w_hh = hh.data;
  const void** const biases[] = {&w.b_ih, &w.b_hh};
  for (int i = 0; i < 1 + recurrent && bias_; ++i) {
    if (!lies(own[2 + i], t, G * H)) return false;
    *biases[i] = t.data;
  }
  if (projects) {
    if (!lies(own[4], t, P, H)) return false;
    w.w_hr = t.data;
  }
  for (int i = 0; i < cell_.matrices + cell_.params; ++i) {
    if (!cell_.program) return false;  // of the others nobody has said their params' names
    const int param = i - cell_.matrices;
    const Owned name{
        PyUnicode_FromFormat("%s%U", param < 0 ? cell_.program->matrix_names[i] : cell_.program->param_names[param], suffixes[place])};
    if (!name.object) return false;
    PyObject* const object = named(name.object);
    if (!(param < 0 ? lies(object, t, cell_.blocks_of[i] * H, H) : lies(object, t, H))) return false;
    (param < 0 ? w.matrices[i] : w.params[param]) = t.data;
  }
  return true;
}

}  // namespace fused_rnn::ops
