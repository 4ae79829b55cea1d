// Long short-term memory: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; gates as torch.nn.LSTM.
//
//   i, f, o = sigmoid(a_i, a_f, a_o)    g = tanh(a_g)    c' = f c + i g    h' = o tanh(c')
#pragma once
#include "math.h"

namespace fused_rnn {

struct Lstm {
  static constexpr int gates = 4;         // rows of W_ih, W_hh: gates * H
  static constexpr int preactivations = 4;  // what the loop hands to forward(): i, f, g, o
  static constexpr int saved = 4;         // what forward() keeps for backward: i, f, g, o, activated
  static constexpr int gradients = 4;     // what backward() returns: di, df, dg, do; the first `gates` act on W_hh
  static constexpr bool has_cell = true, needs_h = false, needs_h_prev = false;

  // c: c_{t-1} in, c_t out.
  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[4], const N& /*h_prev*/, N& c, N& h, N (&s)[4]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::sigmoid(a[1]);
    s[2] = M::tanh(a[2]);
    s[3] = M::sigmoid(a[3]);
    c = s[1] * c + s[0] * s[2];
    h = s[3] * M::tanh(c);
  }

  // dh: the whole gradient of h_t.  dc: that of c_t from the future in, that of c_{t-1} out.  carry: what of dh reaches
  // h_{t-1} past the matrix (nothing here).  h: in the needs_h cells h_t in; here h_t out, which a projection's gradient needs.
  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[4], const N& c_prev, const N& c, const N& /*h_prev*/, N& h, const N& dh, N& dc, N& carry,
                                    N (&d)[4]) {
    const N tc = M::tanh(c);
    h = s[3] * tc;
    const N dct = dc + dh * s[3] * (M::one - tc * tc);
    d[0] = dct * s[2] * s[0] * (M::one - s[0]);
    d[1] = dct * c_prev * s[1] * (M::one - s[1]);
    d[2] = dct * s[0] * (M::one - s[2] * s[2]);
    d[3] = dh * tc * s[3] * (M::one - s[3]);
    dc = dct * s[1];
    carry = N{};
  }
};

}  // namespace fused_rnn
