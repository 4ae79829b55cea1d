// The backward loop over all of time in one launch, from the last step to the first, by a plan of its own. What reaches the
// step before is the product of the gates' gradients with W_hh, transposed: by gather.h, or where the team is known by scatter.h or
// direct.h.
#pragma once
#include <type_traits>

#include "ahead.h"
#include "direct.h"
#include "gather.h"
#include "primitives/timeline.h"
#include "scatter.h"
#include "stages.h"
#include "unit_bwd.h"

namespace fused_rnn::cuda {

template <class Policy, int G, int NT, class Known, int kUnits>
struct CarrierOf {
  using OnGrid = std::conditional_t<Known::direct, Direct<Policy, G, NT, Known>, Gather<Policy, G, NT, kUnits>>;
  using Type = std::conditional_t<Known::scatters, Scatter<Policy, G, Known>, OnGrid>;
};

// Known: what is known of the team when this is compiled, and how it exchanges.
template <class Cell, class Policy, int NT, class Known = AnyTeam>
FUSED_RNN_KERNEL(kThreads)
persistent_bwd_kernel(const FUSED_RNN_GRID_CONSTANT BackwardLoop told) {
  if (!Known::exists) return trap();  // nobody launches it; so its code is not made
  using Storage = typename Policy::Storage;
  using Operand = typename Policy::Operand;
  constexpr int G = Cell::gates, kAll = kGradientsLeft<Cell>, kStages = Cell::backward_stages;
  static_assert(kStages == 1 || !Known::width);
  constexpr bool kFetchesFirst = Known::width > 0;  // as in forward
  using Carrier = typename CarrierOf<Policy, G, NT, Known, units_per_thread(kStages)>::Type;
  constexpr int kUnits = Carrier::kUnits;
  const auto& p = reinterpret_cast<const BackwardLoopOf<Known::width>&>(told);
  const Team& team = Known::of(p.team);
  const CtaRank first(p.steps, team);
  const int width = p.steps.H;

  const Storage* w = static_cast<const Storage*>(p.w) + int64_t(first.r) * G * width * width;
  const auto left = [&](int b) -> const Storage* {  // by a loop that ended here
    const TimeIndex walk(p.steps, first.r);
    const UnitIndex place(p.steps, first.r, first.first_b + b, 0);
    const int t = walk.time(p.steps.step1);
    if (!place.valid(t)) return nullptr;
    return static_cast<const Storage*>(p.dgates) + steps_size(p.steps, t, kAll) + place.in_step(p.steps, kAll) + Cell::apart * width;
  };
  const SharedLayout at = shared_layout(team, Carrier::kTile);
  [[maybe_unused]] PublisherOf<Cell, Policy, true, NT> publisher(p, first, at.total);
  Carrier carrier(team, first, at, p.workspace, w, width, p.steps.step1 < p.steps.T, left);
  const auto& index = carrier.index;
  const CtaRank me(p.steps, team,
                   Known::scatters ? kept(int(blockIdx.x)) : int(blockIdx.x));  // kept across the loads of the weights it would be spilled
  const TimeIndex walk(p.steps, me.r);

  by_histories<(Known::width > 0), Storage>(p, [&](auto histories) __attribute__((always_inline)) {
    using Unit = BackwardUnit<Cell, Storage, typename Policy::Math, Cell::sequences, Known::width, histories.value>;
    auto units = made_each<kUnits, Unit>(
        [&](int j) { return Unit(p, walk, me.r, me.first_b + index[j].b, index[j].inside ? me.first_u + index[j].u : width); });
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      units[j].resume(p, walk);
      units[j].fetch(p, walk, p.steps.step1 - 1);
    }
    carrier.open();
    Ahead<Known::width> ahead(p.steps, walk, team, me.r, me.first_b, me.first_u, p.steps.step1 - 1, -1);
    if (Known::brings_ahead) {
      ahead.template add<Storage>(p.saved, Cell::saved, Span::window);
      ahead.template add<Storage>(p.dy, 1, Span::all);
      if (Cell::backward_after & 1 || Cell::backward_before & 1) ahead.template add<Storage>(p.states[0], 1, Span::all);
      each<Cell::states - 1>([&](auto s) {
        if (histories.value == Histories::wide) ahead.template add<Accumulator<Storage>>(p.states[s + 1], 1, Span::window);
        else ahead.template add<Storage>(p.states[s + 1], 1, Span::window);
      });
    }

    for (int step = p.steps.step1 - 1; step >= p.steps.step0; --step) {
      const bool has_future = step + 1 < p.steps.T;
      mark(step, kBegins);
      mark(step, kArrived);
      if (has_future) carrier.receive();
      mark(step, kMultiplied);
      mark(step, kSummed);
      [[maybe_unused]] typename Unit::Now now[kUnits];
      if constexpr (kStages > 1) {
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) {
          if (!index[j].inside) break;
          if (has_future) units[j].add(carrier.sum(j));
          units[j].begin(now[j], p);
        }
        publisher.run(index, units, now, p);
      }
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) {
        if (!index[j].inside) break;  // the whole warp: a member's units are a multiple of 32
        if constexpr (kStages > 1) {
          units[j].end(now[j]);
        } else {
          if (has_future) units[j].add(carrier.sum(j));
          units[j].run(p);
        }
        Operand gates[G];
        FUSED_RNN_UNROLL
        for (int g = 0; g < G; ++g) gates[g] = Policy::operand(units[j].recurrent(g));
        carrier.put(j, gates);
      }
      mark(step, kPut);
      if (step > p.steps.step0 || p.close) carrier.send();  // else nobody would wait for it
      mark(step, kSent);
      const bool last = step == p.steps.step0;
      const auto fetch = [&] {
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) units[j].forget();
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; ++j) units[j].fetch(p, walk, step - 1);
        if (Known::brings_ahead) ahead.fetch(step);
      };
      if (kFetchesFirst && !last) fetch();
      carrier.arrive();
      mark(step, kEnded);
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) units[j].store(p, walk, step);
      mark(step, kStored);
      if (last) break;
      if (!kFetchesFirst) fetch();
      mark(step, kFetched);
    }
    if (p.close) {
      carrier.receive();
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j)
        if (index[j].inside) units[j].add(carrier.sum(j));
    }
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) units[j].finish(p);
  });
}

}  // namespace fused_rnn::cuda
