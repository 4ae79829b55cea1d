// The body of every ISA's translation unit: the loops instantiated over cells and dtypes, in a namespace of the ISA's own. An ISA that
// adds to another one for bfloat16 alone names it as FUSED_RNN_FOR_BF16, and runs the other dtypes by its table.
#pragma once
#include <type_traits>

#include "backward.h"
#include "forward.h"
#include "isa.h"
#include "prepack.h"
#include "products.h"

#if defined(FUSED_RNN_FOR_BF16)
namespace fused_rnn::cpu {
extern const Kernels FUSED_RNN_FOR_BF16;
}
#endif

namespace FUSED_RNN_ISA {

template <class Args>
constexpr bool kMayBeNarrow = std::is_same_v<Args, Forward> || std::is_same_v<Args, Packing>;

// Products and packing know of a cell how many gates and params it has: cells of one shape share them.
template <int kGates, int kApart, int kParams, bool kRecurrent>
struct Shape : fused_rnn::CellDefaults {
  static constexpr int gates = kGates, apart = kApart, params = kParams, states = 1, saved = 0;
  static constexpr bool recurrent = kRecurrent;
};
template <class Args, class Cell>
constexpr auto instance() {
  if constexpr (kInterpreted<Cell> || std::is_same_v<Args, Forward> || std::is_same_v<Args, Backward>) return (Cell*)nullptr;
  else return (Shape<Cell::gates, Cell::apart, Cell::params, Cell::recurrent>*)nullptr;
}
template <class Args, class Cell>
using Instance = std::remove_pointer_t<decltype(instance<Args, Cell>())>;

#if defined(FUSED_RNN_FOR_BF16)
template <template <class, class, class> class Loop, class Args, class Cell>
static void run_cell(const Args& args) {
  if constexpr (kMayBeNarrow<Args> && !kInterpreted<Cell>)
    if (args.narrow == fused_rnn::Narrow::bytes) return Loop<Bytes, float, Cell>::run(args);
  Loop<FUSED_RNN_BF16_KIND, bf16, Cell>::run(args);
}
// Whether bytes are multiplied here. A sum of four billion, a sixteenth of a million products, would be none of 32 bits.
template <class Args>
static bool by_bytes(const Args& args) {
  constexpr int64_t kMostTerms = 1 << 16;
  if constexpr (kMayBeNarrow<Args>)
    return args.narrow == fused_rnn::Narrow::bytes && !args.p.cell->program && !args.p.weights[0].w_hr && args.p.D < kMostTerms &&
           args.p.P < kMostTerms;
  else return false;
}
#else
template <template <class, class, class> class Loop, class Args, class Cell>
static void run_cell(const Args& args) {
  if constexpr (kMayBeNarrow<Args>) {
    if (args.narrow == fused_rnn::Narrow::bf16) return Loop<F32FromBf16, float, Cell>::run(args);
    if (args.narrow == fused_rnn::Narrow::int8 || args.narrow == fused_rnn::Narrow::bytes) return Loop<F32FromInt8, float, Cell>::run(args);
  }
  switch (args.p.dtype) {
    case fused_rnn::Dtype::f32: return Loop<F32, float, Cell>::run(args);
    case fused_rnn::Dtype::f64: return Loop<F64, double, Cell>::run(args);
    case fused_rnn::Dtype::bf16: return Loop<FUSED_RNN_BF16_KIND, bf16, Cell>::run(args);
    case fused_rnn::Dtype::f16: return Loop<F32, f16, Cell>::run(args);
  }
}
#endif

template <class Args>
using Entry = void (*)(const Args&);
template <template <class, class, class> class Loop, class Args, int number>
constexpr Entry<Args> entry() {
  using Cell = typename fused_rnn::NumberedCell<number>::Type;
  if constexpr (number == fused_rnn::kProgramNumber) return run_cell<Loop, Args, Interpreted>;
  else if constexpr (std::is_same_v<Cell, fused_rnn::NoCell>) return nullptr;
  else return run_cell<Loop, Args, Instance<Args, Cell>>;
}
template <template <class, class, class> class Loop, class Args, int... number>
static void run_numbered(const Args& args, std::integer_sequence<int, number...>) {
  static constexpr Entry<Args> entries[] = {entry<Loop, Args, number>()...};
  entries[args.p.cell->number](args);
}
template <template <class, class, class> class Loop, class Args>
static void run(const Args& args) {
  run_numbered<Loop>(args, std::make_integer_sequence<int, fused_rnn::kProgramNumber + 1>{});
}

#if defined(FUSED_RNN_FOR_BF16)  // another file's loops for all other dtypes: they are not compiled again
template <template <class, class, class> class Loop, class Args, void (*fused_rnn::cpu::Kernels::*entry)(const Args&)>
static void run_here_or_there(const Args& args) {
  if (args.p.dtype != fused_rnn::Dtype::bf16 && !by_bytes(args)) return (fused_rnn::cpu::FUSED_RNN_FOR_BF16.*entry)(args);
  run<Loop>(args);
}
#define FUSED_RNN_ENTRY(Loop, Args, entry) ::FUSED_RNN_ISA::run_here_or_there<::FUSED_RNN_ISA::Loop, Args, &Kernels::entry>
#else
#define FUSED_RNN_ENTRY(Loop, Args, entry) ::FUSED_RNN_ISA::run<::FUSED_RNN_ISA::Loop, Args>
#endif

constexpr int kProductsPad = kVectorBytes;

template <class To, class From>
static void convert_of(const void* x, void* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const int left = lanes_left(n, i, kLanes<float>);
    store((To*)out + i, load((const From*)x + i, left), left);
  }
}
static void convert(fused_rnn::Dtype from, fused_rnn::Dtype to, const void* x, void* out, int64_t n) {
  using fused_rnn::Dtype;
  if (from == Dtype::bf16) convert_of<float, bf16>(x, out, n);
  else if (from == Dtype::f16) convert_of<float, f16>(x, out, n);
  else if (to == Dtype::bf16) convert_of<bf16, float>(x, out, n);
  else convert_of<f16, float>(x, out, n);
}

template <class S>
static void activation_of(int which, const S* x, S* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<S>) {
    const int left = lanes_left(n, i, kLanes<S>);
    const Pack<S, 1> v{{load(x + i, left)}};
    store(out + i, (which ? Polynomial<S, 1>::tanh(v) : Polynomial<S, 1>::sigmoid(v)).v[0], left);
  }
}
static void activation(int which, fused_rnn::Dtype dtype, const void* x, void* out, int64_t n) {
  if (dtype == fused_rnn::Dtype::f32) activation_of(which, (const float*)x, (float*)out, n);
  else activation_of(which, (const double*)x, (double*)out, n);
}

}  // namespace FUSED_RNN_ISA

#define FUSED_RNN_TABLE(table) \
  namespace fused_rnn::cpu { \
  extern const Kernels table; \
  const Kernels table{#table, \
                      FUSED_RNN_ENTRY(ForwardLoop, Forward, forward), \
                      FUSED_RNN_ENTRY(BackwardLoop, Backward, backward), \
                      FUSED_RNN_ENTRY(ProductsLoop, Products, products), \
                      FUSED_RNN_ENTRY(PackLoop, Packing, pack), \
                      ::FUSED_RNN_ISA::kProductsPad, \
                      ::FUSED_RNN_ISA::convert, \
                      ::FUSED_RNN_ISA::activation}; \
  }
