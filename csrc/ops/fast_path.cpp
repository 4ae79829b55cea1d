// The forward of layers, or one step, for the modules where no gradient is asked for: past torch's dispatcher and past the layers of
// Python above it, which together take longer than a small step, or a short sequence, takes in all. Whatever is not an ordinary call,
// on ordinary tensors (dlpack_view.h), with nothing watching, gets None and takes the way through the op.
#include "fast_path.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <exception>
#include <initializer_list>
#include <utility>

#include "fast_batch.h"
#include "fast_weights.h"
#include "frozen.h"
#include "tensors.h"

namespace fused_rnn::ops {
namespace {

constexpr Py_ssize_t kMostWatchers = 8;
constexpr double kLongCall = 50;  // microseconds, from where on other Python threads may run meanwhile

// What `watch_steps` was given. Written once, at import.
PyObject *new_empty, *transpose, *zero_one[2], *watchers[kMostWatchers];
Py_ssize_t watching = 0;

// watch_steps(watchers, forward_ad, packed): functions that say whether something is on that a call of an op would not pass unnoticed,
// the names of torch.autograd.forward_ad, and the type of packed sequences.
PyObject* watch_steps(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) > kMostWatchers || !PyDict_Check(args[1]) ||
      !PyType_Check(args[2]) || !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(args[2]), &PyTuple_Type)) {
    PyErr_SetString(PyExc_TypeError, "watch_steps: expected a tuple of at most 8 functions, a dict, and a type of tuples");
    return nullptr;
  }
  watch_forward_ad(args[1]);
  use_packed(args[2]);
  PyObject* const tuple = args[0];
  Py_INCREF(tuple);  // for good
  watching = PyTuple_GET_SIZE(tuple);
  for (Py_ssize_t i = 0; i < watching; ++i) watchers[i] = PyTuple_GET_ITEM(tuple, i);
  new_empty = PyUnicode_InternFromString("new_empty");
  transpose = PyUnicode_InternFromString("transpose_");
  for (int i = 0; i < 2; ++i) zero_one[i] = PyLong_FromLong(i);
  name_weights();
  Py_RETURN_NONE;
}

// Whether anything watches; or an exception is set.
bool watched() {
  // Before any tensor is read: torch refuses to lend one that a transform has wrapped by a C++ exception, in 1 ms.
  if (has_tangents() || has_callbacks()) return true;
  for (Py_ssize_t i = 0; i < watching; ++i) {
    const Owned answer{PyObject_CallNoArgs(watchers[i])};
    if (!answer.object || PyObject_IsTrue(answer.object) != 0) return true;
  }
  return false;
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
// A new tensor of x's dtype.
bool make_new(PyObject* x, std::initializer_list<int64_t> sizes, Owned& made, dlpack::Tensor& t) {
  Owned numbers[5];
  PyObject* args[6] = {x};
  size_t count = 0;
  for (const int64_t size : sizes) {
    numbers[count].object = PyLong_FromLongLong(size);
    if (!numbers[count].object) return false;
    args[count + 1] = numbers[count].object;
    ++count;
  }
  made.object = PyObject_VectorcallMethod(new_empty, args, 1 + count, nullptr);
  return locate(made, t);
}

// A state of all layers, as the caller has it and as the loops do.
struct State {
  int64_t width = 0;
  PyObject* given = nullptr;  // null: zeros
  dlpack::Tensor in{}, out{};
  Owned after;
  char* wide = nullptr;  // [L R, B, width] in the accumulation dtype, in the loops' order
};

// What a layer keeps for backward with save="gates".
struct Kept {
  Owned saved, hidden, histories[kMostStates];
  void *saved_at = nullptr, *hidden_at = nullptr, *histories_at[kMostStates] = {};
  bool copies_y = false;  // hidden is a second copy of y; else y itself, of a step or before it is packed, or nothing

  bool make(const Batch& batch, const Problem& p, bool sequence, bool last) {
    const auto lies = [&](std::initializer_list<int64_t> sizes, Owned& made, void*& at) {
      dlpack::Tensor t;
      if (!make_new(batch.data, sizes, made, t)) return false;
      at = t.data;
      return true;
    };
    if (!lies({p.T, p.B, p.R, p.cell->saved, p.H}, saved, saved_at)) return false;
    for (int i = 1; i < p.cell->states; ++i)
      if (!lies({p.T, p.B, p.R, p.H}, histories[i], histories_at[i])) return false;
    copies_y = last && sequence && !batch.copies();
    return copies_y || batch.copies() || !sequence ? lies({p.T, p.B, p.R * p.P}, hidden, hidden_at) : lies({0}, hidden, hidden_at);
  }
  void give(Forward& f) const {
    f.saved = saved_at;
    if (copies_y) f.hidden = hidden_at;
    for (int i = 1; i < kMostStates; ++i) f.histories[i] = histories_at[i];
  }
};

// fast_path(parameters, bias, x, hx, cell, axis, [lengths, reset, [layers, both directions, [frozen, [layer]]]]): as the op fused_rnn::step
// on a cell's x of two dimensions, and as fused_rnn::forward layer by layer on x of three, of two without a batch, or packed. parameters: a
// module's own, by name; bias: whether it has biases. hx: None, the state, or a tuple of states. axis: the one that is time in an x of
// three dimensions, -1 in a cell. reset is laid out as x; of packed sequences in the order before. frozen: a Frozen, or None. A tuple, or
// None: here null without an exception.
// With `layer` that one alone, where a gradient is asked for: with what is kept for backward behind its results, a copy of y of the last
// layer alone. Packed rows then come and go as they are, states in their order.
PyObject* fast_path_of(PyObject* const* args, Py_ssize_t count) {
  const bool keep = count == 12;
  if ((count != 6 && count != 8 && count != 10 && count != 11 && !keep) || !exchange || !PyDict_Check(args[0])) return nullptr;
  if (aoti_torch_grad_mode_is_enabled() != keep) return nullptr;
  PyObject* const hx = args[3];
  const char* const name = PyUnicode_AsUTF8(args[4]);
  const int axis = int(PyLong_AsLong(args[5])), most = count < 10 ? 1 : int(PyLong_AsLong(args[8]));
  const int R = count >= 10 && PyObject_IsTrue(args[9]) == 1 ? 2 : 1, layer = keep ? int(PyLong_AsLong(args[11])) : 0;
  if (PyErr_Occurred()) return nullptr;
  const CellDescriptor* cell = find_cell(name);
  if (std::string reason; !cell)
    if (const Program* const program = cpu::program_of(name, reason)) cell = &program->cell;
  if (!cell || axis > 1 || cell->masks || most < 1 || most > kMostLayers || layer < 0 || layer >= most) return nullptr;
  const int layers = keep ? 1 : most;
  const int ST = cell->states;
  const bool sequence = axis >= 0, zero = hx == Py_None, several = ST > 1 && !zero;
  if (several && (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != ST)) return nullptr;
  const bool has_lengths = count > 6 && args[6] != Py_None, has_reset = count > 6 && args[7] != Py_None;
  if ((has_lengths || has_reset) && !sequence) return nullptr;
  if (watched()) return nullptr;

  Memory memory;
  Batch batch;
  const uint8_t* reset = nullptr;
  Dtype dtype;
  if (!batch.read(args[2], axis, memory) || !dtype_of(batch.x, dtype) || (keep && (axis > 0 || batch.unbatched))) return nullptr;
  if (keep) batch.order = nullptr;
  if (has_lengths && !batch.read_lengths(args[6])) return nullptr;
  ModuleWeights weights(args[0], *cell, PyObject_IsTrue(args[1]) == 1, batch.x);
  Frozen* const frozen = count > 10 && !keep ? frozen_of(args[10], name, layers, R) : nullptr;
  const std::shared_ptr<const Packed> packed = frozen ? frozen->of(args[0]) : nullptr;
  if (packed ? !weights.are(*packed, dtype, batch.D) : !weights.read(sequence ? layers : 0, R, batch.D, layer)) return nullptr;
  const int64_t T = batch.T, B = batch.B, H = weights.H, P = weights.P, rows = layers * R;
  const size_t element = batch.x.bits / 8, y_row = size_t(R * P) * element;
  State states[kMostStates];
  for (int i = 0; i < ST; ++i) {
    State& s = states[i];
    s.width = i == 0 ? P : H;
    if (zero) continue;
    s.given = several ? PyTuple_GET_ITEM(hx, i) : hx;
    if (!(!sequence         ? read(s.given, s.in, 2, B, s.width)
          : batch.unbatched ? read(s.given, s.in, 2, rows, s.width)
                            : read(s.given, s.in, 3, rows, B, s.width)) ||
        s.in.bits != batch.x.bits || s.in.code != batch.x.code)
      return nullptr;
  }
  Problem p{cell, dtype, T, B, batch.D, H, P, R, 0, T, weights.of_layer(0), nullptr, nullptr, 1};
  p.threads = threads_for(p);
  double microseconds = microseconds_of(p);
  if (p.threads == 1 && !keep && !batch.sort(microseconds / double(T * B), size_t(batch.D) * element + y_row, memory)) return nullptr;
  p.lengths = batch.lengths;
  if (has_reset && !batch.read_reset(args[7], axis, memory, reset)) return nullptr;
  p.reset = reset;

  // Memory: the results, and what only the loops see.
  const bool wide = dtype == Dtype::f32 || dtype == Dtype::f64;  // states are of the accumulation dtype as they stand
  const size_t wide_element = wide ? element : sizeof(float);
  for (int i = 0; i < ST; ++i) {
    State& s = states[i];
    if (!(!zero             ? make_like(s.given, s.after, s.out)
          : !sequence       ? make_new(batch.data, {B, s.width}, s.after, s.out)
          : batch.unbatched ? make_new(batch.data, {rows, s.width}, s.after, s.out)
                            : make_new(batch.data, {rows, B, s.width}, s.after, s.out)))
      return nullptr;
    const int64_t numbers = rows * B * s.width;
    s.wide = wide && !batch.order ? static_cast<char*>(s.out.data) : memory.take<char>(numbers * int64_t(wide_element));
    if (!s.wide) return nullptr;
    if (zero) memset(s.wide, 0, size_t(numbers) * wide_element);
    else batch.states_to_loop(dtype, s.in.data, s.wide, rows, s.width);
  }
  Owned y;
  dlpack::Tensor y_out{};
  if (sequence && !(batch.packed || batch.unbatched                ? make_new(batch.data, {batch.x.shape[0], R * P}, y, y_out)
                    : rows == 1 && T == 1 && (axis == 0 || B == 1) ? make_like(states[0].after.object, y, y_out)
                    : batch.batch_first || axis == 0               ? make_new(batch.data, {T, B, R * P}, y, y_out)
                                                                   : make_new(batch.data, {B, T, R * P}, y, y_out)))
    return nullptr;
  Kept kept;
  if (keep && !kept.make(batch, p, sequence, layer + 1 == most)) return nullptr;
  char *x_copy = nullptr, *y_copy = static_cast<char*>(y_out.data), *between[2] = {};
  if (keep && !sequence) y_copy = static_cast<char*>(kept.hidden_at);
  if (batch.copies()) {
    x_copy = memory.take<char>(T * B * batch.D * int64_t(element));
    y_copy = keep ? static_cast<char*>(kept.hidden_at) : memory.take<char>(T * B * int64_t(y_row));
    if (!x_copy || !y_copy) return nullptr;
  }
  for (int i = 0; i < 2 && i < layers - 1; ++i)
    if (!(between[i] = memory.take<char>(T * B * int64_t(y_row)))) return nullptr;

  const auto run = [&] {
    Input in{batch.x.data, batch.batch_first ? batch.D : B * batch.D, batch.batch_first ? T * batch.D : batch.D, 0};
    if (x_copy) {
      batch.to_loop(x_copy, size_t(batch.D) * element);
      in = {x_copy, B * batch.D, batch.D, 0};
    }
    const int64_t turn = frozen ? frozen->turn(T) : 0;
    Weights own[2];
    for (int l = 0; l < layers; ++l) {
      Forward f{};
      f.turn = turn;
      f.p = p;
      f.p.D = l ? R * P : batch.D;
      f.p.weights = weights.of_layer(l);
      if (packed) packed->give(l, own, f);
      f.p.threads = threads_for(f.p);
      f.x = in;
      f.h_is_zero = zero;
      for (int i = 0; i < ST; ++i) f.states[i] = states[i].wide + size_t(l * R * B * states[i].width) * wide_element;
      f.y = l + 1 == layers ? y_copy : between[l & 1];
      if (keep) kept.give(f);
      cpu::kernels().forward(f);
      in = {f.y, B * R * P, R * P, 0};
    }
    if (x_copy) batch.from_loop(y_copy, y_row, static_cast<char*>(y_out.data));
  };
  std::exception_ptr failed;
  const auto caught = [&] {
    try {
      run();
    } catch (...) {  // raised when this thread has the interpreter again
      failed = std::current_exception();
    }
  };
  p.D = R * P;
  microseconds += (layers - 1) * microseconds_of(p);
  if (microseconds < kLongCall) {
    caught();
  } else {
    Py_BEGIN_ALLOW_THREADS;
    caught();
    Py_END_ALLOW_THREADS;
  }
  if (failed) std::rethrow_exception(failed);
  for (int i = 0; i < ST; ++i)
    if (states[i].wide != states[i].out.data) batch.states_from_loop(dtype, states[i].wide, states[i].out.data, rows, states[i].width);
  if (batch.batch_first) {
    PyObject* const turn[] = {y.object, zero_one[0], zero_one[1]};
    const Owned same{PyObject_VectorcallMethod(transpose, turn, 3, nullptr)};
    if (!same.object) return nullptr;
  }
  if (batch.packed && !keep) {
    PyObject* const flat = y.object;
    y.object = packed_as(batch.packed, flat);
    if (!y.object) return nullptr;
  }
  PyObject* const results = PyTuple_New(sequence + ST + (keep ? 1 + ST : 0));
  if (!results) return nullptr;
  Py_ssize_t place = 0;
  const auto put = [&](Owned& one) { PyTuple_SET_ITEM(results, place++, std::exchange(one.object, nullptr)); };
  if (sequence) put(y);
  for (int i = 0; i < ST; ++i) put(states[i].after);
  if (keep) {
    put(kept.saved);
    for (int i = 1; i < ST; ++i) put(kept.histories[i]);
    put(kept.hidden);
  }
  return results;
}

PyObject* fast_path(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    PyObject* const results = fast_path_of(args, count);
    if (results || PyErr_Occurred()) return results;
    Py_RETURN_NONE;
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
    {"fast_path", as_method(fast_path), METH_FASTCALL, "Layers, or a single step, past the dispatcher; or None."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_fast_path(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace fused_rnn::ops
