// The stages of a step of a cell that has several: pointwise formula, what is published, pointwise formula, ..
//
// What is published runs for all of the team's units at once: sums and variances of rows (reduce.h), and products with blocks of the cell's
// own matrices. An operand of those is shared as h is, by an exchange of its own (exchange.h), whose argument holds for it as it stands: a
// turn of it is a run of the stage that it ends, once a step. The product is product.h's: a block's rows forward, or its columns backward,
// of the member's units are with the member for all of time, all of them in shared memory. Its operand is read behind the exchange's wait,
// and its sums behind a barrier; they are overwritten behind the next turn's `arrive`, which is a barrier of the threads, too.
#pragma once
#include "reduce.h"

namespace fused_rnn::cuda {

// What a cell publishes in one direction, by constants.
template <class Cell, bool kBackward>
struct Publishing {
  static constexpr int stages = kBackward ? Cell::backward_stages : Cell::forward_stages;

  static constexpr Published of(int i) {
    if constexpr (stages == 1) return Published{};
    else if constexpr (kBackward) return Cell::backward_published[i];
    else return Cell::forward_published[i];
  }
  static constexpr int count() {
    if constexpr (stages == 1) return 0;
    else if constexpr (kBackward) return int(sizeof(Cell::backward_published) / sizeof(Published));
    else return int(sizeof(Cell::forward_published) / sizeof(Published));
  }
  static constexpr bool is_product(int i) { return of(i).what == Publish::product || of(i).what == Publish::transposed; }

  // The number among a row's of the stage at which it begins: a variance takes a pair, a sum one.
  static constexpr int number_of(int i) {
    int next = 0;
    for (int k = 0; k <= i; ++k) {
      if (of(k).stage != of(i).stage || is_product(k)) continue;
      if (of(k).what == Publish::variance) next = (next + 1) / 2 * 2;
      if (k == i) return next;
      next += of(k).what == Publish::variance ? 2 : 1;
    }
    return next;
  }
  static constexpr int pairs(int stage) {
    int most = 0;
    for (int i = 0; i < count(); ++i) {
      if (of(i).stage != stage || is_product(i)) continue;
      const int last = number_of(i) + (of(i).what == Publish::variance);
      if (last / 2 + 1 > most) most = last / 2 + 1;
    }
    return most;
  }

  // Whether it is the first that reads its operand in its stage; of all those before it, how many are.
  static constexpr bool brings(int i) {
    for (int k = 0; k < i; ++k)
      if (is_product(k) && of(k).stage == of(i).stage && of(k).from == of(i).from) return false;
    return is_product(i);
  }
  static constexpr int operand_of(int i) {
    int found = -1;
    for (int k = 0; k < count(); ++k) {
      found += brings(k);
      if (is_product(k) && of(k).stage == of(i).stage && of(k).from == of(i).from) return found;
    }
    return found;
  }
  static constexpr int product_of(int i) {  // its place among all products
    int found = 0;
    for (int k = 0; k < i; ++k) found += is_product(k);
    return found;
  }
  static constexpr int place_of(int i) {  // among those of its stage
    int found = 0;
    for (int k = 0; k < i; ++k) found += is_product(k) && of(k).stage == of(i).stage;
    return found;
  }

  static constexpr Stages needs() {
    Stages all;
    all.count = stages;
    for (int i = 0; i < count(); ++i) {
      if (pairs(of(i).stage) > all.pairs) all.pairs = pairs(of(i).stage);
      all.operands += brings(i);
      all.products += is_product(i);
      if (is_product(i) && place_of(i) + 1 > all.at_once) all.at_once = place_of(i) + 1;
    }
    return all;
  }
  static constexpr int block_of_product(int product) {
    for (int i = 0; i < count(); ++i)
      if (is_product(i) && product_of(i) == product) return of(i).block;
    return 0;
  }
};

// Of one member. Built before the threads' barrier that lets peers write, and before anything is published.
template <class Cell, class Policy, bool kBackward, int NT>
class Publisher {
  using Facts = Publishing<Cell, kBackward>;
  using Operand = typename Policy::Operand;
  using Weight = typename Policy::Weight;
  static constexpr Stages kNeeds = Facts::needs();
  static constexpr Tile kTile = own_tile(Policy::kPrecision);
  using Own = Product<Policy, kBackward, NT, OwnTeam>;
  using Meeting = Exchange<Policy, kBackward>;

 public:
  template <class Loop>
  FUSED_RNN_DEVICE Publisher(const Loop& p, const CtaRank& me, int64_t from)
      : team_(p.own.team),
        at_(stages_layout(team_, kTile, kNeeds, from)),
        me_(me),
        reduction_(team_, reductions(p, me), shared_array<float2>(at_.slots, at_.slots_count), barriers(0), me, p.steps.H, kNeeds.pairs),
        exchanges_(made_each<kNeeds.operands, Meeting>([&](int i) {
          Operand* operand =
              shared_array<Operand>(at_.operands + i * (at_.operands_count * int(sizeof(Operand)) + kSharedGap), at_.operands_count);
          clear(operand, at_.operands_count);
          return Meeting(team_, meeting(p, me, i), operand, barriers(1 + i), me.team, me.teams, me.index);
        })),
        products_(made_each<kNeeds.products, Own>([&](int i) {
          const int width = p.steps.H, block = block_of(i);
          const Weight* w = static_cast<const Weight*>(p.own.matrices) + (int64_t(me.r) * Cell::blocks + block) * width * width;
          uint4* rest = shared_array<uint4>(at_.weights + i * (at_.weights_count * 16 + kSharedGap), at_.weights_count);
          if constexpr (kBackward)
            return Own(team_, rest, BackwardWeights<Policy>(w, 1, width, team_.members * team_.units, team_.units, me.first_u));
          else return Own(team_, rest, ForwardWeights<Policy>(w, 1, width, team_.units, me.first_u));
        })) {}

  // All stages of a step. begun: the units' steps, of those that are inside.
  template <int kUnits, class Units, class Now, class Loop>
  FUSED_RNN_DEVICE void run(const Each<kUnits, ThreadUnit>& index, Units& units, Now (&now)[kUnits], const Loop& p) {
    each<Facts::stages>([&](auto stage) __attribute__((always_inline)) {
      constexpr int kStage = decltype(stage)::value;
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) {
        if (!index[j].inside) break;
        units[j].template compute<kStage>(now[j], p);
      }
      if constexpr (Facts::pairs(kStage) > 0) reduce<kStage>(index, now);
      if constexpr (multiplies(kStage)) multiply<kStage>(index, now);
    });
  }

 private:
  static constexpr bool multiplies(int stage) {
    for (int i = 0; i < Facts::count(); ++i)
      if (Facts::is_product(i) && Facts::of(i).stage == stage) return true;
    return false;
  }
  // With each published operation of the stage, as a constant.
  template <int kStage, class Run>
  FUSED_RNN_DEVICE static void each_of_stage(const Run& run) {
    each<Facts::count()>([&](auto i) {
      if constexpr (Facts::of(decltype(i)::value).stage == kStage) run(i);
    });
  }

  template <int kStage, int kUnits, class Now>
  FUSED_RNN_DEVICE void reduce(const Each<kUnits, ThreadUnit>& index, Now (&now)[kUnits]) {
    constexpr int kPairs = Facts::pairs(kStage);
    reduction_.begin(kPairs);
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      if (!index[j].inside) break;
      float2 pairs[kPairs] = {};
      each_of_stage<kStage>([&](auto i) {
        constexpr int kI = decltype(i)::value, kNumber = Facts::number_of(kI);
        constexpr Published one = Facts::of(kI);
        if constexpr (one.what == Publish::variance) pairs[kNumber / 2] = reduction_.spread(index[j], now[j].crossing[one.from]);
        if constexpr (one.what == Publish::sum)
          (kNumber % 2 ? pairs[kNumber / 2].y : pairs[kNumber / 2].x) = reduction_.sum(index[j], now[j].crossing[one.from]);
      });
      FUSED_RNN_UNROLL
      for (int i = 0; i < kPairs; ++i) reduction_.send(index[j], i, kPairs, pairs[i]);
    }
    reduction_.wait(kPairs, index[0].inside);
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      if (!index[j].inside) break;
      each_of_stage<kStage>([&](auto i) {
        constexpr int kI = decltype(i)::value, kNumber = Facts::number_of(kI);
        constexpr Published one = Facts::of(kI);
        if constexpr (one.what == Publish::variance) now[j].crossing[one.to] = reduction_.variance(index[j], kNumber / 2, kPairs);
        if constexpr (one.what == Publish::sum) now[j].crossing[one.to] = reduction_.total(index[j], kNumber / 2, kPairs, kNumber % 2 == 1);
      });
    }
    reduction_.end();
  }

  template <int kStage, int kUnits, class Now>
  FUSED_RNN_DEVICE void multiply(const Each<kUnits, ThreadUnit>& index, Now (&now)[kUnits]) {
    const auto each_operand = [&](const auto& run) {
      each_of_stage<kStage>([&](auto i) {
        constexpr int kI = decltype(i)::value;
        if constexpr (Facts::brings(kI)) run(exchanges_[Facts::operand_of(kI)], Facts::of(kI));
      });
    };
    each_operand([&](Meeting& exchange, const Published& one) {
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) {
        if (!index[j].inside) break;
        // What no weight but zero multiplies must not be NaN.
        const auto value = now[j].valid ? narrow<typename Policy::Storage>(now[j].crossing[one.from]) : typename Policy::Storage{};
        const Operand operand[1] = {Policy::operand(value)};
        exchange.put(index[j].b, me_.first_u + index[j].u, 0, operand);
      }
      exchange.publish();
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; ++j) exchange.template send<1>(exchange.chunk_of(index[j].i - lane()), me_.first_u, 0);
    });
    each_operand([&](Meeting& exchange, const Published&) { exchange.arrive(); });
    each_operand([&](Meeting& exchange, const Published&) { exchange.wait(); });
    each_of_stage<kStage>([&](auto i) {
      constexpr int kI = decltype(i)::value;
      if constexpr (Facts::is_product(kI))
        products_[Facts::product_of(kI)].run(team_, exchanges_[Facts::operand_of(kI)].current(), partial(Facts::place_of(kI)));
    });
    sync_threads();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      if (!index[j].inside) break;
      each_of_stage<kStage>([&](auto i) {
        constexpr int kI = decltype(i)::value;
        if constexpr (Facts::is_product(kI)) {
          float total[1];
          Own::sum(team_, partial(Facts::place_of(kI)), index[j].u, 0, index[j].b, total);
          now[j].crossing[Facts::of(kI).to] = total[0];
        }
      });
    }
  }

  FUSED_RNN_DEVICE static int block_of(int product) {
    int found = 0;
    each<kNeeds.products>([&](auto i) {
      constexpr int kBlock = Facts::block_of_product(decltype(i)::value);
      if (product == int(i)) found = kBlock;
    });
    return found;
  }
  FUSED_RNN_DEVICE float* partial(int i) const {
    return shared_array<float>(at_.partial + i * (at_.partial_count * 4 + kSharedGap), at_.partial_count);
  }
  FUSED_RNN_DEVICE uint64_t* barriers(int pair) const { return shared_array<uint64_t>(at_.barriers, at_.barriers_count) + 2 * pair; }

  // In global memory: of each operand [2, teams of the launch, NB, C U], then pairs [2, teams, NB, pairs, reduced]; counters [operands + 1,
  // teams, 32].
  template <class Loop>
  FUSED_RNN_DEVICE Workspace meeting(const Loop& p, const CtaRank& me, int i) const {
    if (team_.exchange != ExchangeKind::grid) return {};
    const int64_t operand = int64_t(2) * me.teams * team_.rows * team_.depth * int(sizeof(Operand));
    return {static_cast<char*>(p.own.workspace.operand) + i * operand, p.own.workspace.arrived + i * me.teams * 32};
  }
  template <class Loop>
  FUSED_RNN_DEVICE Workspace reductions(const Loop& p, const CtaRank& me) const {
    return meeting(p, me, kNeeds.operands);
  }

  const Team& team_;
  StagesLayout at_;
  CtaRank me_;
  Reduction reduction_;
  Each<kNeeds.operands, Meeting> exchanges_;
  Each<kNeeds.products, Own> products_;
};

// A cell in one stage has none.
struct NoPublisher {
  template <class Loop>
  FUSED_RNN_DEVICE NoPublisher(const Loop&, const CtaRank&, int64_t) {}
};
template <class Cell, class Policy, bool kBackward, int NT>
using PublisherOf = std::conditional_t<Publishing<Cell, kBackward>::stages == 1, NoPublisher, Publisher<Cell, Policy, kBackward, NT>>;

}  // namespace fused_rnn::cuda
