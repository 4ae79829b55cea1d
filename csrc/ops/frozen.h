// The packed weights of a module, kept from call to call for as long as it can be told that they are its weights.
#pragma once
#include <Python.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "dlpack_view.h"
#include "packed.h"

namespace fused_rnn::ops {

class Frozen {
 public:
  // names: of the tensors of every direction of every layer, in the order of the op's weights. A matrix of int8 has a scale for each row
  // beside it, by its name and "_scale". narrow: what such are packed as.
  Frozen(std::string cell, std::vector<std::string> names, int64_t layers, int64_t directions, Narrow narrow);

  // What the tensors of these names hold now, packed: what is kept, where each is the tensor it was, at its address, in its version; else
  // packed anew. Null where one is no such tensor, or has no version; never an exception. With the interpreter's lock.
  std::shared_ptr<const Packed> of(PyObject* tensors);
  void forget() { kept_.reset(); }
  // Steps before a call of T.
  int64_t turn(int64_t T) { return turn_.fetch_add(T); }

  const std::string& cell() const { return cell_; }
  const std::vector<std::string>& names() const { return names_; }
  int64_t layers() const { return layers_; }
  int64_t directions() const { return directions_; }
  Narrow narrow() const { return narrow_; }

 private:
  struct Stamp {
    Owned reference;  // weak, to the tensor
    Owned alias;      // of its memory, which nothing else can lie in while this is here
    dlpack::Tensor tensor;
    int64_t shape[2], strides[2];
    int64_t version;
  };
  struct Kept {
    Packed packed;
    std::vector<Stamp> stamps;
  };
  std::string cell_;
  std::vector<std::string> names_;
  std::vector<Owned> keys_, scales_;  // the names as Python has them; of what may have one, the scale's
  int64_t layers_, directions_;
  Narrow narrow_;
  std::shared_ptr<const Kept> kept_;
  std::atomic<int64_t> turn_{0};

  bool same(const Kept& kept, PyObject* tensors) const;
  std::shared_ptr<const Kept> pack(PyObject* tensors) const;
};

// An argument of the fast path's, if it keeps what such a call needs; else null, for None is one, too.
Frozen* frozen_of(PyObject* object, const char* cell, int64_t layers, int64_t directions);
// Adds the class Frozen to the module.
void add_frozen(PyObject* module);

}  // namespace fused_rnn::ops
