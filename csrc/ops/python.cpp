// The Python module fused_rnn._C. Importing it registers the ops (cpu.cpp); it says itself what was built and what runs.
#include <tuple>
#include <utility>

#include "../cpu/isa.h"
#include "../cpu/program.h"
#include "../cuda/bind_plan.h"
#include "../pybind.h"
#include "fast_path.h"
#include "frozen.h"
#include "layer.h"
#include "stream.h"

namespace fused_rnn::ops {

static pybind11::list describe_cells() {
  using pybind11::arg;
  pybind11::list cells;
  for (const CellDescriptor& c : kCells.of) {
    if (!c.name) continue;
    const std::vector<std::string> states(c.state_names, c.state_names + c.states);
    cells.append(pybind11::dict(arg("name") = c.name, arg("number") = c.number, arg("gates") = c.gates, arg("states") = states,
                                arg("saved") = c.saved, arg("apart") = c.apart, arg("reads_h") = c.reads_h, arg("projects") = c.projects,
                                arg("params") = c.params, arg("recurrent") = c.recurrent));
  }
  return cells;
}

}  // namespace fused_rnn::ops

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of fused_rnn: registers torch.ops.fused_rnn.*";
  m.attr("CHECKPOINT_EVERY") = fused_rnn::ops::kCheckpointEvery;
  m.def("isa", [] { return fused_rnn::cpu::kernels().name; }, "The instruction set in use on CPU.");
  m.def("cells", &fused_rnn::ops::describe_cells, "What the compiled loops know of each cell, for comparison with Python's descriptors.");
  m.def(
      "refusal",
      [](const std::string& text) -> std::optional<std::string> {
        std::string reason;
        if (fused_rnn::cpu::program_of(text, reason)) return {};
        return reason;
      },
      "Why the loops cannot run a cell that is a program; None where they can.");
  m.def(
      "scans",
      [](const std::string& text) {
        std::string reason;
        const fused_rnn::Program* const program = fused_rnn::cpu::program_of(text, reason);
        return program && program->scan_forward;
      },
      "Whether a cell that is a program is linear in its states, so that the loops can run it by many steps at once.");
  m.def(
      "scan_limits",
      [](int64_t steps, int64_t vectors, int64_t rows) {
        using fused_rnn::ScanLimits;
        const ScanLimits before = std::exchange(fused_rnn::scan_limits(), ScanLimits{steps, vectors, rows});
        return std::make_tuple(before.steps, before.vectors, before.rows);
      },
      "Sets when cells that are linear in their states are run by many steps at once; what it was before. For tests.");
  m.def("available_isas", &fused_rnn::cpu::available_isas, "The instruction sets this processor can run, best first, comma-separated.");
  fused_rnn::cuda::bind_plan(m);  // plans can be asked for on any machine
  fused_rnn::ops::add_stream(m.ptr());
  fused_rnn::ops::add_frozen(m.ptr());
  if (fused_rnn::ops::add_fast_path(m.ptr()) != 0) throw pybind11::error_already_set();
}
