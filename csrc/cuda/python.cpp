// The Python module of the CUDA loops: plans, and loops that are bound to addresses and run. fused_rnn/gpu/op.py checks what it is passed;
// the same source, built over the emulator, is what the tests run on the CPU.
#include <optional>
#include <tuple>

#include "../cells/all.h"
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

using Address = uintptr_t;  // 0 for an array that is not there
using Addresses = std::vector<Address>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
template <class T>
void fill(T* (&to)[kMostStates], const Addresses& from) {
  if (from.size() > kMostStates)
    throw py::value_error("got the arrays of " + std::to_string(from.size()) + " states, expected at most " + std::to_string(kMostStates));
  for (size_t i = 0; i < from.size(); ++i) to[i] = at<T>(from[i]);
}

OwnOperands own_operands(const Addresses& masks, const std::vector<int>& times, Address matrices, Address crossing) {
  if (masks.size() > kMostMasks || masks.size() != times.size())
    throw py::value_error("got " + std::to_string(masks.size()) + " masks of " + std::to_string(times.size()) +
                          " numbers of times, expected as many of both, at most " + std::to_string(kMostMasks));
  OwnOperands own{};
  for (size_t i = 0; i < masks.size(); ++i) {
    own.masks[i] = at(masks[i]);
    own.times[i] = times[i];
  }
  own.matrices = at(matrices);
  own.crossing = at(crossing);
  return own;
}

using Window = std::optional<std::pair<int, int>>;
using Chunks = std::optional<std::tuple<int, int, int>>;  // of which steps, from the first to past the last, of how many each

// All of time, or the window of it that the arrays hold.
Steps within(Steps steps, const Window& window, const Chunks& chunks) {
  std::tie(steps.window0, steps.window1) = window.value_or(std::pair{0, steps.T});
  steps.step0 = steps.window0;
  steps.step1 = steps.window1;
  if (chunks) std::tie(steps.step0, steps.step1, steps.chunk) = *chunks;
  return steps;
}

void raise(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("fused_rnn: " + error);
}

// Without Python's lock: other threads go on while the driver makes room in its queue.
template <class Run>
void unlocked(const Run& run) {
  std::string error;
  {
    const py::gil_scoped_release release;
    error = run();
  }
  raise(error);
}

template <class Loop>
py::class_<Bound<Loop>> bind_loop(py::module_& m, const char* name) {
  return py::class_<Bound<Loop>>(m, name, py::module_local())
      .def_property_readonly("workspace_bytes", &Bound<Loop>::workspace_bytes)
      .def(
          "run",
          [](const Bound<Loop>& loop, Address workspace, Address stream) { unlocked([&] { return loop.run(at(workspace), at(stream)); }); },
          "All of its steps.")
      .def("run_step", [](const Bound<Loop>& loop, int step, Address stream) { unlocked([&] { return loop.run_step(step, at(stream)); }); })
      .def("run_stages", [](const Bound<Loop>& loop, int step, int first, int last,
                            Address stream) { unlocked([&] { return loop.run_stages(step, first, last, at(stream)); }); })
      .def_property_readonly(
          "stepper", [](const Bound<Loop>& loop) { return std::pair{Address(&run_step_of<Loop>), Address(&loop)}; },
          "run_step as a function of C, and its first argument, while the loop is there: for the op fused_rnn::run_steps.")
      .def_property_readonly(
          "runner", [](const Bound<Loop>& loop) { return std::pair{Address(&run_over<Loop>), Address(&loop)}; },
          "Likewise for ops that bring its arrays: csrc/ops/plain_layer.cpp.");
}

}  // namespace

PYBIND11_MODULE(FUSED_RNN_MODULE, m) {
  m.doc() = "The CUDA loops of fused_rnn: plans, and loops bound to addresses.";
  bind_plan(m);
  m.attr("COPY_ROWS") = Address(&copy_rows_of);  // for csrc/ops/plain_layer.cpp
  m.attr("ARCHITECTURES") = FUSED_RNN_ARCHITECTURES;
  py::list cells;
  for (const CellDescriptor& cell : kCells.of)
    if (cell.name) cells.append(cell.name);
  m.attr("CELLS") = py::tuple(cells);
  m.def(
      "device",
      [](int index) {
        std::string error;
        const Device device = device_at(index, error);
        raise(error);
        return device;
      },
      py::arg("index"), "What the device of this number offers.");
  m.def(
      "load",
      [](const py::bytes& image, const std::string& name) {
        std::string error;
        void* loaded = load(std::string(image).data(), name.c_str(), error);
        raise(error);
        return Address(loaded);
      },
      py::arg("image"), py::arg("name"), "A kernel in machine code, for `loaded` of a loop on the current device.");
#if defined(FUSED_RNN_EMULATE)
  m.def("seed", [](uint64_t seed) { emulated_seed = seed; }, "The order in which the emulator's threads run.");
#endif
  py::class_<Steps>(m, "Steps", py::module_local())
      .def(py::init([](int T, int B, int R, int H, uint64_t reversed, int period, Address lengths, Address reset) {
             return Steps{T, 0, T, 0, T, reversed, period, at<const int64_t>(lengths), at<const int32_t>(reset), B, R, H, 0, 0, 0};
           }),
           py::kw_only(), py::arg("T"), py::arg("B"), py::arg("R"), py::arg("H"), py::arg("reversed"), py::arg("period") = 1,
           py::arg("lengths") = 0, py::arg("reset") = 0)
      .def_readonly("T", &Steps::T);

  m.def(
      "join",
      [](const Addresses& sums, const Addresses& factors, const Addresses& initial, Address uncut, int64_t size, int chunks, bool backward,
         unsigned forgets, bool is_double, Address stream) {
        Join join{size, chunks, int(sums.size()), backward, forgets, {}, {}, {}, at(uncut)};
        fill(join.sums, sums);
        fill(join.factors, factors);
        fill(join.initial, initial);
        unlocked([&] { return fused_rnn::cuda::join(join, is_double, at(stream)); });
      },
      py::kw_only(), py::arg("sums"), py::arg("factors"), py::arg("initial"), py::arg("uncut"), py::arg("size"), py::arg("chunks"),
      py::arg("backward"), py::arg("forgets"), py::arg("is_double"), py::arg("stream"),
      "What enters each chunk of time, in the place of its sums.");

  const Addresses none;
  bind_loop<ForwardLoop>(m, "Forward")
      .def(py::init([](const std::string& cell, int precision, const Plan* plan, const Steps& steps, const Window& window,
                       const Chunks& chunks, Address gx, Address given, Address w, Address scale, Address bias, Address h0, Address hidden,
                       const Addresses& carried, Address y, Address h_n, Address saved, const Addresses& histories,
                       const Addresses& checkpoints, int every, Address entering, bool wide, Address params, const Addresses& masks,
                       const std::vector<int>& times, Address matrices, Address crossing, Address loaded) {
             ForwardLoop loop{};
             loop.steps = within(steps, window, chunks);
             loop.gx = at(gx);
             loop.given = at(given);
             loop.w = at(w);
             loop.scale = at<const float>(scale);
             loop.bias = at(bias);
             loop.h0 = at(h0);
             loop.hidden = at(hidden);
             fill(loop.carried, carried);
             loop.y = at(y);
             loop.h_n = at(h_n);
             loop.saved = at(saved);
             fill(loop.histories, histories);
             loop.keeps_histories = !histories.empty();
             fill(loop.checkpoints, checkpoints);
             loop.every = every;
             loop.workspace.operand = at(entering);
             loop.histories_are_wide = wide;
             loop.params = at(params);
             loop.own = own_operands(masks, times, matrices, crossing);
             return Bound<ForwardLoop>(cell, Precision(precision), plan, loop, at(loaded));
           }),
           py::arg("cell"), py::arg("precision"), py::arg("plan"), py::arg("steps"), py::kw_only(), py::arg("window") = py::none(),
           py::arg("chunks") = py::none(), py::arg("gx"), py::arg("given") = 0, py::arg("w") = 0, py::arg("scale") = 0, py::arg("bias") = 0,
           py::arg("h0"), py::arg("hidden") = 0, py::arg("carried") = none, py::arg("y") = 0, py::arg("h_n") = 0, py::arg("saved") = 0,
           py::arg("histories") = none, py::arg("checkpoints") = none, py::arg("every") = 1, py::arg("entering") = 0,
           py::arg("wide") = false, py::arg("params") = 0, py::arg("masks") = none, py::arg("times") = std::vector<int>{},
           py::arg("matrices") = 0, py::arg("crossing") = 0, py::arg("loaded") = 0);
  bind_loop<BackwardLoop>(m, "Backward")
      .def(py::init([](const std::string& cell, int precision, const Plan* plan, const Steps& steps, const Window& window,
                       const Chunks& chunks, Address dy, Address given, Address w, const Addresses& states, const Addresses& first,
                       Address saved, Address dgates, const Addresses& dstates, Address last, bool wide, Address params, Address dparams,
                       const Addresses& dsequences, const Addresses& masks, const std::vector<int>& times, Address matrices,
                       Address crossing, Address loaded) {
             BackwardLoop loop{};
             loop.steps = within(steps, window, chunks);
             loop.dy = at(dy);
             loop.given = at(given);
             loop.w = at(w);
             fill(loop.states, states);
             fill(loop.first, first);
             loop.saved = at(saved);
             loop.dgates = at(dgates);
             fill(loop.dstates, dstates);
             loop.last = at(last);
             loop.histories_are_wide = wide;
             loop.params = at(params);
             loop.own = own_operands(masks, times, matrices, crossing);
             loop.dparams = at(dparams);
             fill(loop.dsequences, dsequences);
             return Bound<BackwardLoop>(cell, Precision(precision), plan, loop, at(loaded));
           }),
           py::arg("cell"), py::arg("precision"), py::arg("plan"), py::arg("steps"), py::kw_only(), py::arg("window") = py::none(),
           py::arg("chunks") = py::none(), py::arg("dy") = 0, py::arg("given") = 0, py::arg("w") = 0, py::arg("states"), py::arg("first"),
           py::arg("saved") = 0, py::arg("dgates"), py::arg("dstates"), py::arg("last") = 0, py::arg("wide") = false, py::arg("params") = 0,
           py::arg("dparams") = 0, py::arg("dsequences") = none, py::arg("masks") = none, py::arg("times") = std::vector<int>{},
           py::arg("matrices") = 0, py::arg("crossing") = 0, py::arg("loaded") = 0);
}
