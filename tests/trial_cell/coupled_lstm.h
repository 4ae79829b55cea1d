// LSTM whose forget gate is 1 - i: Greff et al. 2017, "CIFG". A trial of a new cell.
//
//   i, o = sigmoid(a_i, a_o)    g = tanh(a_g)    c' = c + i (g - c)    h' = o tanh(c')
#pragma once

namespace fused_rnn {

struct CoupledLstm : CellDefaults {
  static constexpr const char* name = "coupled_lstm";
  static constexpr int gates = 3;   // i, g, o
  static constexpr int states = 2;
  static constexpr const char* state_names[] = {"h", "c"};
  static constexpr int saved = 3;   // i, g, o, activated
  static constexpr bool projects = true;
  static constexpr unsigned backward_after = 0b10, backward_before = 0b10;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[3], const N (&before)[2], const N (&)[1], N (&after)[2], N (&s)[3]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::tanh(a[1]);
    s[2] = M::sigmoid(a[2]);
    after[1] = before[1] + s[0] * (s[1] - before[1]);
    after[0] = s[2] * M::tanh(after[1]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[3], const N (&before)[2], const N (&)[1], N (&after)[2], N (&dstate)[2], N (&d)[3],
                                    N (&)[1]) {
    const N tc = M::tanh(after[1]);
    after[0] = s[2] * tc;
    const N dc = dstate[1] + dstate[0] * s[2] * (M::one - tc * tc);
    d[0] = dc * (s[1] - before[1]) * s[0] * (M::one - s[0]);
    d[1] = dc * s[0] * (M::one - s[1] * s[1]);
    d[2] = dstate[0] * tc * s[2] * (M::one - s[2]);
    dstate[1] = dc * (M::one - s[0]);
    dstate[0] = N{};
  }
};

FUSED_RNN_CELL(15, CoupledLstm)

}  // namespace fused_rnn
