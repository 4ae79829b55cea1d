// How gradients reach the step before, by gathering: the members share the operand, the recurrent side of the gates' gradients, [NB, G C
// U], and each multiplies it with the columns of W_hh that are its units. For every team and exchange. scatter.h has the same functions.
#pragma once
#include "cta_rank.h"

namespace fused_rnn::cuda {

template <class Policy, int G, int NT, int kUnits_>
class Gather {
  using Operand = typename Policy::Operand;
  using Storage = typename Policy::Storage;

 public:
  static constexpr int kUnits = kUnits_;
  static constexpr Tile kTile = tile(Policy::kPrecision, true, NT);
  Each<kUnits, ThreadUnit> index;

  // w: of this recurrence.  left(b): where a loop goes on that ended here, of a row of the batch the gates' gradients that it left, [G,
  // width]; null where there are none.
  template <class Left>
  FUSED_RNN_DEVICE Gather(const Team& team, const CtaRank& me, const SharedLayout& at, const Workspace& workspace, const Storage* w,
                          int width, bool resumes, const Left& left)
      : index(made_each<kUnits, ThreadUnit>([&](int j) { return ThreadUnit(team, j); })),
        team_(team),
        first_u_(me.first_u),
        padded_(team.members * team.units),
        partial_(shared_array<float>(at.partial, at.partial_count)),
        exchange_(team, workspace, cleared(at), shared_array<uint64_t>(at.barriers, at.barriers_count), me.team, me.teams, me.index),
        ready_(begin(width, resumes, left)),
        product_(team, shared_array<uint4>(at.weights, at.weights_count),
                 BackwardWeights<Policy>(w, G, width, padded_, team.units, me.first_u)) {
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) chunk_[j] = exchange_.chunk_of(index[j].i - lane());
  }
  FUSED_RNN_DEVICE void open() const { exchange_.open(); }

  // The sums of the step that ran before; of unit j of this thread.
  FUSED_RNN_DEVICE void receive() const {
    exchange_.wait();
    product_.run(team_, exchange_.current(), partial_);
    sync_threads();
  }
  FUSED_RNN_DEVICE float sum(int j) const {
    float total[1];
    product_.sum(team_, partial_, index[j].u, 0, index[j].b, total);
    return total[0];
  }

  FUSED_RNN_DEVICE void put(int j, const Operand (&gates)[G]) const { exchange_.put(index[j].b, first_u_ + index[j].u, padded_, gates); }
  FUSED_RNN_DEVICE void send() const {
    exchange_.publish();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) exchange_.template send<G>(chunk_[j], first_u_, padded_);
  }
  FUSED_RNN_DEVICE void arrive() { exchange_.arrive(); }

 private:
  FUSED_RNN_DEVICE static Operand* cleared(const SharedLayout& at) {
    Operand* operands = shared_array<Operand>(at.operands, at.operands_count);
    clear(operands, at.operands_count);
    return operands;
  }
  // Peers may write; and the first operand, where there is one.
  template <class Left>
  FUSED_RNN_DEVICE bool begin(int width, bool resumes, const Left& left) const {
    sync_threads();
    exchange_.invite();
    for (int b = int(threadIdx.x) / 32; resumes && b < team_.rows; b += int(blockDim.x) / 32) {  // a warp a row
      const Storage* rows = left(b);
      if (!rows) continue;
      for (int g = 0; g < G; ++g) {
        Operand* to = exchange_.current() + b * exchange_.stride() + g * padded_;
        const Storage* from = rows + g * width;
        FUSED_RNN_UNROLL_BY(8)
        for (int u = lane(); u < width; u += 32) to[u] = Policy::operand(from[u]);
      }
    }
    return true;
  }

  const Team& team_;
  int first_u_, padded_;
  float* partial_;
  Exchange<Policy, true> exchange_;
  bool ready_;  // before the weights are loaded
  Product<Policy, true, NT> product_;
  int chunk_[kUnits];
};

}  // namespace fused_rnn::cuda
