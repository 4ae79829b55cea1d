// A cell with all that a descriptor can ask for: three states of which it reads h, one gate apart, backward with states after and before.
//
//   i = sigmoid(a_i)    g = tanh(a_gx + i a_gh)    c' = i c + g    n' = i n + c'    h' = n' + i (h - c')
#pragma once
#include "cells/cell.h"

namespace fused_rnn {

struct ThreeStates : CellDefaults {
  static constexpr const char* name = "three_states";
  static constexpr int gates = 2;   // i, g
  static constexpr int states = 3;
  static constexpr const char* state_names[] = {"h", "c", "n"};
  static constexpr int saved = 3;   // i, g, a_gh
  static constexpr int apart = 1;   // a: i, gx, gh; d: dgx, di, dgh
  static constexpr bool reads_h = true;
  static constexpr unsigned backward_after = 0b010, backward_before = 0b111;

  template <class M, class N>
  static FUSED_RNN_HD void forward(const N (&a)[3], const N (&before)[3], const N (&)[1], N (&after)[3], N (&s)[3]) {
    s[0] = M::sigmoid(a[0]);
    s[1] = M::tanh(a[1] + s[0] * a[2]);
    s[2] = a[2];
    after[1] = s[0] * before[1] + s[1];
    after[2] = s[0] * before[2] + after[1];
    after[0] = after[2] + s[0] * (before[0] - after[1]);
  }

  template <class M, class N>
  static FUSED_RNN_HD void backward(const N (&s)[3], const N (&before)[3], const N (&)[1], N (&after)[3], N (&dstate)[3], N (&d)[3],
                                    N (&)[1]) {
    const N dn = dstate[2] + dstate[0];
    const N dc = dstate[1] - dstate[0] * s[0] + dn;
    d[0] = dc * (M::one - s[1] * s[1]);
    d[1] = (dstate[0] * (before[0] - after[1]) + dn * before[2] + dc * before[1] + d[0] * s[2]) * s[0] * (M::one - s[0]);
    d[2] = d[0] * s[0];
    dstate[0] = dstate[0] * s[0];
    dstate[1] = dc * s[0];
    dstate[2] = dn * s[0];
  }
};

FUSED_RNN_CELL(15, ThreeStates)

}  // namespace fused_rnn
