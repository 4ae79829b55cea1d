// Gated recurrent unit: Cho et al. 2014, with the reset gate after the matrix product, as in torch.nn.GRU and cuDNN.
//
//   r, z = sigmoid(a_r, a_z)    n = tanh(a_nx + r a_nh)    h' = (1 - z) n + z h
//   a_nx = W_in x + b_in and a_nh = W_hn h + b_hn stay apart because r multiplies only the second.
#pragma once
#include "cell.h"

namespace fused_rnn {

struct Gru : CellDefaults {
  static constexpr const char* name = "gru";
  static constexpr int gates = 3;   // r, z, n
  static constexpr int states = 1;
  static constexpr const char* state_names[] = {"h"};
  static constexpr int saved = 4;   // r, z, n, a_nh
  static constexpr int apart = 1;   // a: r, z, nx, nh; d: dnx, dr, dz, dnh
  static constexpr bool reads_h = true;
  static constexpr unsigned backward_before = 0b1;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[4], const N (&before)[1], const N (&)[1], N (&after)[1], N (&s)[4]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::sigmoid(a[1]);
    s[2] = M::tanh(a[2] + s[0] * a[3]);
    s[3] = a[3];
    after[0] = s[2] + s[1] * (before[0] - s[2]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[4], const N (&before)[1], const N (&)[1], N (&)[1], N (&dstate)[1], N (&d)[4], N (&)[1]) {
    d[0] = dstate[0] * (M::one - s[1]) * (M::one - s[2] * s[2]);
    d[1] = d[0] * s[3] * s[0] * (M::one - s[0]);
    d[2] = dstate[0] * (before[0] - s[2]) * s[1] * (M::one - s[1]);
    d[3] = d[0] * s[0];
    dstate[0] = dstate[0] * s[1];
  }
};

FUSED_RNN_CELL(1, Gru)

}  // namespace fused_rnn
