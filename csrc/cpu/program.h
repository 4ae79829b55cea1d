// A user's cell as the loops interpret it: checked, registers allocated. What its text means stands in fused_rnn/cells/program.py.
#pragma once
#include <cstdint>

#include "../cells/cell.h"

// (name, arguments): what a text may call; but for `const`, `units` and what publishes.
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
  add_add,   // a + b + c
  add_mul,   // (a + b) c
  less_mul,  // (a - b) c
};

// Operands by their numbers: first the inputs, then constants, then registers.
struct Instruction {
  Function function;
  uint16_t out, a, b, c;
};

// Of a cell without stages the inputs are the graph's. Those of a stage are arrays, the ones that it writes among them.
struct Bytecode {
  int inputs, constants, registers, length, outputs;
  const Instruction* code;  // [length]
  const double* constant;   // [constants]
  const uint16_t* output;   // [outputs], operands: of all groups one after the other. No state is an input that is one
  const bool* reads;        // [inputs]
  const uint16_t* array;    // [inputs]: which array each is; null without stages
  const uint16_t* number;   // [outputs]: which output of the graph, or behind those which operand of the products, each is; likewise
};

// What a sum is made of: an array; the product of two; or the square of the difference of two, `by` and `from` one.
struct Term {
  uint16_t from;
  int by, less;  // arrays, or -1
};
// What an operation makes of a value of all units: `to` is the array of it.
struct Publishing {
  enum class What : uint8_t { sum, variance, product } what;
  uint16_t from;  // of a product: the operand
  const Term* term;  // [terms]: of a sum or a variance the value, which is the sum of these
  int terms;
  uint16_t to;
  uint16_t block;  // of a product
  int sum;         // of a variance: the array of the same value's sum, made before; or -1
};

// What is made of one number a row, then of units, then what is published of them.
struct Stage {
  Bytecode rows, units;
  const Publishing* publishing;  // [published]; the last stage has none
  int published;
  const uint16_t* spread;  // [spreads]: arrays of one number a row that `units` is the first to read
  int spreads;
  bool multiplies;  // a product is among them
};

// A graph in stages. Its arrays: the inputs of the graph, the number of units, then values that cross from stage to stage, one number
// a row, and products.
struct Stages {
  int inputs, crossing, rows, products;
  int outputs, operands, stages, known;
  const Stage* stage;
  const uint16_t *known_input, *known_array;  // [known]: inputs that hold one number a row, as forward has kept it, and its array
  int arrays() const { return inputs + 1 + crossing + rows + products; }
  int first_crossing() const { return inputs + 1; }
  int first_row() const { return first_crossing() + crossing; }
  int first_product() const { return first_row() + rows; }
};

// Of a cell whose states after a step are what they were, each times a factor, and a rest; neither is made of states. Of gradients
// likewise. Its graph is cut in two: what is there before the states of all steps are, and what needs them.
constexpr int kNoField = -1;  // zero
struct Scan {
  Bytecode before, after;  // inputs of both: the graph's, then the fields, which `before` writes; of `after` then states after the step
  int fields;
  bool handed_on[kMostStates];
  int factor[kMostStates], rest[kMostStates];  // fields, or kNoField
  int after_input[kMostStates];                // of `after`; or kNoField: not read
};

// When the loops find the states of many steps at once: AMD EPYC with AVX-512, 2026-11-27. No result depends on `rows`.
struct ScanLimits {
  int64_t steps, vectors, rows;  // from so many steps on, up to so many vectors of a state a thread; rows of T x B that one takes at once
};
ScanLimits& scan_limits();

struct Program {
  CellDescriptor cell;
  Bytecode forward, infer, backward;  // infer: forward without what is saved. Of a cell without stages
  const Stages *staged_forward, *staged_infer, *staged_backward;  // of one that has some; else null
  const Scan *scan_forward, *scan_infer, *scan_backward;  // of one that is linear in its states; else null
  const char* const* param_names;  // [cell.params]
  const char* const* matrix_names;  // [cell.matrices]
  int length;  // instructions of forward
};

}  // namespace fused_rnn
