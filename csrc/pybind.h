// pybind11, by the headers that come with torch. Those of torch 2.11 end in an #error beside the stable ABI's target version, though they
// use nothing of torch: they do not get to see it.
#pragma once
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
