// A module's weights, read by their names.
#pragma once
#include <Python.h>

#include "../params.h"
#include "dlpack_view.h"
#include "packed.h"

namespace fused_rnn::ops {

constexpr int kMostLayers = 16;  // of a stack that the fast path runs

// Makes the names. At import.
void name_weights();

class ModuleWeights {
 public:
  int64_t H = 0, P = 0;
  bool projects = false;

  // parameters: a dict.  like: they have its dtype.
  ModuleWeights(PyObject* parameters, const CellDescriptor& cell, bool bias, const dlpack::Tensor& like)
      : parameters_(parameters), cell_(cell), bias_(bias), like_(like) {}
  ~ModuleWeights() {
    for (int i = 0; i < held_count_; ++i) Py_DECREF(held_[i]);
  }
  ModuleWeights(const ModuleWeights&) = delete;

  // Those of a single step (layers = 0), or of each layer in each direction, from the first of them on. False where one is missing or out
  // of the ordinary.
  bool read(int layers, int directions, int64_t D, int first);
  // Those are packed already. False where they are not for such a call.
  bool are(const Packed& packed, Dtype dtype, int64_t D);
  const Weights* of_layer(int layer) const { return weights_ + layer * directions_; }

 private:
  static constexpr int kMostRecurrences = 2 * kMostLayers, kMostEach = 5 + kMostBlocks + kMostParams;

  bool read_one(int place, int64_t D, Weights& w);
  // What a name stands for, or null; held while other threads may run, who may set another.
  PyObject* named(PyObject* name);
  template <class... Sizes>
  bool lies(PyObject* object, dlpack::Tensor& t, Sizes... sizes) const {
    return object && ops::read(object, t, int(sizeof...(sizes)), sizes...) && t.bits == like_.bits && t.code == like_.code;
  }

  PyObject* parameters_;
  const CellDescriptor& cell_;
  bool bias_;
  const dlpack::Tensor& like_;
  int directions_ = 1, held_count_ = 0;
  PyObject* held_[kMostRecurrences * kMostEach];
  Weights weights_[kMostRecurrences];
};

}  // namespace fused_rnn::ops
