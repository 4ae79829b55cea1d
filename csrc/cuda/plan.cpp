#include "plan.h"

#include <algorithm>

#include "known_teams.h"

namespace fused_rnn::cuda {
namespace {

// Cycles of each part, fitted to what teams took on an H200 at 1.98 GHz (LSTM and GRU, bf16 and TF32, H = 128 to 2048): of the general
// kernels 60 plans come within 15 %, with a standard deviation of 6 % (2026-11-26), of known teams 48 of 50 (2026-11-27).
// benchmarks/results/h200/NOTES.md has the numbers.
constexpr double kMma = 8;            // an mma.m16n8k16 (tf32: k8) in one of the four parts of a multiprocessor
constexpr double kMmaLatency = 33;    // before the next one may add to its sums
constexpr double kBlock = 12;         // of a warp, a block's loads and its branch beside the mma
constexpr double kSharedBytes = 128;  // of shared memory a cycle
constexpr double kWork = 0.8;         // of product and loads, which overlap, is seen
// What a step takes beside, from the sums to the stores and the next input, the latency of an exchange between neighbours included; more in
// backward, and where a thread has two units.
constexpr double kCell = 2225, kCellBackward = 170, kSecondUnit = 630, kSecondUnitBackward = 850;
constexpr double kKnownCell = 760, kKnownScatter = 630, kKnownUnit = 4.4;  // of known teams; of one that scatters for each unit more
constexpr double kKnownSecondUnit = 500;  // from the replay: no GPU has run such a team, nor one that reads its operand directly
constexpr double kScatteredBytes = 10;  // that arrive a cycle of what is scattered, beside the product
constexpr double kTwoOnOne = 1.15, kTwoKnownOnOne = 1.3;  // where a multiprocessor has two members
constexpr double kClusterBytes = 17.5;  // that arrive a cycle, as fitted; by themselves 14 at 16 members, 20 at 8
constexpr double kDirectBytes = 4500;  // of L2, where many members read directly: what 128 of general teams took beyond 64
constexpr double kGridLatency = 1800, kGridBytes = 53;  // beyond a cluster's, through L2; bytes from L2 a cycle
// A stage that publishes, by the exchange: guesses, for no GPU has run one.
constexpr double kStage = 300, kClusterStage = 900;
constexpr double kFma = 128;  // a cycle
constexpr double kLanes = 128;  // likewise, of any instruction: of what widens narrow weights, which has not been measured
// A step without a team: what the host takes to issue its product and its launch (45 µs where a launch takes 7), and of the product
// operations a cycle and multiprocessor, and bytes of W_hh a cycle from L2.
constexpr double kIssue = 90000, kProductFlops = 2048, kL2Bytes = 2500;

Tile tile_of(const Request& q, ExchangeKind exchange, int units, int nt) {
  return exchange == ExchangeKind::direct ? direct_tile(q.precision, units) : tile(q.precision, q.backward, nt, q.fewer, q.narrow);
}

// Instructions for each weight that is widened (primitives/widen.h).
double widening(const Request& q) {
  if (narrower(q.precision, q.narrow) == 1) return 0;
  return q.narrow == Narrow::bf16 || q.precision == Precision::f16 ? 1 : 2;
}

Cycles estimate(const Request& q, const Plan& plan) {
  const Team& team = plan.team;
  const Tile t = tile_of(q, team.exchange, team.units, plan.nt);
  const bool scatters = team.exchange == ExchangeKind::scatter, direct = team.exchange == ExchangeKind::direct;
  const double warps = team.warps_m * team.warps_k, fragments = warps * t.mt * team.blocks;
  const double rest = std::max(team.blocks - t.kr, 0) * warps * t.mt * t.kept * 128;
  // Without tensor cores a lane reads the whole of a block, 16 bytes at a time that all lanes share.
  const double wavefronts = q.precision == Precision::ieee ? 4.0 * team.rows : team.rows / 2.0;
  const double operand = direct ? 0 : warps * team.blocks * wavefronts * kSharedBytes, elements = double(team.units) * team.rows;
  const double partial = 2.0 * team.warps_k * team.rows * team.warps_m * t.mt * t.rows * 4;
  Cycles c;
  if (q.precision == Precision::ieee) c.product = fragments * t.rows * t.depth * team.rows / kFma;
  else c.product = std::max(2 * fragments * plan.nt / 4 * kMma, team.blocks * (kBlock + 2 * kMmaLatency / chains(t, plan.nt)));
  if (plan.known < 0 || team.blocks * t.mt > kMostFragments)  // others widen once
    c.product += fragments * t.rows * t.depth * widening(q) / kLanes;
  c.product *= kWork;
  c.loads = kWork * (rest + operand + partial) / kSharedBytes;
  c.cell = kCell + kCellBackward * q.backward;
  if (elements > plan.threads) c.cell += kSecondUnit + kSecondUnitBackward * q.backward;
  if (plan.known >= 0) {
    c.cell = scatters ? kKnownScatter + kKnownUnit * team.units : kKnownCell + kCellBackward * q.backward;
    if (elements > plan.threads) c.cell += kKnownSecondUnit;
  }
  const double bytes = double(team.rows) * team.depth * t.size * (team.members - 1) / team.members;
  if (team.exchange == ExchangeKind::cluster) c.exchange = bytes / kClusterBytes;
  if (scatters) {
    const int sum = q.precision == Precision::bf16 ? 2 : 4;  // bytes, as scatter.h sends it
    c.exchange = std::max(double(team.rows) * q.H * sum / kScatteredBytes - c.product, 0.0);
    c.loads = 0;
  }
  if (team.exchange == ExchangeKind::grid) c.exchange = kGridLatency + bytes / kGridBytes;
  if (direct) {  // they come beside the product
    const double readers = double(team.members) * q.R * std::min(plan.tiles, plan.tiles_at_once);
    c.exchange = kGridLatency + std::max(bytes / std::min(kGridBytes, kDirectBytes / readers) - c.product, 0.0);
  }
  return c;
}

// What the stages of a step take beside.
Cycles estimate_stages(const Request& q, const Plan& plan) {
  const Team& own = plan.own;
  const Tile t = own_tile(q.precision);
  const double bytes = double(q.stages.operands) * own.rows * own.depth * t.size + 8.0 * q.stages.pairs * own.rows * reduced(own);
  const double fragments = double(q.stages.products) * own.warps_m * own.warps_k * own.blocks;
  Cycles c;
  if (q.precision == Precision::ieee) c.product = kWork * fragments * t.rows * t.depth * own.rows / kFma;
  else c.product = kWork * q.stages.products * own.blocks * (kBlock + 2 * kMmaLatency / chains(t, plan.nt));
  c.loads = kWork * fragments * t.kept * 128 / kSharedBytes;
  const bool grid = own.exchange == ExchangeKind::grid, alone = own.exchange == ExchangeKind::cta;
  c.cell = (q.stages.count - 1) * (alone ? kStage : kClusterStage);
  c.exchange = alone ? 0 : grid ? (q.stages.count - 1) * kGridLatency + bytes / kGridBytes : bytes / kClusterBytes;
  return c;
}

double without_a_team(const Request& q, const Device& device) {
  const double weights = double(q.R) * q.gates * q.H * q.H;
  const double rate = q.precision == Precision::ieee ? 2 * kFma : q.precision == Precision::tf32 ? kProductFlops / 2 : kProductFlops;
  return kIssue + std::max(2 * weights * q.B / (rate * device.multiprocessors), weights * tile(q.precision, false, 1).size / kL2Bytes);
}

// Clusters queue for multiprocessors: whether one has the registers (all of 255) and the memory for two members. In backward two were
// measured to be no faster than one after the other, nor are more than two.
bool has_room_for_two(const Plan& plan, const Device& device) {
  return 2 * 256 * plan.threads <= 65536 && 2 * plan.shared + 1024 <= device.shared;  // 1 KiB of each CTA is the system's
}

void consider(const Request& q, const Device& device, ExchangeKind exchange, int units, int nt, Plan& best) {
  Plan plan;
  plan.nt = nt;
  plan.stages = q.stages;
  const Tile t = tile_of(q, exchange, units, nt);
  const int members = ceil_div(q.H, units);
  const bool scatters = exchange == ExchangeKind::scatter, direct = exchange == ExchangeKind::direct;
  if (q.members && q.members != members) return;
  plan.tiles = ceil_div(q.B, 8 * nt);
  // Teams that are resident together; all of a launch must be where they meet in global memory, others queue.
  const bool clusters = scatters || exchange == ExchangeKind::cluster;
  const int64_t teams = clusters ? device.clusters[members - 1] : device.multiprocessors / members;
  const bool together = direct || exchange == ExchangeKind::grid;
  if (teams < (together ? q.R : 1)) return;
  for (int shares = 1; shares <= kThreads / 32; ++shares) {
    if (!lay_out(t, q.backward, q.gates, exchange, members, units, nt, shares, plan.team)) continue;
    plan.known = q.known ? find_known(plan.team, q.precision, q.backward, q.gates, q.H, q.narrow) : -1;
    if ((scatters || direct) && plan.known < 0) continue;
    plan.threads = threads_of(plan.team, plan.known < 0 ? units_per_thread(q.stages.count) : known_units_per_thread(plan.team));
    plan.shared = shared_layout(plan.team, t).total;
    if (q.stages.count > 1) {
      const Tile own = own_tile(q.precision);
      if (q.stages.products) plan.threads = std::max(plan.threads, 32 * ceil_div(units, own.rows));
      plan.own = own_team(plan.team, own, plan.threads);
      plan.shared = stages_layout(plan.own, own, q.stages, plan.shared).total;
    }
    if (plan.threads > kThreads || plan.shared > device.shared) continue;
    const bool crowded = !together && !q.backward && plan.tiles * q.R > teams && has_room_for_two(plan, device);
    const int64_t at_once = teams * (crowded ? 2 : 1);
    plan.tiles_at_once = int(std::max<int64_t>(at_once / q.R, 1));
    plan.waves = together ? ceil_div(plan.tiles, plan.tiles_at_once) : ceil_div(plan.tiles * q.R, at_once);
    plan.cycles = estimate(q, plan);
    if (q.stages.count > 1) {
      const Cycles more = estimate_stages(q, plan);
      plan.cycles.product += more.product, plan.cycles.loads += more.loads, plan.cycles.cell += more.cell;
      plan.cycles.exchange += more.exchange;
    }
    if (crowded) plan.cycles.cell *= plan.known < 0 ? kTwoOnOne : kTwoKnownOnOne;
    if (!best.nt || plan.waves * plan.cycles.sum() < best.waves * best.cycles.sum()) best = plan;
  }
}

void consider_units(const Request& q, const Device& device, ExchangeKind exchange, int nt, Plan& best) {
  switch (exchange) {
    case ExchangeKind::cta: return consider(q, device, exchange, 16 * ceil_div(q.H, 16), nt, best);
    case ExchangeKind::scatter:
      if (!q.backward || !q.known) return;
      [[fallthrough]];
    case ExchangeKind::cluster:
      for (int members = 2; members <= kLargestCluster; ++members) {
        const int units = 16 * ceil_div(q.H, 16 * int64_t(members));
        if (ceil_div(q.H, units) == members) consider(q, device, exchange, units, nt, best);
      }
      return;
    case ExchangeKind::direct:
      if (!q.backward || !q.known || !has_known_teams(q.precision, q.gates)) return;
      [[fallthrough]];
    case ExchangeKind::grid:
      for (int units = 16; units <= 128; units += 16) consider(q, device, exchange, units, nt, best);
  }
}

bool insists(const Request& q) { return q.exchange >= 0 || q.members || q.rows; }

std::string explain(const Request& q, const Device& device) {
  if (q.precision == Precision::f64) return "float64 has no tensor-core product: it runs stepwise";
  if (device.arch < 80) return "sm_" + std::to_string(device.arch) + " is older than sm_80";
  if (q.exchange == int(ExchangeKind::scatter) || q.exchange == int(ExchangeKind::direct))
    return std::string(q.exchange == int(ExchangeKind::scatter) ? "only backward scatters" : "only backward reads its operand directly") +
           ", and in teams that a kernel is compiled for, of cells of several gates: there is none of H = " + std::to_string(q.H) +
           " that fits, with the members or rows that were asked for";
  const int size = tile(q.precision, q.backward, 1).size;
  const int64_t weights = int64_t(q.gates) * q.H * q.H * size / narrower(q.precision, q.narrow), own = q.stages.products * q.H * q.H * size;
  return "W_hh of " + std::to_string(weights) + (own ? " bytes and the cell's own matrices of " + std::to_string(own) : std::string()) +
         " bytes for each of " + std::to_string(q.R) + " recurrence(s) fits no team of " + std::to_string(device.multiprocessors) +
         " multiprocessors with " + std::to_string(device.shared) + " bytes of shared memory each" +
         (insists(q) ? ", with the exchange, members or rows that were asked for" : "");
}

}  // namespace

Plan make_plan(const Request& q, const Device& device) {
  Plan best;
  if (q.precision != Precision::f64 && device.arch >= 80 && q.H < 1 << 16) {
    for (int exchange = 0; exchange < 5; ++exchange) {
      if (q.exchange >= 0 && q.exchange != exchange) continue;
      if ((ExchangeKind(exchange) == ExchangeKind::cluster || ExchangeKind(exchange) == ExchangeKind::scatter) && device.arch < 90)
        continue;
      for (const int nt : kBatchTiles)
        if (nt <= most_batch_tiles(q.precision) && (!q.rows || q.rows == 8 * nt))
          consider_units(q, device, ExchangeKind(exchange), nt, best);
    }
  }
  if (!best.nt) best.refusal = explain(q, device);
  const double cycles = best.waves * best.cycles.sum(), otherwise = without_a_team(q, device);
  if (best.nt && !insists(q) && q.stages.count == 1 && cycles > otherwise)
    best.refusal = "it is estimated to take " + std::to_string(int64_t(cycles)) + " cycles a step in " + std::to_string(best.waves) +
                   " waves of teams, step by step " + std::to_string(int64_t(otherwise));
  return best;
}

}  // namespace fused_rnn::cuda
