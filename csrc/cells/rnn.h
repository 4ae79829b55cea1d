// Elman network: Elman 1990, as torch.nn.RNN.   h' = tanh(a)   or   h' = max(a, 0)
#pragma once
#include "cell.h"

namespace fused_rnn {

template <bool kRelu>
struct Rnn : CellDefaults {
  static constexpr const char* name = kRelu ? "rnn_relu" : "rnn_tanh";
  static constexpr int gates = 1;
  static constexpr int states = 1;
  static constexpr const char* state_names[] = {"h"};
  static constexpr int saved = 0;  // h_t itself is enough
  static constexpr unsigned backward_after = 0b1;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[1], const N (&)[1], const N (&)[1], N (&after)[1], N (&)[1]) {
    after[0] = kRelu ? M::relu(a[0]) : M::tanh(a[0]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&)[1], const N (&)[1], const N (&)[1], N (&after)[1], N (&dstate)[1], N (&d)[1], N (&)[1]) {
    d[0] = kRelu ? M::relu_gradient(after[0], dstate[0]) : N(dstate[0] * (M::one - after[0] * after[0]));
    dstate[0] = N{};
  }
};

using RnnTanh = Rnn<false>;
using RnnRelu = Rnn<true>;
FUSED_RNN_CELL(2, RnnTanh)
FUSED_RNN_CELL(3, RnnRelu)

}  // namespace fused_rnn
