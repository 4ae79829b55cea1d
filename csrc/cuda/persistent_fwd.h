// The forward loop over all of time in one launch: one source for every cell, precision, team and exchange.
#pragma once
#include "ahead.h"
#include "cta_rank.h"
#include "known_teams.h"
#include "primitives/timeline.h"
#include "stages.h"
#include "unit_fwd.h"

namespace fused_rnn::cuda {

// NT: a team has 8 NT rows of the batch.  Known: what is known of the team when this is compiled.
template <class Cell, class Policy, int NT, class Known = AnyTeam>
FUSED_RNN_KERNEL(kThreads)
persistent_fwd_kernel(const FUSED_RNN_GRID_CONSTANT ForwardLoop told) {
  if (!Known::exists) return trap();  // nobody launches it; so its code is not made
  using Storage = typename Policy::Storage;
  using Operand = typename Policy::Operand;
  constexpr int G = Cell::gates, kStages = Cell::forward_stages;
  constexpr int kUnits = kStages == 1 ? Known::units_per_thread : units_per_thread(kStages);
  static_assert(kStages == 1 || !Known::width);
  // The next step's input is asked for before this one's results are stored: a step may be shorter than memory takes. The general kernels
  // would wait for it there, of two units or with registers short.
  constexpr bool kFetchesFirst = Known::width > 0;
  const auto& p = reinterpret_cast<const ForwardLoopOf<Known::width>&>(told);
  const Team& team = Known::of(p.team);
  const CtaRank me(p.steps, team);
  const TimeIndex walk(p.steps, me.r);
  const SharedLayout at = shared_layout(team, tile(Policy::kPrecision, false, NT, kFewerBlocks, Policy::kNarrow));
  Operand* operands = shared_array<Operand>(at.operands, at.operands_count);
  float* partial = shared_array<float>(at.partial, at.partial_count);

  clear(operands, at.operands_count);
  Exchange<Policy, false, (Known::width > 0)> exchange(team, p.workspace, operands, shared_array<uint64_t>(at.barriers, at.barriers_count),
                                                       me.team, me.teams, me.index);
  [[maybe_unused]] PublisherOf<Cell, Policy, false, NT> publisher(p, me, at.total);
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
    for (int u = lane(); u < width; u += 32) to[u] = Policy::operand(h0[u]);
  }

  using Weight = typename Policy::Weight;
  const Weight* w = static_cast<const Weight*>(p.w) + int64_t(me.r) * G * width * width;
  const bool given = kStages > 1 && p.given;  // the gates of a cell in stages are made again: then there are no weights
  const Product<Policy, false, NT, Known> product(team, shared_array<uint4>(at.weights, at.weights_count),
                                                  ForwardWeights<Policy>(w, G, given ? 0 : width, team.units, me.first_u));

  by_histories<(Known::width > 0), Storage>(p, [&](auto histories) __attribute__((always_inline)) {
    using Unit = ForwardUnit<Cell, Storage, typename Policy::Math, Known::width, histories.value>;
    const auto index = made_each<kUnits, ThreadUnit>([&](int j) { return ThreadUnit(team, j); });
    auto units = made_each<kUnits, Unit>(
        [&](int j) { return Unit(p, walk, me.r, me.first_b + index[j].b, index[j].inside ? me.first_u + index[j].u : width); });
    const auto scales =
        made_each<kUnits, RowScales<Policy, G>>([&](int j) { return RowScales<Policy, G>(p.scale, me.r, width, me.first_u + index[j].u); });
    FUSED_RNN_UNROLL
    for (int j = 0; given && j < kUnits; ++j) {
      units[j].take(p, walk, p.hidden);
      units[j].take_carried();
    }
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) units[j].enter();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) units[j].fetch(p, walk, p.steps.step0);
    const auto chunk = made_each<kUnits, int>([&](int j) { return exchange.chunk_of(index[j].i - lane()); });
    exchange.open();
    Ahead<Known::width> ahead(p.steps, walk, team, me.r, me.first_b, me.first_u, p.steps.step0, 1);
    if (Known::brings_ahead) ahead.template add<Storage>(p.gx, G, Span::window);

    for (int step = p.steps.step0; step < p.steps.step1; ++step) {
      mark(step, kBegins);
      exchange.wait();
      mark(step, kArrived);
      product.run(team, exchange.current(), partial);
      mark(step, kMultiplied);
      sync_threads();
      mark(step, kSummed);
      const auto sums = [&](int j, float (&recurrent)[G]) __attribute__((always_inline)) {
        product.sum(team, partial, index[j].u, team.units, index[j].b, recurrent);
        scales[j].apply(recurrent);
      };
      [[maybe_unused]] typename Unit::Now now[kUnits];
      if constexpr (kStages > 1) {
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) {
          if (!index[j].inside) break;
          float recurrent[G];
          sums(j, recurrent);
          if (given) units[j].given(p, walk, step, recurrent);
          units[j].begin(now[j], walk, step, recurrent);
        }
        publisher.run(index, units, now, p);
      }
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) {
        if (!index[j].inside) break;  // the whole warp: a member's units are a multiple of 32
        if constexpr (kStages > 1) {
          units[j].end(now[j], walk, step);
        } else {
          float recurrent[G];
          sums(j, recurrent);
          units[j].run(p, walk, step, recurrent);
        }
        const Operand entering[1] = {Policy::operand(units[j].entering())};
        exchange.put(index[j].b, me.first_u + index[j].u, 0, entering);
      }
      mark(step, kPut);
      if (step + 1 < p.steps.step1) {
        exchange.publish();
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) exchange.template send<1>(chunk[j], me.first_u, 0);
      }
      mark(step, kSent);
      const auto fetch = [&] {
        if (step + 1 == p.steps.step1) return;
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) units[j].enter();
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) units[j].fetch(p, walk, step + 1);
        if (Known::brings_ahead) ahead.fetch(step);
      };
      if (kFetchesFirst) fetch();
      exchange.arrive();
      mark(step, kEnded);
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) units[j].store(p, walk, step);
      mark(step, kStored);
      if (!kFetchesFirst) fetch();
      mark(step, kFetched);
    }
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) units[j].finish(p, walk);
  });
}

}  // namespace fused_rnn::cuda
