// What a file in instantiate/ makes: every kernel of one cell. The build compiles such a file once for each number, with
// FUSED_RNN_NUMBER naming it (bf16, f16, tf32, ieee or f64), so that they compile side by side.
#pragma once
#include "kernels.h"
#include "persistent_bwd.h"
#include "persistent_fwd.h"
#include "pointwise.h"

namespace fused_rnn::cuda {

template <NumberKind> struct ProductOf;
template <> struct ProductOf<NumberKind::bf16> {
  using Type = Bf16Product;
};
template <> struct ProductOf<NumberKind::f16> {
  using Type = F16Product;
};
template <> struct ProductOf<NumberKind::tf32> {
  using Type = Tf32Product;
};
template <> struct ProductOf<NumberKind::ieee> {
  using Type = IeeeProduct;
};

template <class Formula, NumberKind kKind>
Kernels kernels_of() {
  if constexpr (kKind == NumberKind::f64) {
    return {{}, {}, &pointwise_fwd_kernel<Formula, double, Libm<double>>, &pointwise_bwd_kernel<Formula, double, Libm<double>>};
  } else {
    using Number = typename ProductOf<kKind>::Type;
    constexpr int kMost = most_batch_tiles(kKind);  // kernels that the planner does not ask for are not made
    return {{&persistent_fwd_kernel<Formula, Number, 1>, &persistent_fwd_kernel<Formula, Number, 2>,
             kMost < 4 ? nullptr : &persistent_fwd_kernel<Formula, Number, kMost>},
            {&persistent_bwd_kernel<Formula, Number, 1>, &persistent_bwd_kernel<Formula, Number, 2>,
             kMost < 4 ? nullptr : &persistent_bwd_kernel<Formula, Number, kMost>},
            &pointwise_fwd_kernel<Formula, typename Number::Storage, typename Number::Math>,
            &pointwise_bwd_kernel<Formula, typename Number::Storage, typename Number::Math>};
  }
}

#define FUSED_RNN_INSTANTIATE(Formula) template Kernels kernels_of<Formula, NumberKind::FUSED_RNN_NUMBER>();

}  // namespace fused_rnn::cuda
