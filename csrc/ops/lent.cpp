#include "lent.h"

namespace fused_rnn::ops {

const dlpack::Exchange* exchange = nullptr;
PyObject *tensor_type, *parameter_type, *empty_like;

PyObject* use_exchange(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "use_exchange: expected a capsule, two types and a function");
    return nullptr;
  }
  const auto* api = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->major != dlpack::kMajor || api->minor < dlpack::kMinor || !api->tensor_from_object) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);  // for good
  tensor_type = args[1], parameter_type = args[2], empty_like = args[3];
  exchange = api;
  Py_RETURN_TRUE;
}

bool read(PyObject* object, dlpack::Tensor& t, int dims, int64_t s0, int64_t s1, int64_t s2) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) return false;
  if (exchange->tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool is_float = t.code == dlpack::kFloat || t.code == dlpack::kBfloat;
  if (t.ndim != dims || !t.data || t.device_type != dlpack::kCpu || !is_float || t.lanes != 1) return false;
  const int64_t expected[3] = {s0, s1, s2};
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    if (expected[i] >= 0 && t.shape[i] != expected[i]) return false;
    if (t.shape[i] != 1 && t.strides && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return stride > 1;  // a single number may be a lazy negation of another, which DLPack does not tell
}

}  // namespace fused_rnn::ops
