// Long short-term memory: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; gates as torch.nn.LSTM.
//
//   i, f, o = sigmoid(a_i, a_f, a_o)    g = tanh(a_g)    c' = f c + i g    h' = o tanh(c')
#pragma once
#include "cell.h"

namespace fused_rnn {

struct Lstm : CellDefaults {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4;   // i, f, g, o
  static constexpr int states = 2;
  static constexpr const char* state_names[] = {"h", "c"};
  static constexpr int saved = 4;   // i, f, g, o, activated
  static constexpr bool projects = true;
  static constexpr unsigned backward_after = 0b10, backward_before = 0b10;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[4], const N (&before)[2], const N (&)[1], N (&after)[2], N (&s)[4]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::sigmoid(a[1]);
    s[2] = M::tanh(a[2]);
    s[3] = M::sigmoid(a[3]);
    after[1] = s[1] * before[1] + rounded_product(N(s[0] * s[2]));
    after[0] = s[3] * M::tanh(after[1]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[4], const N (&before)[2], const N (&)[1], N (&after)[2], N (&dstate)[2], N (&d)[4],
                                    N (&)[1]) {
    const N tc = M::tanh(after[1]);
    after[0] = s[3] * tc;
    const N dc = dstate[1] + dstate[0] * s[3] * (M::one - tc * tc);
    d[0] = dc * s[2] * s[0] * (M::one - s[0]);
    d[1] = dc * before[1] * s[1] * (M::one - s[1]);
    d[2] = dc * s[0] * (M::one - s[2] * s[2]);
    d[3] = dstate[0] * tc * s[3] * (M::one - s[3]);
    dstate[1] = dc * s[1];
    dstate[0] = N{};
  }
};

FUSED_RNN_CELL(0, Lstm)

}  // namespace fused_rnn
