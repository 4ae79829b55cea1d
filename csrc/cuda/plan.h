// From a problem and a device to the kernel that runs it, the team and its memory; or the reason why none does. Host code that
// knows no CUDA: it is tested, and can be asked about any device, on any machine.
#pragma once
#include <cstdint>
#include <string>

#include "layout.h"

namespace fused_rnn::cuda {

struct Device {
  int arch = 0;  // 90 for sm_90
  int multiprocessors = 0;
  int64_t shared = 0;  // bytes of dynamic shared memory that a CTA may ask for
  // [n - 1]: how many clusters of n CTAs are resident together where each CTA has a multiprocessor to itself; 0 where there are none.
  // A cluster stays within a GPC, and GPCs differ in size, from part to part and within one: clusters of 16 leave multiprocessors idle.
  int clusters[kLargestCluster] = {};
};

struct Request {
  Precision precision;
  bool backward;
  int gates;
  int64_t B, H, R;
  int exchange = -1;    // an ExchangeKind to insist on, -1 for any
  int members = 0;      // likewise C, 0 for any
  int rows = 0;         // likewise NB
  bool known = false;   // there are kernels for known teams (known_teams.h)
  int fewer = 0;        // blocks in registers than the kernels of built-in cells have: tiles.h's kFewerBlocks of those that will run
  Narrow narrow = Narrow::none;  // what forward keeps W_hh in
  Stages stages{};  // of the cell, in this direction
};

// Estimated cycles of a step on its critical path, by part.
struct Cycles {
  double product = 0, loads = 0, cell = 0, exchange = 0;
  double sum() const { return product + loads + cell + exchange; }
};

struct Plan {
  Team team{};
  Team own{};  // the same, for products with the cell's own matrices
  Stages stages{};
  int nt = 0;
  int known = -1;   // its place in kKnownShapes, where kernels are compiled for the team
  int threads = 0;
  int64_t shared = 0;  // bytes
  int tiles = 0;  // of the batch, in all
  int tiles_at_once = 0;  // whose R teams are resident together; a launch of a grid exchange has no more
  Cycles cycles;  // of a step of one wave of teams
  int waves = 0;
  std::string refusal;  // empty, or why there is no plan
};

Plan make_plan(const Request& request, const Device& device);

}  // namespace fused_rnn::cuda
