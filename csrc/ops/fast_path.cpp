// A layer's forward, or one step, for the modules where no gradient is asked for: past torch's dispatcher and past the layers of Python
// above it, which together take longer than a small step, or a short sequence, takes in all. Whatever is not an ordinary call,
// on ordinary tensors (dlpack_view.h), with nothing watching, gets None and takes the way through the op.
#include "fast_path.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "dlpack_view.h"
#include "tensors.h"

namespace fused_rnn::ops {
namespace {

constexpr Py_ssize_t kMostWatchers = 8;
constexpr double kLongCall = 50;  // microseconds, from where on other Python threads may run meanwhile

// What `watch_steps` was given. Written once, at import.
PyObject *new_empty, *transpose, *zero_one[2], *watchers[kMostWatchers];
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
  transpose = PyUnicode_InternFromString("transpose_");
  for (int i = 0; i < 2; ++i) zero_one[i] = PyLong_FromLong(i);
  constexpr const char* kNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  for (int layer = 0; layer < 2; ++layer)
    for (int i = 0; i < 5; ++i) names[layer][i] = PyUnicode_FromFormat(layer ? "%s_l0" : "%s", kNames[i]);
  Py_RETURN_NONE;
}

// Reads where a new tensor lies.
bool locate(const Owned& made, dlpack::Tensor& t) {
  if (!made.object || exchange->tensor_from_object(made.object, &t) != 0) return false;
  t.data = static_cast<char*>(t.data) + t.byte_offset;
  return true;
}
// A new tensor shaped as `like`.
bool make_like(PyObject* like, Owned& made, dlpack::Tensor& t) {
  made.object = PyObject_Vectorcall(empty_like, &like, 1, nullptr);
  return locate(made, t);
}
// A new tensor of x's dtype, [s0, s1, width], or [s1, width] where s0 is 0.
bool make_new(PyObject* x, int64_t s0, int64_t s1, int64_t width, Owned& made, dlpack::Tensor& t) {
  const Owned sizes[] = {{PyLong_FromLongLong(s0)}, {PyLong_FromLongLong(s1)}, {PyLong_FromLongLong(width)}};
  PyObject* const args[] = {x, sizes[0].object, sizes[1].object, sizes[2].object};
  PyObject* const flat[] = {x, sizes[1].object, sizes[2].object};
  made.object = PyObject_VectorcallMethod(new_empty, s0 ? args : flat, s0 ? 4 : 3, nullptr);
  return locate(made, t);
}

// Are all of them lengths of a sequence of T steps?
bool within(const dlpack::Tensor& lengths, int64_t T) {
  const auto* length = static_cast<const int64_t*>(lengths.data);
  for (int64_t b = 0; b < lengths.shape[0]; ++b)
    if (length[b] < 0 || length[b] > T) return false;
  return true;
}

// Memory of this call; null with an exception set where there is none.
template <class T>
T* taken(std::unique_ptr<T[]>& memory, int64_t count) {
  memory.reset(new (std::nothrow) T[size_t(count)]);
  if (!memory) PyErr_NoMemory();
  return memory.get();
}

bool dtype_of(const dlpack::Tensor& t, Dtype& dtype) {
  if (t.code == dlpack::kBfloat) dtype = Dtype::bf16;
  else if (t.bits == 16) dtype = Dtype::f16;
  else if (t.bits == 32) dtype = Dtype::f32;
  else if (t.bits == 64) dtype = Dtype::f64;
  else return false;
  return true;
}

// fast_path(parameters, bias, x, hx, cell, axis, [lengths, reset]): as the op fused_rnn::step on a cell's x of two dimensions, and as
// fused_rnn::forward of one recurrence on a layer's three. parameters: a module's own, by name; bias: whether it has biases. hx: None, the
// state, or a tuple of states. axis: the one that is time in an x of three dimensions, -1 in a cell. reset is laid out as x. A tuple, or
// None.
PyObject* fast_path_of(PyObject* const* args, Py_ssize_t count) {
  if ((count != 6 && count != 8) || !exchange || !PyDict_Check(args[0]) || aoti_torch_grad_mode_is_enabled()) Py_RETURN_NONE;
  PyObject *const x_object = args[2], *const hx = args[3];
  const char* const name = PyUnicode_AsUTF8(args[4]);
  const int axis = int(PyLong_AsLong(args[5]));
  if (PyErr_Occurred()) return nullptr;
  const CellDescriptor* cell = find_cell(name);
  if (std::string reason; !cell)
    if (const Program* const program = cpu::program_of(name, reason)) cell = &program->cell;
  if (!cell || axis > 1 || cell->masks) Py_RETURN_NONE;
  const int G = cell->gates, ST = cell->states;
  const bool sequence = axis >= 0, bias = PyObject_IsTrue(args[1]) == 1, zero = hx == Py_None, several = ST > 1 && !zero;
  if (several && (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != ST)) Py_RETURN_NONE;
  const bool has_lengths = count == 8 && args[6] != Py_None, has_reset = count == 8 && args[7] != Py_None;
  // Before any tensor is read: torch refuses to lend one that a transform has wrapped by a C++ exception, in 1 ms.
  if (has_tangents() || has_callbacks()) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < watching; ++i) {
    const Owned answer{PyObject_CallNoArgs(watchers[i])};
    if (!answer.object) return nullptr;
    const int on = PyObject_IsTrue(answer.object);
    if (on < 0) return nullptr;
    if (on) Py_RETURN_NONE;
  }
  dlpack::Tensor x, weights[5]{}, matrices[kMostBlocks], params[kMostParams], states[kMostStates], lengths{},
      reset{};  // weights as Weights has them
  if (sequence ? !read(x_object, x, 3, -1, -1, -1) : !read(x_object, x, 2, -1, -1)) Py_RETURN_NONE;
  const int64_t T = sequence ? x.shape[axis] : 1, B = sequence ? x.shape[1 - axis] : x.shape[0], D = x.shape[x.ndim - 1];
  const bool batch_first = axis == 1 && B > 1 && T > 1;
  if ((has_lengths || has_reset) && !sequence) Py_RETURN_NONE;
  if (has_lengths && (!read_integers(args[6], lengths, B) || !within(lengths, T))) Py_RETURN_NONE;
  if (has_reset && !read_bools(args[7], reset, x.shape[0], x.shape[1])) Py_RETURN_NONE;
  Dtype dtype;
  if (!dtype_of(x, dtype)) Py_RETURN_NONE;
  const auto alike = [&](const dlpack::Tensor& t) { return t.bits == x.bits && t.code == x.code; };
  PyObject* own[5];  // null: not there, or computed
  Owned held[5];     // while other threads may run, who may set others
  for (int i = 0; i < 5; ++i) {
    own[i] = PyDict_GetItemWithError(args[0], names[sequence][i]);
    Py_XINCREF(held[i].object = own[i]);
  }
  const bool projects = cell->projects && own[4], recurrent = cell->recurrent;
  if (!own[0] || !read(own[0], weights[0], 2, -1, D)) Py_RETURN_NONE;
  const int64_t H = weights[0].shape[0] / G;
  if (weights[0].shape[0] != G * H || H == 0 || !alike(weights[0])) Py_RETURN_NONE;
  if (recurrent && (!own[1] || !read(own[1], weights[1], 2, G * H, -1) || !alike(weights[1]))) Py_RETURN_NONE;
  const int64_t P = recurrent ? weights[1].shape[1] * cell->diagonal : H;
  if (!projects && P != H) Py_RETURN_NONE;
  for (int i = 2; i < 3 + recurrent && bias; ++i)
    if (!own[i] || !read(own[i], weights[i], 1, G * H) || !alike(weights[i])) Py_RETURN_NONE;
  if (projects && (!read(own[4], weights[4], 2, P, H) || !alike(weights[4]))) Py_RETURN_NONE;
  Owned held_own[kMostBlocks + kMostParams];
  for (int i = 0; i < cell->matrices + cell->params; ++i) {
    if (!cell->program) Py_RETURN_NONE;  // of the others nobody has said their params' names
    const int param = i - cell->matrices;
    const char* const own_name = param < 0 ? cell->program->matrix_names[i] : cell->program->param_names[param];
    const Owned key{PyUnicode_FromFormat(sequence ? "%s_l0" : "%s", own_name)};
    if (!key.object) return nullptr;
    PyObject* const object = PyDict_GetItemWithError(args[0], key.object);
    if (!object) Py_RETURN_NONE;
    Py_INCREF(held_own[i].object = object);
    dlpack::Tensor& t = param < 0 ? matrices[i] : params[param];
    if (!(param < 0 ? read(object, t, 2, cell->blocks_of[i] * H, H) : read(object, t, 1, H)) || !alike(t)) Py_RETURN_NONE;
  }
  const auto width = [&](int i) { return i == 0 ? P : H; };
  const auto state_object = [&](int i) { return several ? PyTuple_GET_ITEM(hx, i) : hx; };
  for (int i = 0; i < ST && !zero; ++i)
    if (!(sequence ? read(state_object(i), states[i], 3, 1, B, width(i)) : read(state_object(i), states[i], 2, B, width(i))) ||
        !alike(states[i]))
      Py_RETURN_NONE;

  Weights w{weights[0].data, weights[1].data, weights[2].data, weights[3].data, weights[4].data, 1, {}, {}, {}, {}};
  for (int i = 0; i < cell->matrices; ++i) w.matrices[i] = matrices[i].data;
  for (int i = 0; i < cell->params; ++i) w.params[i] = params[i].data;
  const bool wide = dtype == Dtype::f32 || dtype == Dtype::f64;  // states are of the accumulation dtype as they stand
  Owned y, after[kMostStates];
  dlpack::Tensor y_out{}, after_out[kMostStates];
  Forward f{};
  std::unique_ptr<float[]> floats;
  float* scratch = wide ? nullptr : taken(floats, B * (P + (ST - 1) * H));
  if (!wide && !scratch) return nullptr;
  for (int i = 0; i < ST; ++i) {
    if (!(zero ? make_new(x_object, sequence, B, width(i), after[i], after_out[i]) : make_like(state_object(i), after[i], after_out[i])))
      return nullptr;
    const int64_t numbers = B * width(i);
    f.states[i] = wide ? after_out[i].data : scratch;
    scratch += wide ? 0 : numbers;
    if (zero) memset(f.states[i], 0, size_t(numbers) * (wide ? x.bits / 8 : sizeof(float)));
    else if (wide) memcpy(f.states[i], states[i].data, size_t(numbers) * (x.bits / 8));
    else cpu::kernels().convert(dtype, Dtype::f32, states[i].data, f.states[i], numbers);
  }
  if (sequence &&
      !(T == 1 && (axis == 0 || B == 1) ? make_like(after[0].object, y, y_out)
                                        : make_new(x_object, batch_first ? T : x.shape[0], batch_first ? B : x.shape[1], P, y, y_out)))
    return nullptr;
  f.p = {cell, dtype, T, B, D, H, P, 1, 0, T, &w, nullptr, nullptr, 1};
  f.p.lengths = static_cast<const int64_t*>(lengths.data);
  f.p.reset = static_cast<const uint8_t*>(reset.data);
  std::unique_ptr<uint8_t[]> flags;
  if (has_reset && batch_first) {
    uint8_t* const turned = taken(flags, T * B);
    if (!turned) return nullptr;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t b = 0; b < B; ++b) turned[t * B + b] = f.p.reset[b * T + t];
    f.p.reset = turned;
  }
  f.p.threads = threads_for(f.p);
  f.x = {x.data, batch_first ? D : B * D, batch_first ? T * D : D, 0};
  f.h_is_zero = zero;
  f.y = y_out.data;
  std::exception_ptr failed;
  const auto run = [&] {
    try {
      cpu::kernels().forward(f);
    } catch (...) {  // raised when this thread has the interpreter again
      failed = std::current_exception();
    }
  };
  if (microseconds_of(f.p) < kLongCall) {
    run();
  } else {
    Py_BEGIN_ALLOW_THREADS;
    run();
    Py_END_ALLOW_THREADS;
  }
  if (failed) std::rethrow_exception(failed);
  for (int i = 0; i < ST && !wide; ++i) cpu::kernels().convert(Dtype::f32, dtype, f.states[i], after_out[i].data, B * width(i));
  if (batch_first) {
    PyObject* const turn[] = {y.object, zero_one[0], zero_one[1]};
    const Owned same{PyObject_VectorcallMethod(transpose, turn, 3, nullptr)};
    if (!same.object) return nullptr;
  }
  PyObject* const results = PyTuple_New(sequence + ST);
  if (!results) return nullptr;
  for (int i = 0; i < sequence + ST; ++i) {
    Owned& one = i < sequence ? y : after[i - sequence];
    PyTuple_SET_ITEM(results, i, one.object);
    one.object = nullptr;
  }
  return results;
}

PyObject* fast_path(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return fast_path_of(args, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
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
