// A layer's forward, or one step, for the modules where no gradient is asked for: past torch's dispatcher and past the layers of Python
// above it, which together take longer than a small step, or a short sequence, takes in all. Whatever is not an ordinary call,
// on ordinary tensors (dlpack_view.h), with nothing watching, gets None and takes the way through the op.
#include "fast_path.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <new>

#include "dlpack_view.h"
#include "tensors.h"

namespace fused_rnn::ops {
namespace {

constexpr Py_ssize_t kMostWatchers = 8;
constexpr int64_t kLongCall = 1 << 18;  // bytes of weights times steps, from where on other Python threads may run meanwhile

// What `watch_steps` was given. Written once, at import.
PyObject *new_empty, *watchers[kMostWatchers];
PyObject* names[2][5];  // of the weights, in a cell and in a layer
Py_ssize_t watching = 0;

// watch_steps(watchers, forward_ad): functions that say whether something is on that a call of an op would not pass unnoticed, and the
// names of torch.autograd.forward_ad.
PyObject* watch_steps(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) > kMostWatchers || !PyDict_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "watch_steps: expected a tuple of at most 8 functions, and a dict");
    return nullptr;
  }
  watch_forward_ad(args[1]);
  PyObject* const tuple = args[0];
  Py_INCREF(tuple);  // for good
  watching = PyTuple_GET_SIZE(tuple);
  for (Py_ssize_t i = 0; i < watching; ++i) watchers[i] = PyTuple_GET_ITEM(tuple, i);
  new_empty = PyUnicode_InternFromString("new_empty");
  constexpr const char* kNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  for (int layer = 0; layer < 2; ++layer)
    for (int i = 0; i < 5; ++i) names[layer][i] = PyUnicode_FromFormat(layer ? "%s_l0" : "%s", kNames[i]);
  Py_RETURN_NONE;
}

// A new tensor shaped as `like`, holding what `from` holds.
bool make(PyObject* like, const dlpack::Tensor& from, size_t bytes, Owned& made, dlpack::Tensor& t) {
  made.object = PyObject_Vectorcall(empty_like, &like, 1, nullptr);
  if (!made.object) return false;
  if (exchange->tensor_from_object(made.object, &t) != 0) return false;
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  memcpy(t.data, from.data, bytes);
  return true;
}

// A new tensor of x's dtype, [s0, s1, width], or [s1, width] where s0 is 0.
bool make_new(PyObject* x, int64_t s0, int64_t s1, int64_t width, Owned& made, dlpack::Tensor& t) {
  const Owned sizes[] = {{PyLong_FromLongLong(s0)}, {PyLong_FromLongLong(s1)}, {PyLong_FromLongLong(width)}};
  PyObject* const args[] = {x, sizes[0].object, sizes[1].object, sizes[2].object};
  PyObject* const flat[] = {x, sizes[1].object, sizes[2].object};
  made.object = PyObject_VectorcallMethod(new_empty, s0 ? args : flat, s0 ? 4 : 3, nullptr);
  if (!made.object || exchange->tensor_from_object(made.object, &t) != 0) return false;
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return true;
}
// Likewise, holding zeros.
bool make_zero(PyObject* x, bool sequence, int64_t B, int64_t width, size_t element, Owned& made, dlpack::Tensor& t) {
  if (!make_new(x, sequence, B, width, made, t)) return false;
  memset(t.data, 0, size_t(B * width) * element);
  return true;
}

// Are all of them lengths of a sequence of T steps?
bool within(const dlpack::Tensor& lengths, int64_t T) {
  const auto* length = static_cast<const int64_t*>(lengths.data);
  for (int64_t b = 0; b < lengths.shape[0]; ++b)
    if (length[b] < 0 || length[b] > T) return false;
  return true;
}

// fast_path(parameters, bias, x, h, c, cell, axis, [lengths, reset]): as the op fused_rnn::step on a cell's x of two dimensions, and as
// fused_rnn::forward of one recurrence on a layer's three, in float32 or float64. parameters: a module's own, by name; bias: whether it has
// biases. axis: the one that is time in an x of three dimensions, -1 in a cell. reset is laid out as x. A tuple, or None.
PyObject* fast_path(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if ((count != 7 && count != 9) || !exchange || !PyDict_Check(args[0]) || aoti_torch_grad_mode_is_enabled()) Py_RETURN_NONE;
  PyObject *const x_object = args[2], *const h_object = args[3], *const c_object = args[4];
  const int cell = int(PyLong_AsLong(args[5])), axis = int(PyLong_AsLong(args[6]));
  if (PyErr_Occurred()) return nullptr;
  if (cell < 0 || cell > 3 || axis > 1) Py_RETURN_NONE;
  const int G = gates_of(Cell(cell));
  const bool lstm = has_cell(Cell(cell)), sequence = axis >= 0, bias = PyObject_IsTrue(args[1]) == 1, zero = h_object == Py_None;
  if ((c_object != Py_None) != (lstm && !zero)) Py_RETURN_NONE;
  const bool has_lengths = count == 9 && args[7] != Py_None, has_reset = count == 9 && args[8] != Py_None;
  // Before any tensor is read: torch refuses to lend one that a transform has wrapped by a C++ exception, in 1 ms.
  if (has_tangents() || has_callbacks()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < watching; ++i) {
    const Owned answer{PyObject_CallNoArgs(watchers[i])};
    if (!answer.object) return nullptr;
    const int on = PyObject_IsTrue(answer.object);
    if (on < 0) return nullptr;
    if (on) Py_RETURN_NONE;
  }
  dlpack::Tensor x, h, c{}, w_ih, w_hh, b_ih{}, b_hh{}, w_hr{}, lengths{}, reset{};
  if (sequence ? !read(x_object, x, 3, -1, -1, -1) : !read(x_object, x, 2, -1, -1)) Py_RETURN_NONE;
  const int64_t T = sequence ? x.shape[axis] : 1, B = sequence ? x.shape[1 - axis] : x.shape[0], D = x.shape[x.ndim - 1];
  if (axis == 1 && B != 1) Py_RETURN_NONE;  // not in the order of time
  if ((has_lengths || has_reset) && !sequence) Py_RETURN_NONE;
  if (has_lengths && (!read_integers(args[7], lengths, B) || !within(lengths, T))) Py_RETURN_NONE;
  if (has_reset && !read_bools(args[8], reset, x.shape[0], x.shape[1])) Py_RETURN_NONE;
  PyObject* weights[5];  // borrowed; null: not there, or computed
  for (int i = 0; i < 5; ++i) weights[i] = PyDict_GetItemWithError(args[0], names[sequence][i]);
  const bool projects = lstm && weights[4];
  if (!weights[0] || !weights[1] || (bias && !(weights[2] && weights[3])) || !read(weights[1], w_hh, 2, -1, -1)) Py_RETURN_NONE;
  const int64_t H = w_hh.shape[0] / G, P = w_hh.shape[1];
  if (w_hh.shape[0] != G * H || (!projects && P != H)) Py_RETURN_NONE;
  if (!zero && (sequence ? !read(h_object, h, 3, 1, B, P) : !read(h_object, h, 2, B, P))) Py_RETURN_NONE;
  if (!zero && lstm && (sequence ? !read(c_object, c, 3, 1, B, H) : !read(c_object, c, 2, B, H))) Py_RETURN_NONE;
  if (!read(weights[0], w_ih, 2, G * H, D)) Py_RETURN_NONE;
  if (bias && (!read(weights[2], b_ih, 1, G * H) || !read(weights[3], b_hh, 1, G * H))) Py_RETURN_NONE;
  if (projects && !read(weights[4], w_hr, 2, P, H)) Py_RETURN_NONE;
  const int bits = x.bits;
  if ((bits != 32 && bits != 64) || w_ih.bits != bits || w_hh.bits != bits || (!zero && h.bits != bits) ||
      (!zero && lstm && c.bits != bits) || (bias && (b_ih.bits != bits || b_hh.bits != bits)) || (projects && w_hr.bits != bits))
    Py_RETURN_NONE;

  const size_t element = size_t(bits / 8);
  const Weights w{w_ih.data, w_hh.data, b_ih.data, b_hh.data, w_hr.data, 1};
  Owned y, h_n, c_n;
  dlpack::Tensor y_out{}, h_out, c_out{};
  const bool states =
      zero ? make_zero(x_object, sequence, B, P, element, h_n, h_out) && (!lstm || make_zero(x_object, sequence, B, H, element, c_n, c_out))
           : make(h_object, h, size_t(B * P) * element, h_n, h_out) && (!lstm || make(c_object, c, size_t(B * H) * element, c_n, c_out));
  if (!states) return nullptr;
  if (sequence && !(T == 1 ? make(h_n.object, h_out, 0, y, y_out) : make_new(x_object, x.shape[0], x.shape[1], P, y, y_out)))
    return nullptr;
  Forward f{};
  f.p = {Cell(cell), bits == 32 ? Dtype::f32 : Dtype::f64, T, B, D, H, P, 1, 0, T, &w, nullptr, nullptr, 1};
  f.p.lengths = static_cast<const int64_t*>(lengths.data);
  f.p.reset = static_cast<const uint8_t*>(reset.data);
  f.p.threads = threads_for(f.p);
  f.x = x.data;
  f.h_is_zero = zero;
  f.h = h_out.data;
  f.c = c_out.data;
  f.y = y_out.data;
  bool enough = true;
  const auto run = [&] {
    try {
      cpu::kernels().forward(f);
    } catch (const std::bad_alloc&) {
      enough = false;
    }
  };
  if (T * G * H * (D + P) * int64_t(element) < kLongCall) {
    run();
  } else {
    Py_BEGIN_ALLOW_THREADS;
    run();
    Py_END_ALLOW_THREADS;
  }
  if (!enough) return PyErr_NoMemory();
  PyObject* const results[] = {y.object, h_n.object, c_n.object};
  return sequence ? PyTuple_Pack(lstm ? 3 : 2, results[0], results[1], results[2]) : PyTuple_Pack(lstm ? 2 : 1, results[1], results[2]);
}

PyMethodDef methods[] = {
    {"use_exchange", as_method(use_exchange), METH_FASTCALL,
     "Hand over torch.Tensor's DLPack exchange API; False if it is of another version."},
    {"watch_steps", as_method(watch_steps), METH_FASTCALL, "Hand over what says that a step has to be seen as an op."},
    {"fast_path", as_method(fast_path), METH_FASTCALL, "A layer without gradient, or a single step, past the dispatcher; or None."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_fast_path(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace fused_rnn::ops
