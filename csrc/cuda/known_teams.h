// Teams whose numbers kernels are compiled with. In the general kernels most of a step is looking numbers up, reckoning addresses, and
// fetching the instructions of ways that this team does not go: with all of that gone a step takes half the time or less
// (benchmarks/timeline.cu shows it). A kernel is made for each shape, cell of several gates and precision of tensor cores; the planner
// prefers them. Narrow weights have teams for which whole ones would not find the registers.
#pragma once
#include "layout.h"

namespace fused_rnn::cuda {

// What a general kernel is compiled for: its launch tells the team.
struct AnyTeam {
  static constexpr bool scatters = false, direct = false, some_idle = true, exists = true, brings_ahead = false, own = false;
  static constexpr int width = 0, units = 0, units_per_thread = kUnitsPerThread, blocks = 0, held = 0;
  FUSED_RNN_HD static constexpr const Team& of(const Team& told) { return told; }
};

// For a product with a block of a cell's own matrices.
struct OwnTeam : AnyTeam {
  static constexpr bool own = true;
};

struct KnownShape {
  bool backward;
  ExchangeKind exchange;
  int members, units;  // and all of H is theirs
  int nt;              // rows of the batch in eights
  int shares[2];       // of the depth, that warps have: of numbers of two bytes, of four; 0 where there is no such team
  int narrow[2];       // likewise where the weights are kept in fewer bytes
};
constexpr KnownShape kKnownShapes[] = {
    {false, ExchangeKind::cluster, 4, 16, 1, {2, 2}, {2, 2}},  {false, ExchangeKind::cluster, 8, 16, 1, {2, 2}, {2, 2}},
    {false, ExchangeKind::cluster, 16, 16, 1, {2, 4}, {2, 4}}, {false, ExchangeKind::cluster, 4, 32, 1, {2, 2}, {2, 2}},
    {false, ExchangeKind::cluster, 8, 32, 1, {2, 0}, {2, 2}},  {false, ExchangeKind::cluster, 16, 32, 1, {2, 0}, {2, 2}},
    {false, ExchangeKind::grid, 32, 16, 1, {0, 4}, {0, 4}},    {false, ExchangeKind::grid, 48, 16, 1, {3, 0}, {3, 3}},
    {false, ExchangeKind::grid, 64, 16, 1, {4, 0}, {4, 4}},    {false, ExchangeKind::grid, 32, 32, 1, {0, 0}, {2, 2}},
    {false, ExchangeKind::grid, 128, 16, 1, {4, 0}, {}},       {false, ExchangeKind::grid, 24, 32, 2, {2, 0}, {}},
    {false, ExchangeKind::grid, 32, 32, 2, {2, 0}, {}},        {true, ExchangeKind::scatter, 4, 16, 1, {1, 1}, {}},
    {true, ExchangeKind::scatter, 8, 16, 1, {1, 1}, {}},       {true, ExchangeKind::scatter, 16, 16, 1, {1, 1}, {}},
    {true, ExchangeKind::scatter, 4, 32, 1, {1, 1}, {}},       {true, ExchangeKind::scatter, 8, 32, 1, {1, 0}, {}},
    {true, ExchangeKind::scatter, 16, 32, 1, {1, 0}, {}},      {true, ExchangeKind::direct, 48, 16, 1, {8, 8}, {}},
    {true, ExchangeKind::direct, 64, 16, 1, {8, 8}, {}},       {true, ExchangeKind::direct, 128, 16, 1, {8, 0}, {}},
    {true, ExchangeKind::direct, 24, 32, 2, {8, 0}, {}},       {true, ExchangeKind::direct, 32, 32, 2, {8, 0}, {}},
#if defined(FUSED_RNN_EMULATE)  // small enough for its tests
    {true, ExchangeKind::direct, 2, 32, 2, {1, 2}, {}},        {true, ExchangeKind::direct, 4, 32, 1, {2, 2}, {}},
    {true, ExchangeKind::direct, 8, 16, 1, {1, 2}, {}},        {false, ExchangeKind::grid, 10, 32, 2, {1, 2}, {}},
#endif
};
constexpr int kKnownShapeCount = int(sizeof(kKnownShapes) / sizeof(kKnownShapes[0]));

// Whether there are kernels for known teams.
constexpr bool has_known_teams(Precision precision, int gates) {
  return gates > 1 && (precision == Precision::bf16 || precision == Precision::f16 || precision == Precision::tf32);
}

constexpr int kMostFragments = 16;  // of a warp's weights: half of its registers

// As few as there can be.
constexpr int known_units_per_thread(const Team& team) { return ceil_div(team.units * team.rows, kThreads); }

constexpr Tile known_tile(const KnownShape& shape, Precision precision, Narrow narrow) {
  if (shape.exchange == ExchangeKind::direct) return direct_tile(precision, shape.units);
  return tile(precision, shape.backward, shape.nt, 0, narrow);
}

// Of a warp's blocks, those in registers: all, where there is room; else as many as a general kernel has.
constexpr int held_blocks(const KnownShape& shape, Precision precision, Narrow narrow, int blocks) {
  const Tile t = known_tile(shape, precision, narrow);
  const bool all = shape.exchange == ExchangeKind::direct ? blocks <= t.kr : blocks * t.mt <= kMostFragments * narrower(precision, narrow);
  return all || shape.exchange == ExchangeKind::scatter ? blocks : t.kr;
}

// The team of a shape; of no members where there is none: its warps would not have equal shares of the weights, or, where it scatters or
// keeps them in fewer bytes, not all in registers.
constexpr Team known_team(const KnownShape& shape, Precision precision, int gates, Narrow narrow = Narrow::none) {
  const Tile t = known_tile(shape, precision, narrow);
  const int times = narrower(precision, narrow), shares = (times > 1 ? shape.narrow : shape.shares)[t.size == 4];
  Team team{};
  if (!shares || !lay_out(t, shape.backward, gates, shape.exchange, shape.members, shape.units, shape.nt, shares, team)) return {};
  const bool scatters = shape.exchange == ExchangeKind::scatter;
  const int tiles = scatters ? shape.members * shape.units / t.rows / team.warps_m : t.mt;  // of a warp
  if (threads_of(team, known_units_per_thread(team)) > kThreads ||
      ((scatters || times > 1) && team.blocks * tiles > kMostFragments * times))
    return {};
  if (!scatters && team.blocks * shares * t.depth != team.depth) return {};
  return team;
}

template <int kShape, Precision precision, int gates, Narrow narrow = Narrow::none>
struct KnownTeam {
  static constexpr Team team = known_team(kKnownShapes[kShape], precision, gates, narrow);
  static constexpr bool own = false, scatters = team.exchange == ExchangeKind::scatter, direct = team.exchange == ExchangeKind::direct;
  static constexpr bool exists = direct || team.exchange == ExchangeKind::grid || team.members <= kLargestHere;  // on this architecture
  static constexpr int width = team.members * team.units, units = team.units, blocks = team.blocks;
  static constexpr int units_per_thread = known_units_per_thread(team), threads = threads_of(team, units_per_thread);
  static constexpr int held = held_blocks(kKnownShapes[kShape], precision, narrow, blocks);
  static constexpr bool some_idle = team.warps_m * team.warps_k * 32 < threads;  // warps without a part in the product
  static constexpr bool brings_ahead = !direct && units_per_thread == 1;  // others' steps are longer than a load from DRAM (ahead.h)
  FUSED_RNN_HD static constexpr Team of(const Team&) { return team; }
};

// The place of a team among the known ones, or -1.
constexpr int find_known(const Team& team, Precision precision, bool backward, int gates, int64_t width, Narrow narrow) {
  if (!has_known_teams(precision, gates)) return -1;
  for (int i = 0; i < kKnownShapeCount; ++i) {
    const Team k = known_team(kKnownShapes[i], precision, gates, narrow);
    if (kKnownShapes[i].backward == backward && k.members && k.exchange == team.exchange && k.members == team.members &&
        k.units == team.units && k.rows == team.rows && k.warps_m == team.warps_m && k.warps_k == team.warps_k && k.blocks == team.blocks &&
        width == k.members * k.units)
      return i;
  }
  return -1;
}

}  // namespace fused_rnn::cuda
