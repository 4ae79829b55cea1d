// Tensors that torch lends to plain functions of the Python module, through DLPack's C exchange API: without its dispatcher, which takes
// longer than a small step, and by as stable an interface as LibTorch's.
#pragma once
#include <Python.h>

#include "../params.h"
#include "dlpack.h"

namespace fused_rnn::ops {

// What `use_exchange` was given. Written once, at import; null where this torch has no such API.
extern const dlpack::Exchange* exchange;
extern PyObject *tensor_type, *parameter_type, *empty_like;

// use_exchange(capsule, Tensor, Parameter, empty_like): the exchange API of torch.Tensor, the types that it may read, how to make a result.
PyObject* use_exchange(PyObject* module, PyObject* const* args, Py_ssize_t count);

// A plain, contiguous float tensor on the CPU: `dims` sizes, all given (-1: any).
bool read(PyObject* object, dlpack::Tensor& t, int dims, int64_t s0, int64_t s1 = 0, int64_t s2 = 0);
// Its dtype, if it is one that there are loops for.
bool dtype_of(const dlpack::Tensor& t, Dtype& dtype);
// Likewise of int64, of bool, and of int8.
bool read_integers(PyObject* object, dlpack::Tensor& t, int64_t s0);
bool read_bools(PyObject* object, dlpack::Tensor& t, int64_t s0, int64_t s1);
bool read_bytes(PyObject* object, dlpack::Tensor& t, int64_t s0, int64_t s1);

// What watches a call that the dispatcher does not see, in two nanoseconds. forward_ad: the names of torch.autograd.forward_ad, which keeps
// its level there alone. Callbacks are those of profilers and tracers of executions, of this thread or of all.
void watch_forward_ad(PyObject* forward_ad);
bool has_tangents();
bool has_callbacks();

struct Owned {  // a reference that is given back
  PyObject* object = nullptr;
  Owned(PyObject* given = nullptr) : object(given) {}
  Owned(Owned&& other) noexcept : object(other.object) { other.object = nullptr; }
  ~Owned() { Py_XDECREF(object); }
};

template <class F>
PyCFunction as_method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fused_rnn::ops
