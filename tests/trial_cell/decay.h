// A cell without W_hh, of two states and two numbers per unit. A trial of a new cell.
//
//   m' = tanh(a) + p m    h' = q m'
#pragma once

namespace fused_rnn {

struct Decay : CellDefaults {
  static constexpr const char* name = "decay";
  static constexpr int gates = 1;
  static constexpr int states = 2;
  static constexpr const char* state_names[] = {"h", "m"};
  static constexpr int saved = 1;   // tanh(a)
  static constexpr int params = 2;  // p, q
  static constexpr bool recurrent = false;
  static constexpr unsigned backward_after = 0b10, backward_before = 0b10;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[1], const N (&before)[2], const N (&p)[2], N (&after)[2], N (&s)[1]) {
    s[0] = M::tanh(a[0]);
    after[1] = s[0] + p[0] * before[1];
    after[0] = p[1] * after[1];
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[1], const N (&before)[2], const N (&p)[2], N (&after)[2], N (&dstate)[2], N (&d)[1],
                                    N (&dp)[2]) {
    const N dm = dstate[1] + dstate[0] * p[1];
    dp[0] = dm * before[1];
    dp[1] = dstate[0] * after[1];
    d[0] = dm * (M::one - s[0] * s[0]);
    dstate[1] = dm * p[0];
    dstate[0] = N{};
  }
};

FUSED_RNN_CELL(13, Decay)

}  // namespace fused_rnn
