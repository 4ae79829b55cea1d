#include "plan.h"

#include <algorithm>

#include "layout.h"

namespace fused_rnn::cuda {
namespace {

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Cycles by which each part was estimated, for an H100 at 1.7 GHz; estimates until they are measured on one.
constexpr double kMma = 8;            // an mma.m16n8k16 (tf32: k8) in one of the four parts of a multiprocessor
constexpr double kMmaLatency = 33;    // before the next one may add to its sums
constexpr double kSharedBytes = 128;  // of shared memory a cycle
constexpr double kBarrier = 40;       // of a CTA's threads, its skew included
constexpr double kActivations = 16;   // transcendental results a cycle
constexpr double kCellLatency = 150;  // of the longest chain of a cell
constexpr double kClusterLatency = 400, kClusterBytes = 16;  // remote stores to the wait's end; bytes that arrive a cycle
constexpr double kGridLatency = 2000, kGridBytes = 32;       // release to acquire through L2; bytes from L2 a cycle
constexpr double kFma = 128;          // a cycle

Cycles estimate(const Request& q, const Plan& plan) {
  const Tile t = tile(q.number, q.backward, plan.nt);
  const Team& team = plan.team;
  const double warps = plan.threads / 32.0, fragments = double(team.warps_m) * t.mt * team.warps_k * team.blocks;
  const double rest = std::max(team.blocks - t.kr, 0) * warps * t.mt * t.registers * 128;
  const double operand = warps * team.blocks * 64.0 * team.rows, cells = double(team.units) * team.rows;
  const double partial = 2.0 * team.warps_k * team.rows * team.warps_m * t.mt * t.rows * 4;
  Cycles c;
  if (q.number == NumberKind::ieee) c.product = fragments * t.rows * t.depth * team.rows / kFma;
  else c.product = std::max(2 * fragments * plan.nt / 4 * kMma, 2.0 * team.blocks * kMmaLatency / (t.mt * plan.nt == 1 ? 2 : 1));
  c.loads = (rest + operand + partial) / kSharedBytes;
  c.activations = kCellLatency + cells * (q.gates + 1) / kActivations + 2 * kBarrier;
  const double bytes = double(team.rows) * team.depth * t.size * (team.members - 1) / team.members;
  if (team.exchange == ExchangeKind::cluster) c.exchange = kClusterLatency + bytes / kClusterBytes;
  if (team.exchange == ExchangeKind::grid) c.exchange = kGridLatency + bytes / kGridBytes;
  return c;
}

// The division of a CTA's warps that keeps most of its weights in registers; false if the team cannot be.
bool lay_out(const Request& q, const Device& device, Plan& plan) {
  const Tile t = tile(q.number, q.backward, plan.nt);
  Team& team = plan.team;
  const int padded = team.members * team.units;
  team.depth = q.backward ? q.gates * padded : padded;
  team.warps_m = ceil_div(ceil_div(q.backward ? team.units : q.gates * team.units, t.rows), t.mt);
  const int blocks = ceil_div(team.depth, t.depth), most = kThreads / 32 / team.warps_m;
  if (most < 1) return false;
  // As few warps as keep the weights in registers, and no fewer than the cells need.
  const int for_weights = ceil_div(blocks, t.kr), for_cells = ceil_div(int64_t(team.units) * team.rows, 2 * 32 * team.warps_m);
  team.warps_k = std::min(std::max(for_weights, for_cells), most);
  team.blocks = ceil_div(blocks, team.warps_k);
  plan.threads = team.warps_m * team.warps_k * 32;
  if (int64_t(team.units) * team.rows > int64_t(kCellsPerThread) * plan.threads) return false;
  plan.shared = shared_layout(team, t).total;
  return plan.shared <= device.shared;
}

void consider(const Request& q, const Device& device, ExchangeKind exchange, int units, int nt, Plan& best) {
  Plan plan;
  plan.nt = nt;
  plan.team.exchange = exchange;
  plan.team.units = units;
  plan.team.members = ceil_div(q.H, units);
  plan.team.rows = 8 * nt;
  if (q.members && q.members != plan.team.members) return;
  plan.tiles = ceil_div(q.B, plan.team.rows);
  plan.tiles_at_once = int(device.multiprocessors / (plan.team.members * q.R));
  const bool together = exchange == ExchangeKind::grid;  // all of a launch must be resident; others queue
  if (together ? plan.tiles_at_once < 1 : plan.team.members > device.multiprocessors) return;
  if (!lay_out(q, device, plan)) return;
  plan.tiles_at_once = std::max(plan.tiles_at_once, 1);
  plan.waves = std::max(ceil_div(int64_t(plan.tiles) * plan.team.members * q.R, device.multiprocessors),
                        together ? ceil_div(plan.tiles, plan.tiles_at_once) : 1);
  plan.cycles = estimate(q, plan);
  if (!best.nt || plan.waves * plan.cycles.sum() < best.waves * best.cycles.sum()) best = plan;
}

// The cluster's size is a power of two, the grid's team any number.
void consider_units(const Request& q, const Device& device, ExchangeKind exchange, int nt, Plan& best) {
  switch (exchange) {
    case ExchangeKind::cta: return consider(q, device, exchange, 16 * ceil_div(q.H, 16), nt, best);
    case ExchangeKind::cluster:
      for (int members = 2; members <= device.max_cluster; members *= 2) {
        const int units = 16 * ceil_div(q.H, 16 * int64_t(members));
        if (ceil_div(q.H, units) == members) consider(q, device, exchange, units, nt, best);
      }
      return;
    case ExchangeKind::grid:
      for (int units = 16; units <= 128; units += 16) consider(q, device, exchange, units, nt, best);
  }
}

std::string explain(const Request& q, const Device& device) {
  if (q.number == NumberKind::f64) return "float64 has no tensor-core product: it runs stepwise";
  if (device.arch < 80) return "sm_" + std::to_string(device.arch) + " is older than sm_80";
  const Tile t = tile(q.number, q.backward, 1);
  const int64_t weights = int64_t(q.gates) * q.H * q.H * t.size;
  return "W_hh of " + std::to_string(weights) + " bytes for each of " + std::to_string(q.R) + " recurrence(s) fits no team of " +
         std::to_string(device.multiprocessors) + " multiprocessors with " + std::to_string(device.shared) + " bytes of shared memory each" +
         (q.exchange >= 0 || q.members || q.rows ? ", with the exchange, members or rows that were asked for" : "");
}

}  // namespace

Plan make_plan(const Request& q, const Device& device) {
  Plan best;
  if (q.number != NumberKind::f64 && device.arch >= 80 && q.H < 1 << 16) {
    for (int exchange = 0; exchange < 3; ++exchange) {
      if (q.exchange >= 0 && q.exchange != exchange) continue;
      if (ExchangeKind(exchange) == ExchangeKind::cluster && device.arch < 90) continue;
      for (const int nt : kBatchTiles)
        if (nt <= most_batch_tiles(q.number) && (!q.rows || q.rows == 8 * nt)) consider_units(q, device, ExchangeKind(exchange), nt, best);
    }
  }
  if (!best.nt) best.refusal = explain(q, device);
  return best;
}

}  // namespace fused_rnn::cuda
