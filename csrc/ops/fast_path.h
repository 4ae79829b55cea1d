// A step, or a layer, as a plain function of the Python module.
#pragma once
#include <Python.h>

namespace fused_rnn::ops {

// Adds use_exchange, watch_steps and fast_path to the module. 0, or -1 with a Python exception set.
int add_fast_path(PyObject* module);

}  // namespace fused_rnn::ops
