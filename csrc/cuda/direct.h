// Backward's exchange on the grid for teams that are known when this is compiled (known_teams.h): gathering as gather.h does, without a
// copy of the operand in shared memory.
//
// The recurrent side of the gates' gradients, [NB, G C U], lies in global memory in the order in which the lanes of a product read it:
// [K / block of depth, NB, block]. A member's warps divide the depth; each reads its share from L2 straight to its registers (product.h),
// and multiplies it with all of the member's units. So of a member's shared memory the operand takes nothing, and nearly all of it holds
// W_hh: half as many members do as where the operand has to be there, and the operand's way passes behind the product.
//
// There are two copies, which steps alternate between; members are counted in and waited for as on the grid (exchange.h). The threads that
// read what other CTAs have written do so behind the barrier of the one that looked, and L2 is where it is. Nothing is overwritten that is
// still read: a member writes copy n & 1 for turn n + 2 when it has waited for all members' turn n + 1, which each of them was counted in
// for behind a barrier of its threads, behind its product of turn n; the loads of that product had returned, since the sums made of them
// went into turn n + 1.
#pragma once
#include "cta_rank.h"
#include "known_teams.h"

namespace fused_rnn::cuda {

template <class Policy, int G, int NT, class Known>
class Direct {
  using Operand = typename Policy::Operand;
  using Storage = typename Policy::Storage;
  static constexpr int U = Known::units, H = Known::width, NB = 8 * NT, kDepth = Policy::kDepth;
  static_assert(H % kDepth == 0);

 public:
  static constexpr int kUnits = Known::units_per_thread;
  static constexpr Tile kTile = direct_tile(Policy::kPrecision, U);
  Each<kUnits, ThreadUnit> index;

  // As Gather's.
  template <class Left>
  FUSED_RNN_DEVICE Direct(const Team& team, const CtaRank& me, const SharedLayout& at, const Workspace& workspace, const Storage* w, int,
                          bool resumes, const Left& left)
      : index(made_each<kUnits, ThreadUnit>([&](int j) { return ThreadUnit(team, j, Known::threads); })),
        team_(team),
        partial_(shared_array<float>(at.partial, at.partial_count)),
        operands_(static_cast<Operand*>(workspace.operand) + me.team * (NB * G * H)),
        arrived_(workspace.arrived + me.team * 32),
        apart_(me.teams * (NB * G * H)),
        first_u_(me.first_u),
        product_(team, shared_array<uint4>(at.weights, at.weights_count), BackwardWeights<Policy>(w, G, H, H, U, me.first_u)) {
    if (!resumes) return;
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      if (!index[j].inside) break;
      const Storage* from = left(index[j].b);
      Operand gates[G];
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) gates[g] = from ? Policy::operand(from[g * H + first_u_ + index[j].u]) : Operand{};
      put(j, gates);
    }
    arrive();
  }
  FUSED_RNN_DEVICE void open() const {}

  // The sums of the step that ran before; of unit j of this thread.
  FUSED_RNN_DEVICE void receive() const {
    wait_for(arrived_, turn_ * uint32_t(H / U));
    product_.run_directly(team_, reinterpret_cast<const uint4*>(copy(turn_)), partial_);
    sync_threads();
  }
  FUSED_RNN_DEVICE float sum(int j) const {
    float total[1];
    product_.sum(team_, partial_, index[j].u, 0, index[j].b, total);
    return total[0];
  }

  FUSED_RNN_DEVICE void put(int j, const Operand (&gates)[G]) const {
    const int u = first_u_ + index[j].u;
    Operand* to = copy(turn_ + 1) + (u / kDepth * NB + index[j].b) * kDepth + u % kDepth;
    FUSED_RNN_UNROLL
    for (int g = 0; g < G; ++g) to[g * (H * NB)] = gates[g];
  }
  FUSED_RNN_DEVICE void send() const {}
  FUSED_RNN_DEVICE void arrive() {
    sync_threads();
    count_in(arrived_);
    ++turn_;
  }

 private:
  FUSED_RNN_DEVICE Operand* copy(unsigned turn) const { return operands_ + int(turn & 1) * apart_; }

  const Team& team_;
  float* partial_;
  Operand* operands_;  // of this team, the first of two copies
  uint32_t* arrived_;
  int apart_, first_u_;
  unsigned turn_ = 0;
  Product<Policy, true, NT, Known> product_;
};

}  // namespace fused_rnn::cuda
