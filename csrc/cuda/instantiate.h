// What a file in instantiate/ makes: every kernel of one cell. The build compiles such a file once for each number, with
// FUSED_RNN_PRECISION naming it (bf16, f16, tf32, ieee or f64), so that they compile side by side.
#pragma once
#include "kernels.h"
#include "persistent_bwd.h"
#include "persistent_fwd.h"
#include "pointwise.h"

namespace fused_rnn::cuda {

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

template <class Formula, Precision kPrecision>
Kernels kernels_of() {
  if constexpr (kPrecision == Precision::f64) {
    return {{}, {}, &pointwise_fwd_kernel<Formula, double, Libm<double>>, &pointwise_bwd_kernel<Formula, double, Libm<double>>};
  } else {
    using Policy = typename PolicyOf<kPrecision>::Type;
    constexpr int kMost = most_batch_tiles(kPrecision);  // kernels that the planner does not ask for are not made
    return {{&persistent_fwd_kernel<Formula, Policy, 1>, &persistent_fwd_kernel<Formula, Policy, 2>,
             kMost < 4 ? nullptr : &persistent_fwd_kernel<Formula, Policy, kMost>},
            {&persistent_bwd_kernel<Formula, Policy, 1>, &persistent_bwd_kernel<Formula, Policy, 2>,
             kMost < 4 ? nullptr : &persistent_bwd_kernel<Formula, Policy, kMost>},
            &pointwise_fwd_kernel<Formula, typename Policy::Storage, typename Policy::Math>,
            &pointwise_bwd_kernel<Formula, typename Policy::Storage, typename Policy::Math>};
  }
}

#define FUSED_RNN_INSTANTIATE(Formula) template Kernels kernels_of<Formula, Precision::FUSED_RNN_PRECISION>();

}  // namespace fused_rnn::cuda
