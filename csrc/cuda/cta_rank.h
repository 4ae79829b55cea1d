// A CTA's place in its team: its memory, its units.
#pragma once
#include "exchange.h"

namespace fused_rnn::cuda {

struct CtaRank {
  int index, team, teams;  // member of a team, team of the launch
  int r, first_b, first_u;

  template <int kWidth>
  FUSED_RNN_DEVICE CtaRank(const StepsOf<kWidth>& s, const Team& team, int block = int(blockIdx.x))
      : index(block % team.members), team(block / team.members), teams(s.R * s.tiles) {
    r = this->team / s.tiles;
    first_b = (s.tile0 + this->team % s.tiles) * team.rows;
    first_u = index * team.units;
  }
};

// What a thread runs: the CTA's elements tid, tid + threads, ..; element i is unit i % U of row i / U.
struct ThreadUnit {
  int i, b, u;
  bool inside;

  FUSED_RNN_DEVICE ThreadUnit(const Team& team, int j, int threads = int(blockDim.x)) {
    i = int(threadIdx.x) + j * threads;
    b = i / team.units;
    u = i % team.units;
    inside = b < team.rows;
  }
};

// What make(0), make(1), .. give.
template <int count, class T>
struct Each {
  T of[count];
  FUSED_RNN_DEVICE T& operator[](int j) { return of[j]; }
  FUSED_RNN_DEVICE const T& operator[](int j) const { return of[j]; }
};
template <class T>
struct Each<0, T> {};
template <class T, class Make, int... i>
FUSED_RNN_DEVICE Each<int(sizeof...(i)), T> made_each([[maybe_unused]] const Make& make, std::integer_sequence<int, i...>) {
  return {{make(i)...}};
}
template <int count, class T, class Make>
FUSED_RNN_DEVICE Each<count, T> made_each(const Make& make) {
  if constexpr (count == 0) return {};
  else return made_each<T>(make, std::make_integer_sequence<int, count>{});
}

// Both copies of the operand start as zeros: what no member writes (depth beyond C U) must not be NaN.
template <class Operand>
FUSED_RNN_DEVICE void clear(Operand* operands, int count) {
  uint4* to = reinterpret_cast<uint4*>(operands);
  for (int i = int(threadIdx.x); i < count / (16 / int(sizeof(Operand))); i += int(blockDim.x)) to[i] = {0, 0, 0, 0};
}

}  // namespace fused_rnn::cuda
