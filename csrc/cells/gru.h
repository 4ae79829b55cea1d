// Gated recurrent unit: Cho et al. 2014, with the reset gate after the matrix product, as in torch.nn.GRU and cuDNN.
//
//   r, z = sigmoid(a_r, a_z)    n = tanh(a_nx + r a_nh)    h' = (1 - z) n + z h
//   a_nx = W_in x + b_in and a_nh = W_hn h + b_hn stay apart because r multiplies only the second.
#pragma once
#include "math.h"

namespace fused_rnn {

struct Gru {
  static constexpr int gates = 3;
  static constexpr int preactivations = 4;  // r, z, nx, nh
  static constexpr int saved = 4;         // r, z, n, a_nh
  static constexpr int gradients = 4;     // dr, dz, dnh, dnx: the first three act on W_hh, (dr, dz, dnx) on W_ih
  static constexpr bool has_cell = false, needs_h = false, needs_h_prev = true;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[4], const N& h_prev, N& /*c*/, N& h, N (&s)[4]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::sigmoid(a[1]);
    s[2] = M::tanh(a[2] + s[0] * a[3]);
    s[3] = a[3];
    h = s[2] + s[1] * (h_prev - s[2]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[4], const N& /*c_prev*/, const N& /*c*/, const N& h_prev, N& /*h*/, const N& dh, N& /*dc*/,
                                    N& carry, N (&d)[4]) {
    d[3] = dh * (M::one - s[1]) * (M::one - s[2] * s[2]);
    d[2] = d[3] * s[0];
    d[1] = dh * (h_prev - s[2]) * s[1] * (M::one - s[1]);
    d[0] = d[3] * s[3] * s[0] * (M::one - s[0]);
    carry = dh * s[1];
  }
};

}  // namespace fused_rnn
