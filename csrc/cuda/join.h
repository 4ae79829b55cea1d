// Chunks of time that ran side by side, joined: what enters each of them.
#pragma once
#include "params.h"
#include "primitives/platform.h"

namespace fused_rnn::cuda {

constexpr int kJoinThreads = 128;
constexpr int kJoinedAtOnce = 8;  // chunks whose loads are on their way together

// A thread a state's element.
template <class Acc>
FUSED_RNN_KERNEL(kJoinThreads)
join_kernel(const FUSED_RNN_GRID_CONSTANT Join p) {
  const int64_t flat = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (flat >= p.size * p.states) return;
  const int state = int(flat / p.size);
  const int64_t i = flat - state * p.size;
  Acc* sums = static_cast<Acc*>(p.sums[state]) + i;
  const Acc *factors = static_cast<const Acc*>(p.factors[state]) + i, *uncuts = static_cast<const Acc*>(p.uncut) + i;
  const bool forgets = p.forgets >> state & 1;
  Acc now = static_cast<const Acc*>(p.initial[state])[i];
  for (int first = 0; first < p.chunks; first += kJoinedAtOnce) {
    Acc sum[kJoinedAtOnce] = {}, factor[kJoinedAtOnce] = {}, uncut[kJoinedAtOnce] = {};
    const auto at = [&](int k) { return (p.backward ? p.chunks - 1 - first - k : first + k) * p.size; };
    FUSED_RNN_UNROLL
    for (int k = 0; k < kJoinedAtOnce; ++k) {
      if (first + k + 1 >= p.chunks) break;  // the last one leads to no other
      sum[k] = sums[at(k)], factor[k] = factors[at(k)], uncut[k] = uncuts[at(k)];
    }
    FUSED_RNN_UNROLL
    for (int k = 0; k < kJoinedAtOnce; ++k) {
      if (first + k >= p.chunks) break;
      sums[at(k)] = now;
      // Nothing of a zero, whatever the factors have grown to; nothing past a reset; and of infinity nothing by what is known to be zero.
      const bool alone = uncut[k] == 0 || now == 0 || (forgets && factor[k] == 0);
      now = alone ? sum[k] : factor[k] * now + sum[k];
    }
  }
}

}  // namespace fused_rnn::cuda
