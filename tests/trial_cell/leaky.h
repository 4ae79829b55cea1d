// A cell of everything at once: two states, a gate that enters apart, and a formula that reads h. A trial of a new cell.
//
//   i = sigmoid(a_i)    g = tanh(a_gx + i a_gh)    m' = i m + h    h' = h + i (g - h + m')
#pragma once

namespace fused_rnn {

struct Leaky : CellDefaults {
  static constexpr const char* name = "leaky";
  static constexpr int gates = 2;   // i, g
  static constexpr int states = 2;
  static constexpr const char* state_names[] = {"h", "m"};
  static constexpr int saved = 4;   // i, g, g - h + m', a_gh
  static constexpr int apart = 1;   // a: i, gx, gh; d: dgx, di, dgh
  static constexpr bool reads_h = true;
  static constexpr unsigned backward_before = 0b10;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[3], const N (&before)[2], const N (&)[1], N (&after)[2], N (&s)[4]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::tanh(a[1] + s[0] * a[2]);
    after[1] = s[0] * before[1] + before[0];
    s[2] = s[1] - before[0] + after[1];
    s[3] = a[2];
    after[0] = before[0] + s[0] * s[2];
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[4], const N (&before)[2], const N (&)[1], N (&)[2], N (&dstate)[2], N (&d)[3], N (&)[1]) {
    const N dm = dstate[1] + dstate[0] * s[0];
    d[0] = dstate[0] * s[0] * (M::one - s[1] * s[1]);
    d[1] = (dstate[0] * s[2] + rounded_product(N(dm * before[1])) + rounded_product(N(d[0] * s[3]))) * s[0] * (M::one - s[0]);
    d[2] = d[0] * s[0];
    dstate[0] = dstate[0] * (M::one - s[0]) + dm;
    dstate[1] = dm * s[0];
  }
};

FUSED_RNN_CELL(14, Leaky)

}  // namespace fused_rnn
