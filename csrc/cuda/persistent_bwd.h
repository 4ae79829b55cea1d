// The backward loop over all of time in one launch, from the last step to the first: the same team, product and exchange as
// forward. The operand is the recurrent side of the gates' gradients, [NB, G C U]; its product with W_hh, transposed, is what
// reaches the state of the step before.
#pragma once
#include "cta_rank.h"
#include "primitives/timeline.h"
#include "unit_bwd.h"

namespace fused_rnn::cuda {

template <class Cell, class Policy, int NT>
FUSED_RNN_KERNEL(kThreads)
persistent_bwd_kernel(const FUSED_RNN_GRID_CONSTANT BackwardLoop p) {
  using Storage = typename Policy::Storage;
  using Operand = typename Policy::Operand;
  constexpr int G = Cell::gates, kAll = kGradients<Cell>;
  const Team& team = p.team;
  const CtaRank me(p.steps, team);
  const TimeIndex walk(p.steps, me.r);
  const SharedLayout at = shared_layout(team, tile(Policy::kPrecision, true, NT));
  Operand* operands = shared_array<Operand>(at.operands, at.operands_count);
  float* partial = shared_array<float>(at.partial, at.partial_count);
  const int width = p.steps.H, padded = team.members * team.units;

  clear(operands, at.operands_count);
  Exchange<Policy, true> exchange(team, p.workspace, operands, shared_array<uint64_t>(at.barriers, at.barriers_count), me.team, me.teams,
                                  me.index);
  sync_threads();
  exchange.invite();

  // A loop that goes on where another one ended starts from the gradients that one left: a warp a row.
  const bool resumes = p.steps.step1 < p.steps.T;
  for (int b = int(threadIdx.x) / 32; resumes && b < team.rows; b += int(blockDim.x) / 32) {
    const UnitIndex place(p.steps, me.r, me.first_b + b, 0);
    const int t = walk.time(p.steps.step1);
    if (!place.valid(t)) continue;
    const Storage* left = static_cast<const Storage*>(p.dgates) + steps_size(p.steps, t, kAll) + place.in_step(p.steps, kAll);
    for (int g = 0; g < G; ++g) {
      Operand* to = exchange.current() + b * exchange.stride() + g * padded;
      const Storage* from = left + (Cell::apart + g) * width;
      FUSED_RNN_UNROLL_BY(8)
      for (int u = lane(); u < width; u += 32) to[u] = Policy::operand(from[u]);
    }
  }

  const Storage* w = static_cast<const Storage*>(p.w) + int64_t(me.r) * G * width * width;
  const Product<Policy, true, NT> product(team, shared_array<uint4>(at.weights, at.weights_count),
                                          BackwardWeights<Policy>(w, G, width, padded, team.units, me.first_u));

  using Unit = BackwardUnit<Cell, Storage, typename Policy::Math, Cell::sequences>;
  const ThreadUnit index[kUnitsPerThread] = {{team, 0}, {team, 1}};
  Unit units[kUnitsPerThread] = {{p, me.r, me.first_b + index[0].b, index[0].inside ? me.first_u + index[0].u : width},
                                 {p, me.r, me.first_b + index[1].b, index[1].inside ? me.first_u + index[1].u : width}};
  FUSED_RNN_UNROLL
  for (int j = 0; j < kUnitsPerThread; ++j) {
    units[j].resume(p, walk);
    units[j].fetch(p, walk, p.steps.step1 - 1);
  }
  const int chunk[kUnitsPerThread] = {exchange.chunk_of(index[0].i - lane()), exchange.chunk_of(index[1].i - lane())};
  exchange.open();

  const auto add = [&](int j) {
    float sum[1];
    product.sum(team, partial, index[j].u, 0, index[j].b, sum);
    units[j].add(sum[0]);
  };

  for (int step = p.steps.step1 - 1; step >= p.steps.step0; --step) {
    const bool has_future = step + 1 < p.steps.T;
    mark(step, kBegins);
    if (has_future) {
      exchange.wait();
      mark(step, kArrived);
      product.run(team, exchange.current(), partial);
      mark(step, kMultiplied);
      sync_threads();
      mark(step, kSummed);
    }
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnitsPerThread; ++j) {
      if (!index[j].inside) break;  // the whole warp: a member's units are a multiple of 32
      if (has_future) add(j);
      units[j].run(p);
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) exchange.put(index[j].b, g * padded + me.first_u + index[j].u, Policy::operand(units[j].recurrent(g)));
    }
    mark(step, kPut);
    if (step > p.steps.step0 || p.close) {  // else nobody would wait for it
      exchange.publish();
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnitsPerThread; ++j) exchange.template send<G>(chunk[j], me.first_u, padded);
    }
    mark(step, kSent);
    exchange.arrive();
    mark(step, kEnded);
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnitsPerThread; ++j) units[j].store(p, walk, step);
    mark(step, kStored);
    if (step == p.steps.step0) break;
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnitsPerThread; ++j) units[j].forget();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnitsPerThread; ++j) units[j].fetch(p, walk, step - 1);
    mark(step, kFetched);
  }
  if (p.close) {
    exchange.wait();
    product.run(team, exchange.current(), partial);
    sync_threads();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnitsPerThread; ++j)
      if (index[j].inside) add(j);
  }
  FUSED_RNN_UNROLL
  for (int j = 0; j < kUnitsPerThread; ++j) units[j].finish(p);
}

}  // namespace fused_rnn::cuda
