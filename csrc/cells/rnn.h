// Elman network: Elman 1990, as torch.nn.RNN.   h' = tanh(a)   or   h' = max(a, 0)
#pragma once
#include "math.h"

namespace fused_rnn {

template <bool kRelu>
struct Rnn {
  static constexpr int gates = 1;
  static constexpr int preactivations = 1;
  static constexpr int saved = 0;  // h_t itself is enough
  static constexpr int gradients = 1;
  static constexpr bool has_cell = false, needs_h = true, needs_h_prev = false;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[1], const N& /*h_prev*/, N& /*c*/, N& h, N (&)[1]) {
    h = kRelu ? M::relu(a[0]) : M::tanh(a[0]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&)[1], const N& /*c_prev*/, const N& /*c*/, const N& /*h_prev*/, N& h, const N& dh, N& /*dc*/,
                                    N& carry, N (&d)[1]) {
    d[0] = kRelu ? M::relu_gradient(h, dh) : N(dh * (M::one - h * h));
    carry = N{};
  }
};

using RnnTanh = Rnn<false>;
using RnnRelu = Rnn<true>;

}  // namespace fused_rnn
