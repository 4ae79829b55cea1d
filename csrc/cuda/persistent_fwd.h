// The forward loop over all of time in one launch: one kernel for every cell, number, team and exchange.
#pragma once
#include "cell_fwd.h"
#include "cta_rank.h"

namespace fused_rnn::cuda {

// NT: a team has 8 NT rows of the batch.
template <class Cell, class Number, int NT>
FUSED_RNN_KERNEL(kThreads)
persistent_fwd_kernel(const FUSED_RNN_GRID_CONSTANT ForwardLoop p) {
  using Storage = typename Number::Storage;
  using Operand = typename Number::Operand;
  constexpr int G = Cell::gates;
  const Team& team = p.team;
  const CtaRank me(p.steps, team);
  const TimeIndex walk(p.steps, me.r);
  const SharedLayout at = shared_layout(team, tile(Number::kKind, false, NT));
  Operand* operands = shared_array<Operand>(at.operands, at.operands_count);
  float* partial = shared_array<float>(at.partial, at.partial_count);

  clear(operands, at.operands_count);
  Exchange<Number, false> exchange(team, p.workspace, operands, shared_array<uint64_t>(at.barriers, at.barriers_count), me.team, me.teams,
                                   me.index);
  sync_threads();
  exchange.invite();

  const int width = p.steps.H;

  // h0, where the state enters the first step: a warp a row.
  for (int b = int(threadIdx.x) / 32; b < team.rows; b += int(blockDim.x) / 32) {
    const UnitIndex place(p.steps, me.r, me.first_b + b, 0);
    if (!place.live(p.steps, walk.time(p.steps.step0))) continue;
    const Storage* h0 = static_cast<const Storage*>(p.h0) + place.in_state(p.steps);
    Operand* to = exchange.current() + b * exchange.stride();
    FUSED_RNN_UNROLL_BY(8)
    for (int u = lane(); u < width; u += 32) to[u] = Number::operand(h0[u]);
  }

  const Storage* w = static_cast<const Storage*>(p.w) + int64_t(me.r) * G * width * width;
  const Product<Number, false, NT> product(team, shared_array<uint4>(at.weights, at.weights_count),
                                           ForwardWeights<Number>(w, G, width, team.units, me.first_u));

  using Thread = ForwardCell<Cell, Storage, typename Number::Math>;
  const CellIndex index[kCellsPerThread] = {{team, 0}, {team, 1}};
  Thread cells[kCellsPerThread] = {{p, walk, me.r, me.first_b + index[0].b, index[0].inside ? me.first_u + index[0].u : width},
                                   {p, walk, me.r, me.first_b + index[1].b, index[1].inside ? me.first_u + index[1].u : width}};
  FUSED_RNN_UNROLL
  for (int j = 0; j < kCellsPerThread; ++j) cells[j].enter();
  FUSED_RNN_UNROLL
  for (int j = 0; j < kCellsPerThread; ++j) cells[j].fetch(p, walk, p.steps.step0);
  const int chunk[kCellsPerThread] = {exchange.chunk_of(index[0].cell - lane()), exchange.chunk_of(index[1].cell - lane())};
  exchange.open();

  for (int step = p.steps.step0; step < p.steps.step1; ++step) {
    exchange.wait();
    product.run(team, exchange.current(), partial);
    sync_threads();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kCellsPerThread; ++j) {
      if (!index[j].inside) break;  // the whole warp: a member's cells are a multiple of 32
      float recurrent[G];
      product.sum(team, partial, index[j].u, team.units, index[j].b, recurrent);
      cells[j].run(walk, step, recurrent);
      exchange.put(index[j].b, me.first_u + index[j].u, Number::operand(cells[j].entering()));
    }
    if (step + 1 < p.steps.step1) {
      exchange.publish();
      FUSED_RNN_UNROLL
      for (int j = 0; j < kCellsPerThread; ++j) exchange.template send<1>(chunk[j], me.first_u, 0);
    }
    exchange.arrive();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kCellsPerThread; ++j) cells[j].store(p, walk, step);
    if (step + 1 == p.steps.step1) break;
    FUSED_RNN_UNROLL
    for (int j = 0; j < kCellsPerThread; ++j) cells[j].enter();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kCellsPerThread; ++j) cells[j].fetch(p, walk, step + 1);
  }
  FUSED_RNN_UNROLL
  for (int j = 0; j < kCellsPerThread; ++j) cells[j].finish(p);
}

}  // namespace fused_rnn::cuda
