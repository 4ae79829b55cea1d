// The Python module of the CUDA loops: plans, and runs by address. fused_rnn/backends/cuda.py checks what it passes; the same source, built
// over the emulator, is what the tests run on the CPU.
#include "../pybind.h"
#include "bind_plan.h"
#include "run.h"

namespace py = pybind11;
using namespace fused_rnn;
using namespace fused_rnn::cuda;

#if defined(FUSED_RNN_EMULATE)
#define FUSED_RNN_ARCHITECTURES ""  // of a build for GPUs: those it has code for, as TORCH_CUDA_ARCH_LIST names them
namespace fused_rnn::cuda {
extern uint64_t emulated_seed;
}
#endif

namespace {

// Addresses arrive as integers, None as 0.
template <class T = void>
T* at(const py::dict& given, const char* name) {
  if (!given.contains(name) || given[name].is_none()) return nullptr;
  return reinterpret_cast<T*>(given[name].cast<uintptr_t>());
}
int64_t number(const py::dict& given, const char* name, int64_t otherwise = 0) {
  return given.contains(name) ? given[name].cast<int64_t>() : otherwise;
}

Steps steps_of(const py::dict& given) {
  Steps s{};
  s.T = int(number(given, "T"));
  s.step0 = int(number(given, "step0"));
  s.step1 = int(number(given, "step1", s.T));
  s.window0 = int(number(given, "window0"));
  s.window1 = int(number(given, "window1", s.T));
  s.reversed = given["reversed"].cast<uint64_t>();
  s.period = int(number(given, "period", 1));
  s.lengths = at<const int64_t>(given, "lengths");
  s.reset = at<const int32_t>(given, "reset");
  s.B = int(number(given, "B"));
  s.R = int(number(given, "R"));
  s.H = int(number(given, "H"));
  return s;
}

ForwardLoop forward_of(const py::dict& given) {
  ForwardLoop loop{};
  loop.steps = steps_of(given);
  loop.gx = at(given, "gx");
  loop.given = at(given, "given");
  loop.w = at(given, "w");
  loop.bias = at(given, "bias");
  loop.h0 = at(given, "h0");
  loop.state = at(given, "state");
  loop.y = at(given, "y");
  loop.h_n = at(given, "h_n");
  loop.saved = at(given, "saved");
  loop.cells = at(given, "cells");
  loop.checkpoints = at(given, "checkpoints");
  loop.workspace.operand = at(given, "entering");
  loop.every = int(number(given, "every", 1));
  loop.cells_are_wide = number(given, "cells_are_wide") != 0;
  return loop;
}

BackwardLoop backward_of(const py::dict& given) {
  BackwardLoop loop{};
  loop.steps = steps_of(given);
  loop.dy = at(given, "dy");
  loop.given = at(given, "given");
  loop.w = at(given, "w");
  loop.states = at(given, "states");
  loop.first_state = at(given, "first_state");
  loop.saved = at(given, "saved");
  loop.dgates = at(given, "dgates");
  loop.dh = at(given, "dh");
  loop.dc = at(given, "dc");
  loop.states_are_wide = number(given, "states_are_wide") != 0;
  loop.close = number(given, "close") != 0;
  return loop;
}

void raise(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("fused_rnn: " + error);
}

// Without Python's lock: other threads go on while the driver makes room in its queue.
template <class Run>
void run_unlocked(const Run& run) {
  std::string error;
  {
    const py::gil_scoped_release unlocked;
    error = run();
  }
  raise(error);
}

}  // namespace

PYBIND11_MODULE(FUSED_RNN_MODULE, m) {
  m.doc() = "The CUDA loops of fused_rnn: plans, and launches by address.";
  bind_plan(m);
  m.attr("ARCHITECTURES") = FUSED_RNN_ARCHITECTURES;
  m.def(
      "device",
      [](int index) {
        std::string error;
        const Device device = device_at(index, error);
        raise(error);
        return device;
      },
      py::arg("index"), "What the device of this number offers.");
#if defined(FUSED_RNN_EMULATE)
  m.def("seed", [](uint64_t seed) { emulated_seed = seed; }, "The order in which the emulator's threads run.");
#endif
  m.def("workspace_bytes", [](const Plan& plan, int kind, int64_t R) {
    const WorkspaceBytes bytes = workspace_bytes(plan, Precision(kind), R);
    return bytes.arrived + bytes.operand;
  });
  m.def("forward", [](int cell, int kind, const Plan& plan, uintptr_t workspace, uintptr_t stream, const py::dict& given) {
    const ForwardLoop loop = forward_of(given);
    run_unlocked([&] {
      return run_forward(Cell(cell), Precision(kind), loop, plan, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
    });
  });
  m.def("backward", [](int cell, int kind, const Plan& plan, uintptr_t workspace, uintptr_t stream, const py::dict& given) {
    const BackwardLoop loop = backward_of(given);
    run_unlocked([&] {
      return run_backward(Cell(cell), Precision(kind), loop, plan, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
    });
  });
  m.def("pointwise_forward", [](int cell, int kind, uintptr_t stream, const py::dict& given) {
    const ForwardLoop loop = forward_of(given);
    run_unlocked([&] { return run_pointwise(Cell(cell), Precision(kind), loop, reinterpret_cast<void*>(stream)); });
  });
  m.def("pointwise_backward", [](int cell, int kind, uintptr_t stream, const py::dict& given) {
    const BackwardLoop loop = backward_of(given);
    run_unlocked([&] { return run_pointwise(Cell(cell), Precision(kind), loop, reinterpret_cast<void*>(stream)); });
  });
}
