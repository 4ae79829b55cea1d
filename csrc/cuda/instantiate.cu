// Every kernel of one cell in one precision. The build compiles this file once for each pair of FUSED_RNN_FORMULA, a type of ../cells
// (Lstm, ..), and FUSED_RNN_PRECISION (bf16, f16, tf32, ieee, f64), so that they compile side by side. With FUSED_RNN_NARROW (bf16, int8)
// its kernels are those of such weights, forward alone, which the module leaves to NVRTC: for tests and scripts/cubin.py.
#include "../cells/all.h"
#include "by_stages.h"
#include "kernels.h"
#include "persistent_bwd.h"
#include "persistent_fwd.h"

namespace fused_rnn::cuda {
namespace {

template <Precision> struct PolicyOf;
template <> struct PolicyOf<Precision::bf16> {
  using Type = Bf16Product;
};
template <> struct PolicyOf<Precision::f16> {
  using Type = F16Product;
};
template <> struct PolicyOf<Precision::tf32> {
  using Type = Tf32Product;
};
template <> struct PolicyOf<Precision::ieee> {
  using Type = IeeeProduct;
};

#if defined(FUSED_RNN_NARROW)
constexpr bool kBackward = false;
template <class Whole> using Forward = NarrowProduct<Whole, Narrow::FUSED_RNN_NARROW>;
#else
constexpr bool kBackward = true;
template <class Whole> using Forward = Whole;
#endif

#if defined(FUSED_RNN_SMALLEST_TILE)  // for tests that want but one
constexpr int kMost = 1;
#else
constexpr int kMost = most_batch_tiles(Precision::FUSED_RNN_PRECISION);  // kernels that the planner does not ask for are not made
#endif

#if !defined(FUSED_RNN_KNOWN_SHAPES)
#define FUSED_RNN_KNOWN_SHAPES -1  // bits of their places: all, but for tests that want some
#endif

// Those of known teams, one for each shape that there is in the cell and precision.
template <class Formula, class Policy, int shape>
void add_known(Kernels& made) {
  using Known = KnownTeam<shape, Policy::kPrecision, Formula::gates, Forward<Policy>::kNarrow>;
  constexpr bool kWanted = uint64_t(FUSED_RNN_KNOWN_SHAPES) >> shape & 1;
  if constexpr (!kWanted || Known::team.members == 0 || (kKnownShapes[shape].backward && !kBackward)) return;
  else if constexpr (kKnownShapes[shape].backward)
    made.known_bwd[shape] = &persistent_bwd_kernel<Formula, Policy, Known::team.rows / 8, Known>;
  else made.known_fwd[shape] = &persistent_fwd_kernel<Formula, Forward<Policy>, Known::team.rows / 8, Known>;
}
template <class Formula, class Policy, int... shape>
void add_known(Kernels& made, std::integer_sequence<int, shape...>) {
  (add_known<Formula, Policy, shape>(made), ...);
}

// Without a team.
template <class Formula, class Storage, class Math>
constexpr ForwardKernel pointwise_fwd() {
  if constexpr (in_stages<Formula>) return &stages_fwd_kernel<Formula, Storage, Math>;
  else return &pointwise_fwd_kernel<Formula, Storage, Math>;
}
template <class Formula, class Storage, class Math>
constexpr BackwardKernel pointwise_bwd() {
  if constexpr (in_stages<Formula>) return &stages_bwd_kernel<Formula, Storage, Math>;
  else return &pointwise_bwd_kernel<Formula, Storage, Math>;
}

}  // namespace

template <class Formula, Precision kPrecision>
Kernels kernels_of() {
  if constexpr (kPrecision == Precision::f64) {
    return {{}, {}, pointwise_fwd<Formula, double, Libm<double>>(), pointwise_bwd<Formula, double, Libm<double>>()};
  } else if constexpr (!Formula::recurrent) {
    using Policy = typename PolicyOf<kPrecision>::Type;
    return {{},
            {},
            pointwise_fwd<Formula, typename Policy::Storage, typename Policy::Math>(),
            pointwise_bwd<Formula, typename Policy::Storage, typename Policy::Math>()};
  } else {
    using Policy = typename PolicyOf<kPrecision>::Type;
    Kernels made{{&persistent_fwd_kernel<Formula, Forward<Policy>, 1>},
                 {},
                 pointwise_fwd<Formula, typename Policy::Storage, typename Policy::Math>(),
                 pointwise_bwd<Formula, typename Policy::Storage, typename Policy::Math>()};
    if constexpr (kBackward) made.persistent_bwd[0] = &persistent_bwd_kernel<Formula, Policy, 1>;
    if constexpr (kMost >= 2) made.persistent_fwd[1] = &persistent_fwd_kernel<Formula, Forward<Policy>, 2>;
    if constexpr (kMost >= 2 && kBackward) made.persistent_bwd[1] = &persistent_bwd_kernel<Formula, Policy, 2>;
    if constexpr (kMost >= 4) made.persistent_fwd[2] = &persistent_fwd_kernel<Formula, Forward<Policy>, 4>;
    if constexpr (kMost >= 4 && kBackward) made.persistent_bwd[2] = &persistent_bwd_kernel<Formula, Policy, 4>;
    if constexpr (has_known_teams(kPrecision, Formula::gates))
      add_known<Formula, Policy>(made, std::make_integer_sequence<int, kKnownShapeCount>{});
    return made;
  }
}

template Kernels kernels_of<FUSED_RNN_FORMULA, Precision::FUSED_RNN_PRECISION>();

}  // namespace fused_rnn::cuda
