#include "dlpack_view.h"

namespace at {
// Not of the stable ABI, hence weak: where it is not there, every call takes the way on which callbacks are called.
__attribute__((weak)) bool hasCallbacks();
}  // namespace at

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

namespace {

PyObject *forward_ad_names, *current_level;

}  // namespace

void watch_forward_ad(PyObject* forward_ad) {
  Py_INCREF(forward_ad);  // for good
  forward_ad_names = forward_ad;
  current_level = PyUnicode_InternFromString("_current_level");
}

bool has_tangents() {
  PyObject* const level = forward_ad_names ? PyDict_GetItemWithError(forward_ad_names, current_level) : nullptr;
  const bool off = level && PyLong_Check(level) && PyLong_AsLong(level) < 0;
  PyErr_Clear();
  return !off;
}

bool has_callbacks() { return !at::hasCallbacks || at::hasCallbacks(); }

namespace {

// Whether a tensor is a lazy negation of what its memory holds, which DLPack does not tell.
bool is_negative(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const Owned answer{PyObject_CallMethodNoArgs(tensor, name)};
  PyErr_Clear();
  return answer.object != Py_False;
}

// How many numbers it holds; 0 where it is not such a tensor.
int64_t lent(PyObject* object, dlpack::Tensor& t, int dims, int64_t s0, int64_t s1, int64_t s2) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) return 0;
  if (exchange->tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    return 0;
  }
  if (t.ndim != dims || !t.data || t.device_type != dlpack::kCpu || t.lanes != 1) return 0;
  const int64_t expected[3] = {s0, s1, s2};
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    if (expected[i] >= 0 && t.shape[i] != expected[i]) return 0;
    if (t.shape[i] != 1 && t.strides && t.strides[i] != stride) return 0;
    stride *= t.shape[i];
  }
  if (is_negative(object)) return 0;
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return stride;
}

}  // namespace

bool read(PyObject* object, dlpack::Tensor& t, int dims, int64_t s0, int64_t s1, int64_t s2) {
  return lent(object, t, dims, s0, s1, s2) > 0 && (t.code == dlpack::kFloat || t.code == dlpack::kBfloat);
}

bool dtype_of(const dlpack::Tensor& t, Dtype& dtype) {
  if (t.code == dlpack::kBfloat) dtype = Dtype::bf16;
  else if (t.bits == 16) dtype = Dtype::f16;
  else if (t.bits == 32) dtype = Dtype::f32;
  else if (t.bits == 64) dtype = Dtype::f64;
  else return false;
  return true;
}

bool read_integers(PyObject* object, dlpack::Tensor& t, int64_t s0) {
  return lent(object, t, 1, s0, 0, 0) > 0 && t.code == dlpack::kInt && t.bits == 64;
}

bool read_bools(PyObject* object, dlpack::Tensor& t, int64_t s0, int64_t s1) {
  return lent(object, t, 2, s0, s1, 0) > 0 && t.code == dlpack::kBool && t.bits == 8;
}

bool read_bytes(PyObject* object, dlpack::Tensor& t, int64_t s0, int64_t s1) {
  return lent(object, t, 2, s0, s1, 0) > 0 && t.code == dlpack::kInt && t.bits == 8;
}

}  // namespace fused_rnn::ops
