// A single step as plain functions of the Python module.
#pragma once
#include <Python.h>

namespace fused_rnn::ops {

// Adds use_exchange, watch_steps and quick_step to the module. 0, or -1 with a Python exception set.
int add_quick_step(PyObject* module);

}  // namespace fused_rnn::ops
