// A user's cell as the loops interpret it: checked, registers allocated. What its text means stands in fused_rnn/cells/program.py.
#pragma once
#include <cstdint>

#include "../cells/cell.h"

// (name, arguments): what a text may call; but for `const`.
// clang-format off
#define FUSED_RNN_FUNCTIONS(X) \
  X(neg, 1) X(abs, 1) X(sign, 1) X(exp, 1) X(expm1, 1) X(log, 1) X(log1p, 1) X(sqrt, 1) X(rsqrt, 1) X(reciprocal, 1) \
  X(sigmoid, 1) X(tanh, 1) X(relu, 1) X(erf, 1) X(sin, 1) X(cos, 1) X(softplus, 1) \
  X(add, 2) X(sub, 2) X(mul, 2) X(div, 2) X(maximum, 2) X(minimum, 2) X(pow, 2) \
  X(lt, 2) X(le, 2) X(gt, 2) X(ge, 2) X(eq, 2) X(ne, 2) X(and, 2) X(or, 2) \
  X(sigmoid_backward, 2) X(tanh_backward, 2) X(relu_backward, 2) X(where, 3) X(fma, 3)
// clang-format on

namespace fused_rnn {

enum class Function : uint8_t {
#define FUSED_RNN_FUNCTION(name, arity) name##_,
  FUSED_RNN_FUNCTIONS(FUSED_RNN_FUNCTION)
#undef FUSED_RNN_FUNCTION
  // What the parser makes itself.
  copy,      // a
  mul_sub,   // a b - c
  sub_mul,   // c - a b
  mul_mul,   // a b c
};

// Operands by their numbers: first the inputs of the graph, then its constants, then registers.
struct Instruction {
  Function function;
  uint16_t out, a, b, c;
};

struct Bytecode {
  int inputs, constants, registers, length, outputs;
  const Instruction* code;  // [length]
  const double* constant;   // [constants]
  const uint16_t* output;   // [outputs], operands: of all groups one after the other. No state is an input that is one
  const bool* reads;        // [inputs]
};

struct Program {
  CellDescriptor cell;
  Bytecode forward, infer, backward;  // infer: forward without what is saved
  const char* const* param_names;     // [cell.params]
};

}  // namespace fused_rnn
