// One ISA's share of the backend, as a table of functions. select.cpp asks the processor which table to use.
#pragma once
#include "../params.h"

namespace fused_rnn::cpu {

struct Kernels {
  const char* name;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*products)(const Products&);
  void (*pack)(const Packing&);  // the weights of a recurrence, for Forward::packed
  int products_pad;  // bytes that the rows of Products' weight gradients are rounded up to
  // n values of `from` as `to`: a 16-bit dtype and f32, either way.
  void (*convert)(Dtype from, Dtype to, const void* x, void* out, int64_t n);
  // Elementwise sigmoid (0) or tanh (1) of n values of dtype f32 or f64, for measuring their error.
  void (*activation)(int which, Dtype dtype, const void* x, void* out, int64_t n);
};

const Kernels& kernels();           // the best this processor runs, or the one FUSED_RNN_ISA names
const char* available_isas();       // comma-separated, best first: what was compiled in and this processor runs

}  // namespace fused_rnn::cpu
