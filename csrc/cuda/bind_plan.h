// The planner in Python: in the CUDA module and, so that it can be asked on any machine, in the CPU one.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "../pybind.h"
#include "plan.h"

namespace fused_rnn::cuda {

inline void bind_plan(pybind11::module_& m) {
  namespace py = pybind11;
  // Local to the module: two modules that are loaded together may both have them.
  py::class_<Device>(m, "Device", py::module_local())
      .def(py::init([](int arch, int multiprocessors, int64_t shared, const std::vector<int>& clusters) {
             Device device{arch, multiprocessors, shared};
             if (clusters.size() > kLargestCluster)
               throw py::value_error("clusters: got " + std::to_string(clusters.size()) + " sizes, expected at most " +
                                     std::to_string(kLargestCluster));
             std::copy(clusters.begin(), clusters.end(), device.clusters);
             return device;
           }),
           py::arg("arch"), py::arg("multiprocessors"), py::arg("shared"), py::arg("clusters"))
      .def_readonly("arch", &Device::arch)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared", &Device::shared)
      .def_property_readonly(
          "clusters", [](const Device& d) { return py::tuple(py::cast(std::vector<int>(d.clusters, d.clusters + kLargestCluster))); });
  py::class_<Plan>(m, "Plan", py::module_local())
      .def_property_readonly("exchange", [](const Plan& p) { return int(p.team.exchange); })
      .def_property_readonly("members", [](const Plan& p) { return p.team.members; })
      .def_readonly("shape", &Plan::known)
      .def_property_readonly("units", [](const Plan& p) { return p.team.units; })
      .def_property_readonly("rows", [](const Plan& p) { return p.team.rows; })
      .def_property_readonly("warps", [](const Plan& p) { return py::make_tuple(p.team.warps_m, p.team.warps_k); })
      .def_property_readonly("blocks", [](const Plan& p) { return p.team.blocks; })
      .def_readonly("threads", &Plan::threads)
      .def_readonly("shared", &Plan::shared)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("tiles_at_once", &Plan::tiles_at_once)
      .def_readonly("waves", &Plan::waves)
      .def_property_readonly("cycles",
                             [](const Plan& p) {
                               py::dict parts;
                               parts["product"] = p.cycles.product;
                               parts["loads"] = p.cycles.loads;
                               parts["cell"] = p.cycles.cell;
                               parts["exchange"] = p.cycles.exchange;
                               return parts;
                             })
      .def_readonly("refusal", &Plan::refusal);
  m.def(
      "make_plan",
      [](int precision, bool backward, int gates, int64_t B, int64_t H, int64_t R, const Device& device, int exchange, int members,
         int rows, bool known, int fewer, int narrow, const std::array<int, 5>& stages) {
        const auto [count, pairs, operands, products, at_once] = stages;
        const Stages told{count, pairs, operands, products, at_once};
        return make_plan({Precision(precision), backward, gates, B, H, R, exchange, members, rows, known, fewer, Narrow(narrow), told},
                         device);
      },
      py::arg("precision"), py::arg("backward"), py::arg("gates"), py::arg("B"), py::arg("H"), py::arg("R"), py::arg("device"),
      py::arg("exchange") = -1, py::arg("members") = 0, py::arg("rows") = 0, py::arg("known") = false, py::arg("fewer") = 0,
      py::arg("narrow") = 0, py::arg("stages") = std::array<int, 5>{1, 0, 0, 0, 0});
}

}  // namespace fused_rnn::cuda
