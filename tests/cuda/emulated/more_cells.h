// Two cells with all that a descriptor can ask for between them.
#pragma once
#include "cells/cell.h"

namespace fused_rnn {

// Three states of which it reads h, one gate apart, two params, backward with states after and before, gradients of states over time.
//
//   i = sigmoid(a_i + p c)    g = tanh(a_gx + i a_gh)    c' = i c + g    n' = i n + q c'    h' = n' + i (h - c')
struct ThreeStates : CellDefaults {
  static constexpr const char* name = "three_states";
  static constexpr int gates = 2;   // i, g
  static constexpr int states = 3;
  static constexpr const char* state_names[] = {"h", "c", "n"};
  static constexpr int saved = 3;   // i, g, a_gh
  static constexpr int params = 2;  // p, q
  static constexpr int apart = 1;   // a: i, gx, gh; d: dgx, di, dgh
  static constexpr bool reads_h = true;
  static constexpr bool sequences = true;
  static constexpr unsigned backward_after = 0b010, backward_before = 0b111;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[3], const N (&before)[3], const N (&p)[2], N (&after)[3], N (&s)[3]) {
    s[0] = M::sigmoid(a[0] + p[0] * before[1]);
    s[1] = M::tanh(a[1] + s[0] * a[2]);
    s[2] = a[2];
    after[1] = s[0] * before[1] + s[1];
    after[2] = s[0] * before[2] + p[1] * after[1];
    after[0] = after[2] + s[0] * (before[0] - after[1]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[3], const N (&before)[3], const N (&p)[2], N (&after)[3], N (&dstate)[3], N (&d)[3],
                                    N (&dp)[2]) {
    const N dn = dstate[2] + dstate[0];
    const N dc = dstate[1] - dstate[0] * s[0] + dn * p[1];
    d[0] = dc * (M::one - s[1] * s[1]);
    d[1] = (dstate[0] * (before[0] - after[1]) + dn * before[2] + dc * before[1] + d[0] * s[2]) * s[0] * (M::one - s[0]);
    d[2] = d[0] * s[0];
    dp[0] = d[1] * before[1];
    dp[1] = dn * after[1];
    dstate[0] = dstate[0] * s[0];
    dstate[1] = dc * s[0] + d[1] * p[0];
    dstate[2] = dn * s[0];
  }
};

FUSED_RNN_CELL(15, ThreeStates)

// Without W_hh: h reaches the next step by the formula alone.
//
//   f = sigmoid(a_f + p h)    c' = f c + (1 - f) a_x    h' = tanh(c')
struct Alone : CellDefaults {
  static constexpr const char* name = "alone";
  static constexpr int gates = 2;   // f, x
  static constexpr int states = 2;
  static constexpr const char* state_names[] = {"h", "c"};
  static constexpr int saved = 2;   // f, x
  static constexpr int params = 1;
  static constexpr bool recurrent = false;
  static constexpr bool reads_h = true;
  static constexpr unsigned backward_after = 0b01, backward_before = 0b11;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[2], const N (&before)[2], const N (&p)[1], N (&after)[2], N (&s)[2]) {
    s[0] = M::sigmoid(a[0] + p[0] * before[0]);
    s[1] = a[1];
    after[1] = s[1] + s[0] * (before[1] - s[1]);
    after[0] = M::tanh(after[1]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[2], const N (&before)[2], const N (&p)[1], N (&after)[2], N (&dstate)[2], N (&d)[2],
                                    N (&dp)[1]) {
    const N dc = dstate[1] + dstate[0] * (M::one - after[0] * after[0]);
    d[0] = dc * (before[1] - s[1]) * s[0] * (M::one - s[0]);
    d[1] = dc * (M::one - s[0]);
    dp[0] = d[0] * before[0];
    dstate[0] = d[0] * p[0];
    dstate[1] = dc * s[0];
  }
};

FUSED_RNN_CELL(14, Alone)

}  // namespace fused_rnn
