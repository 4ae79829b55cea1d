#include "stream.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <new>

#include "../cpu/isa.h"
#include "../pybind.h"
#include "dlpack_view.h"
#include "tensors.h"

namespace fused_rnn::ops {
namespace py = pybind11;
namespace {

constexpr int64_t kLongStep = 1 << 20;  // bytes of weights times rows, from where on other Python threads may run meanwhile
constexpr int64_t kRowsAtOnce = 64;     // that go through all layers together: what one input product of the loop takes

}  // namespace

Stream::Stream(const Problem& problem, int64_t layers, bool projects, Narrow narrow, std::vector<uintptr_t> states)
    : problem_(problem), packed_(problem, layers, 1, projects, narrow), states_(std::move(states)) {
  element_ = problem.dtype == Dtype::f64 ? 8 : problem.dtype == Dtype::f32 ? 4 : 2;
  wide_ = problem.dtype == Dtype::f64 ? 8 : 4;
  const int64_t rows = problem.B > kRowsAtOnce ? problem.B : kRowsAtOnce;
  for (auto& buffer : between_) buffer.resize(layers > 1 ? size_t(rows * problem.P) * element_ : 0);
}

void Stream::run(const void* x, int64_t T, void* y) {
  if (busy_.exchange(true)) throw std::runtime_error("stream: another thread is in it; one stream belongs to one thread at a time");
  struct Leaving {
    std::atomic<bool>& busy;
    ~Leaving() { busy = false; }
  } leaving{busy_};
  const int64_t B = problem_.B, D = problem_.D, H = problem_.H, P = problem_.P, layers = packed_.layers();
  const char* in = static_cast<const char*>(x);
  char* const out = static_cast<char*>(y);
  const size_t in_bytes = size_t(T * B * D) * element_, out_bytes = size_t(T * B * P) * element_;
  if (in < out + out_bytes && out < in + in_bytes) {
    copy_.assign(in, in + in_bytes);
    in = copy_.data();
  }
  const int64_t most = layers == 1 ? T : B < kRowsAtOnce ? kRowsAtOnce / B : 1;
  for (int64_t t = 0; t < T; t += most) {
    const int64_t steps = T - t < most ? T - t : most;
    const void* from = in + size_t(t * B * D) * element_;
    for (int64_t l = 0; l < layers; ++l) {
      Weights w;
      Forward f{};
      packed_.give(l, &w, f);
      f.p.B = B;
      f.p.T = f.p.stop = steps;
      f.p.threads = threads_for(f.p);
      f.x = {from, B * f.p.D, f.p.D, 0};
      for (size_t i = 0; i < states_.size(); ++i)
        f.states[i] = reinterpret_cast<char*>(states_[i]) + size_t(l * B * (i == 0 ? P : H)) * wide_;
      f.y = l + 1 == layers ? out + size_t(t * B * P) * element_ : between_[l & 1].data();
      f.turn = turn_;
      cpu::kernels().forward(f);
      from = f.y;
    }
    turn_ += steps;
  }
}

namespace {

// What a step function has beside its stream.
struct Step {
  std::shared_ptr<Stream> stream;
  py::object like;
  uint8_t code, bits;
};

// Whether a gradient is asked for through this tensor; -1 with an exception set.
int wants_gradient(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const Owned answer{PyObject_GetAttr(tensor, name)};
  return answer.object ? PyObject_IsTrue(answer.object) : -1;
}

PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* s = static_cast<const Step*>(PyCapsule_GetPointer(self, nullptr));
  if (!s) return nullptr;
  if (count != 2 || !exchange) Py_RETURN_NONE;
  const Problem& p = s->stream->problem();
  const auto ordinary = [&](PyObject* object, dlpack::Tensor& t, int64_t width) {
    return read(object, t, 2, p.B, width) && t.code == s->code && t.bits == s->bits;
  };
  dlpack::Tensor x, y;
  if (!ordinary(args[0], x, p.D) || has_tangents()) Py_RETURN_NONE;
  if (aoti_torch_grad_mode_is_enabled()) {
    const int wants = wants_gradient(args[0]);
    if (wants < 0) return nullptr;
    if (wants) Py_RETURN_NONE;
  }
  PyObject* like = s->like.ptr();
  Owned out;
  if (args[1] == Py_None) {
    out.object = PyObject_Vectorcall(empty_like, &like, 1, nullptr);
    if (!out.object) return nullptr;
  } else {
    Py_INCREF(args[1]);
    out.object = args[1];
  }
  if (!ordinary(out.object, y, p.P)) Py_RETURN_NONE;
  bool enough = true, alone = true;
  const auto run = [&] {
    try {
      s->stream->run(x.data, 1, y.data);
    } catch (const std::bad_alloc&) {
      enough = false;
    } catch (const std::exception&) {
      alone = false;
    }
  };
  if (s->stream->step_bytes() * p.B < kLongStep) {
    run();
  } else {
    Py_BEGIN_ALLOW_THREADS;
    run();
    Py_END_ALLOW_THREADS;
  }
  if (!enough) return PyErr_NoMemory();
  if (!alone) Py_RETURN_NONE;  // the other way raises
  PyObject* const result = out.object;
  out.object = nullptr;
  return result;
}
PyMethodDef step_method{"step", as_method(step), METH_FASTCALL, "step(x, out): y, or None for a call out of the ordinary."};

py::object fast_path(const std::shared_ptr<Stream>& stream, const py::object& like) {
  constexpr uint8_t bits[] = {32, 64, 16, 16};  // by Dtype
  const Dtype dtype = stream->problem().dtype;
  const uint8_t code = dtype == Dtype::bf16 ? dlpack::kBfloat : dlpack::kFloat;
  auto* made = new Step{stream, like, code, bits[int(dtype)]};
  const py::capsule capsule(made, [](void* owned) { delete static_cast<Step*>(owned); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&step_method, capsule.ptr()));
}

std::shared_ptr<Stream> make(const std::string& cell, int dtype, int narrow, int64_t B, int64_t D, int64_t H, int64_t P, int64_t layers,
                             bool projects, const std::vector<uintptr_t>& states) {
  const Problem p{cell_of(cell), Dtype(dtype), 1, B, D, H, P, 1, 0, 1, nullptr, nullptr, nullptr, 1};
  if (P % p.cell->diagonal) throw py::value_error("H: expected a multiple of the blocks of the cell's W_hh");
  if (p.cell->masks) throw py::value_error("cell: it has masks, which a stream has no numbers for");
  if (int(states.size()) != p.cell->states) throw py::value_error("states: expected as many addresses as the cell has states");
  return std::make_shared<Stream>(p, layers, projects, Narrow(narrow), states);
}

}  // namespace

void add_stream(PyObject* module) {
  py::class_<Stream, std::shared_ptr<Stream>>(py::reinterpret_borrow<py::module_>(module), "Stream")
      .def(py::init(&make), py::arg("cell"), py::arg("dtype"), py::arg("narrow"), py::arg("B"), py::arg("D"), py::arg("H"), py::arg("P"),
           py::arg("layers"), py::arg("projects"), py::arg("states"))
      .def("pack", &Stream::pack)
      .def(
          "run",
          [](Stream& stream, uintptr_t x, int64_t T, uintptr_t y) {
            stream.run(reinterpret_cast<const void*>(x), T, reinterpret_cast<void*>(y));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("fast_path", &fast_path)
      .def_property_readonly("step_bytes", &Stream::step_bytes);
}

}  // namespace fused_rnn::ops
