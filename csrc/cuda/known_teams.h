// Teams whose numbers kernels are compiled with. In the general kernels most of a step is looking numbers up, reckoning addresses, and
// fetching the instructions of ways that this team does not go: with all of that gone a step takes half the time or less
// (benchmarks/timeline.cu shows it). A kernel is made for each shape, cell of several gates and precision of tensor cores; the planner
// prefers them. Narrow weights have teams for which whole ones would not find the registers.
#pragma once
#include "layout.h"

namespace fused_rnn::cuda {

// What a general kernel is compiled for: its launch tells the team.
struct AnyTeam {
  static constexpr bool scatters = false, some_idle = true, exists = true;
  static constexpr int width = 0, units_per_thread = kUnitsPerThread, blocks = 0;
  FUSED_RNN_HD static constexpr const Team& of(const Team& told) { return told; }
};

struct KnownShape {
  bool backward;
  ExchangeKind exchange;
  int members, units;  // and all of H is theirs
  int nt;              // rows of the batch in eights
  int shares[3];       // of the depth, that warps have: of numbers of two bytes, of four, of four from narrow weights; 0 for no team
};
constexpr KnownShape kKnownShapes[] = {
    {false, ExchangeKind::cluster, 4, 16, 1, {2, 2, 2}},  {false, ExchangeKind::cluster, 8, 16, 1, {2, 2, 2}},
    {false, ExchangeKind::cluster, 16, 16, 1, {2, 4, 4}}, {false, ExchangeKind::cluster, 4, 32, 1, {2, 2, 2}},
    {false, ExchangeKind::cluster, 8, 32, 1, {2, 0, 2}},  {false, ExchangeKind::cluster, 16, 32, 1, {2, 0, 2}},
    {false, ExchangeKind::grid, 32, 16, 1, {0, 4, 4}},    {false, ExchangeKind::grid, 48, 16, 1, {3, 0, 3}},
    {false, ExchangeKind::grid, 64, 16, 1, {4, 0, 4}},    {true, ExchangeKind::scatter, 4, 16, 1, {1, 1, 0}},
    {true, ExchangeKind::scatter, 8, 16, 1, {1, 1, 0}},   {true, ExchangeKind::scatter, 16, 16, 1, {1, 1, 0}},
    {true, ExchangeKind::scatter, 4, 32, 1, {1, 1, 0}},   {true, ExchangeKind::scatter, 8, 32, 1, {1, 0, 0}},
    {true, ExchangeKind::scatter, 16, 32, 1, {1, 0, 0}},  {false, ExchangeKind::grid, 32, 32, 1, {2, 0, 2}},
};
constexpr int kKnownShapeCount = int(sizeof(kKnownShapes) / sizeof(kKnownShapes[0]));

// Whether there are kernels for known teams.
constexpr bool has_known_teams(Precision precision, int gates) {
  return gates > 1 && (precision == Precision::bf16 || precision == Precision::f16 || precision == Precision::tf32);
}

constexpr int kMostFragments = 16;  // of a warp's weights: half of its registers

// The team of a shape; of no members where there is none: its warps would not have all of their weights in registers, in equal shares.
constexpr Team known_team(const KnownShape& shape, Precision precision, int gates, Narrow narrow = Narrow::none) {
  const Tile t = tile(precision, shape.backward, shape.nt, 0, narrow);
  const int times = narrower(precision, narrow), shares = shape.shares[t.size == 2 ? 0 : times > 1 ? 2 : 1];
  Team team{};
  if (!shares || !lay_out(t, shape.backward, gates, shape.exchange, shape.members, shape.units, shape.nt, shares, team)) return {};
  const bool scatters = shape.exchange == ExchangeKind::scatter;
  const int tiles = scatters ? shape.members * shape.units / t.rows / team.warps_m : t.mt;  // of a warp
  if (threads_of(team, 1) > kThreads || team.blocks * tiles > kMostFragments * times) return {};
  if (!scatters && team.blocks * shares * t.depth != team.depth) return {};
  return team;
}

template <int kShape, Precision precision, int gates, Narrow narrow = Narrow::none>
struct KnownTeam {
  static constexpr Team team = known_team(kKnownShapes[kShape], precision, gates, narrow);
  static constexpr bool scatters = team.exchange == ExchangeKind::scatter;
  static constexpr bool exists = team.exchange == ExchangeKind::grid || team.members <= kLargestHere;  // on this architecture
  static constexpr int width = team.members * team.units, blocks = team.blocks;
  static constexpr int units_per_thread = 1;
  static constexpr bool some_idle = team.warps_m * team.warps_k * 32 < threads_of(team, 1);  // warps without a part in the product
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
