// Runs a program's instructions on a strip of vectors: one instruction on all of them, then the next.
#pragma once
#include "functions.h"
#include "pack.h"
#include "program.h"

namespace FUSED_RNN_ISA {

using fused_rnn::Bytecode;
using fused_rnn::Function;
using fused_rnn::Instruction;
using fused_rnn::Program;

constexpr int kStrip = 16;  // vectors of a strip at the most
constexpr int64_t kStripBytes = 24 * 1024;  // and of its registers: they stay in L1

// Where an operand of a strip lies: vector e is at + e stride.
template <class S>
struct Place {
  const S* at;
  int64_t stride;
  ALWAYS_INLINE Vec<S> operator[](int e) const { return load(at + e * stride); }
};

template <int arity, class S, class F>
static ALWAYS_INLINE void on_strip(const Instruction& i, const Place<S>* operands, int n, F function) {
  constexpr int L = kLanes<S>;
  const Place<S> a = operands[i.a], b = operands[arity > 1 ? i.b : i.a], c = operands[arity > 2 ? i.c : i.a];
  S* const out = const_cast<S*>(operands[i.out].at);
  const auto run = [&](auto size, int e) __attribute__((always_inline)) {
    constexpr int N = decltype(size)::value;
    using P = Pack<S, N>;
    using Of = Functions<S, N>;
    const auto read = [&](const Place<S>& from) __attribute__((always_inline)) { return each<S, N>([&](int k) { return from[e + k]; }); };
    P made;
    if constexpr (arity == 1) made = function(Of{}, read(a));
    else if constexpr (arity == 2) made = function(Of{}, read(a), read(b));
    else made = function(Of{}, read(a), read(b), read(c));
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) store(out + (e + k) * L, made.v[k]);
  };
  int e = 0;
  for (; e + kPack <= n; e += kPack) run(Count<kPack>{}, e);
  for (; e < n; ++e) run(Count<1>{}, e);
}

template <class S>
static __attribute__((noinline)) void interpret(const Bytecode& program, const Place<S>* operands, int n) {
  const Instruction* const end = program.code + program.length;
#define FUSED_RNN_UNARY(name, call) \
  case Function::name: \
    on_strip<1, S>(*i, operands, n, [](auto f, const auto& a) __attribute__((always_inline)) { return f.call(a); }); \
    break;
#define FUSED_RNN_BINARY(name, call) \
  case Function::name: \
    on_strip<2, S>(*i, operands, n, [](auto f, const auto& a, const auto& b) __attribute__((always_inline)) { return f.call(a, b); }); \
    break;
#define FUSED_RNN_TERNARY(name, call) \
  case Function::name: \
    on_strip<3, S>(*i, operands, n, \
                   [](auto f, const auto& a, const auto& b, const auto& c) __attribute__((always_inline)) { return f.call(a, b, c); }); \
    break;
  for (const Instruction* i = program.code; i != end; ++i) {
    switch (i->function) {
      FUSED_RNN_UNARY(neg_, neg)
      FUSED_RNN_UNARY(abs_, abs)
      FUSED_RNN_UNARY(sign_, sign)
      FUSED_RNN_UNARY(exp_, exp)
      FUSED_RNN_UNARY(expm1_, expm1)
      FUSED_RNN_UNARY(log_, log)
      FUSED_RNN_UNARY(log1p_, log1p)
      FUSED_RNN_UNARY(sqrt_, sqrt)
      FUSED_RNN_UNARY(rsqrt_, rsqrt)
      FUSED_RNN_UNARY(reciprocal_, reciprocal)
      FUSED_RNN_UNARY(sigmoid_, sigmoid)
      FUSED_RNN_UNARY(tanh_, tanh)
      FUSED_RNN_UNARY(relu_, relu)
      FUSED_RNN_UNARY(erf_, erf)
      FUSED_RNN_UNARY(sin_, sin)
      FUSED_RNN_UNARY(cos_, cos)
      FUSED_RNN_UNARY(softplus_, softplus)
      FUSED_RNN_UNARY(copy, copy)
      FUSED_RNN_BINARY(add_, add)
      FUSED_RNN_BINARY(sub_, sub)
      FUSED_RNN_BINARY(mul_, mul)
      FUSED_RNN_BINARY(div_, div)
      FUSED_RNN_BINARY(maximum_, maximum)
      FUSED_RNN_BINARY(minimum_, minimum)
      FUSED_RNN_BINARY(pow_, pow)
      FUSED_RNN_BINARY(lt_, lt)
      FUSED_RNN_BINARY(le_, le)
      FUSED_RNN_BINARY(gt_, gt)
      FUSED_RNN_BINARY(ge_, ge)
      FUSED_RNN_BINARY(eq_, eq)
      FUSED_RNN_BINARY(ne_, ne)
      FUSED_RNN_BINARY(and_, both)
      FUSED_RNN_BINARY(or_, either)
      FUSED_RNN_BINARY(sigmoid_backward_, sigmoid_backward)
      FUSED_RNN_BINARY(tanh_backward_, tanh_backward)
      FUSED_RNN_BINARY(relu_backward_, relu_backward)
      FUSED_RNN_TERNARY(where_, where)
      FUSED_RNN_TERNARY(fma_, fma)
      FUSED_RNN_TERNARY(mul_sub, mul_sub)
      FUSED_RNN_TERNARY(sub_mul, sub_mul)
      FUSED_RNN_TERNARY(mul_mul, mul_mul)
      FUSED_RNN_TERNARY(add_add, add_add)
      FUSED_RNN_TERNARY(add_mul, add_mul)
      FUSED_RNN_TERNARY(less_mul, less_mul)
    }
  }
#undef FUSED_RNN_UNARY
#undef FUSED_RNN_BINARY
#undef FUSED_RNN_TERNARY
}

// A strip: its vector e holds the units from (unit + e) lanes on of row `row`, or `unit` of row + e.
struct Strip {
  int64_t unit, row;
  int n;
  bool along_units;
  ALWAYS_INLINE int64_t unit_of(int e) const { return along_units ? unit + e : unit; }
  ALWAYS_INLINE int64_t row_of(int e) const { return along_units ? row : row + e; }
  // Of an array whose vector of units u and row b begins at u units + b rows, counted in elements.
  ALWAYS_INLINE int64_t first(int64_t units, int64_t rows) const { return unit * units + row * rows; }
  ALWAYS_INLINE int64_t step(int64_t units, int64_t rows) const { return along_units ? units : rows; }
};
// function(Strip) for all of [u0, u1) x [b0, b1), in strips of up to `most`: along whichever side is longer.
template <class F>
static ALWAYS_INLINE void for_strips(int64_t u0, int64_t u1, int64_t b0, int64_t b1, int most, F function) {
  const bool along_units = u1 - u0 > b1 - b0;
  const int64_t i0 = along_units ? b0 : u0, i1 = along_units ? b1 : u1, k0 = along_units ? u0 : b0, k1 = along_units ? u1 : b1;
  for (int64_t i = i0; i < i1; ++i)
    for (int64_t k = k0; k < k1; k += most) {
      const int n = int(k1 - k < most ? k1 - k : most);
      function(along_units ? Strip{k, i, n, true} : Strip{i, k, n, false});
    }
}

// One thread's operands and registers.
template <class S>
struct Workspace {
  static constexpr int L = kLanes<S>;
  const Bytecode* code;
  Place<S>* operands;
  S *constants, *copies;  // copies: of inputs that cannot be read where they lie, [inputs, most, lanes], if any; registers behind them
  int most;               // vectors of a strip
  int registers;          // the first one's place among the copies

  static int most_of(const Bytecode& code) {
    const int64_t fit = kStripBytes / (int64_t(code.registers + 1) * kVectorBytes);
    return int(fit >= kStrip ? kStrip : fit <= kPack ? kPack : fit / kPack * kPack);
  }
  template <class Arena>
  static Workspace take(Arena& arena, const Bytecode& code, bool copies = true) {
    Workspace w{&code, nullptr, nullptr, nullptr, most_of(code), 0};
    w.operands = arena.template take<Place<S>>(code.inputs + code.constants + code.registers);
    w.constants = arena.template take<S>(int64_t(code.constants) * L);
    w.registers = copies ? code.inputs : 0;
    w.copies = arena.template take<S>(int64_t(w.registers + code.registers) * w.most * L);
    return w;
  }
  void prepare() const {
    Place<S>* next = operands;
    for (int i = 0; i < code->inputs; ++i) *next++ = {copy(i), L};
    for (int i = 0; i < code->constants; ++i) {
      store(constants + i * L, splat(S(code->constant[i])));
      *next++ = {constants + i * L, 0};
    }
    for (int i = 0; i < code->registers; ++i) *next++ = {copy(registers + i), L};
  }
  ALWAYS_INLINE S* copy(int input) const { return copies + int64_t(input) * most * L; }
  ALWAYS_INLINE const Place<S>& output(int i) const { return operands[code->output[i]]; }
  // Input i of rows of H units, `stride` elements apart: where it lies, or, where it is of another type or ends within a vector, a copy.
  template <class T>
  ALWAYS_INLINE void lies(const Strip& strip, int i, const T* base, int64_t stride, int64_t H) const {
    if (!code->reads[i]) return;
    if constexpr (sizeof(T) == sizeof(S)) {
      if ((strip.unit_of(strip.n - 1) + 1) * L <= H) {
        operands[i] = {(const S*)base + strip.first(L, stride), strip.step(L, stride)};
        return;
      }
    }
    for (int e = 0; e < strip.n; ++e) {
      const int64_t first = strip.unit_of(e) * L, left = H - first;
      store(copy(i) + e * L, load(base + strip.row_of(e) * stride + first, int(left < L ? left : L)));
    }
    operands[i] = {copy(i), L};
  }
};

}  // namespace FUSED_RNN_ISA
