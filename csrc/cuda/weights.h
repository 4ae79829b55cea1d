// From W_hh in memory to a lane's fragments. Rows and depth of the product may lie outside of W_hh, where weights are zero. Two ways:
// `load` takes all of a lane's m tile and block in whole vectors, straight to the registers that will hold them, where `aligned`; `quad`
// takes what 16 bytes of the operand's depth are multiplied with weight by weight, whatever the width.
#pragma once
#include "precision.h"

namespace fused_rnn::cuda {

// The weights of 16 bytes of the operand's depth: a quad of registers; where they are narrow, a half or a quarter of it.
template <class Policy>
struct Quad {
  using Weight = typename Policy::Weight;
  static constexpr int kCount = 16 / int(sizeof(typename Policy::Operand)), kWords = kCount * int(sizeof(Weight)) / 4;
  struct alignas(4 * kWords) Words {
    uint32_t of[kWords];
  };

  template <class At>
  FUSED_RNN_DEVICE static Words gather(const At& at) {
    Weight each[kCount];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kCount; ++i) each[i] = at(i);
    Words all;
    memcpy(&all, each, sizeof(all));
    return keep(all);
  }
  FUSED_RNN_DEVICE static Words keep(Words all) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWords; ++i) all.of[i] = Policy::keep(all.of[i]);
    return all;
  }
};

// Of int8 weights: of the rows of one unit, of each gate. Of others nothing.
template <class Policy, int G>
class RowScales {
  static constexpr bool kScaled = Policy::kNarrow == Narrow::int8;

 public:
  // scale: [R, G, width].
  FUSED_RNN_DEVICE RowScales([[maybe_unused]] const float* scale, [[maybe_unused]] int r, [[maybe_unused]] int width,
                             [[maybe_unused]] int u) {
    if constexpr (kScaled) {
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) of_[g] = arrived(u < width ? scale[(r * G + g) * width + u] : 0.0f);
    }
  }
  FUSED_RNN_DEVICE void apply([[maybe_unused]] float (&sums)[G]) const {
    if constexpr (kScaled) {
      FUSED_RNN_UNROLL
      for (int g = 0; g < G; ++g) sums[g] *= of_[g];
    }
  }

 private:
  float of_[kScaled ? G : 1];
};

// Forward: rows are [G, U], gates and this member's units; the depth is W_hh's last dimension.
template <class Policy>
class ForwardWeights {
  using Weight = typename Policy::Weight;
  using Words = typename Quad<Policy>::Words;

 public:
  const bool aligned;

  FUSED_RNN_DEVICE ForwardWeights(const Weight* w, int gates, int width, int units, int first_u)
      : aligned(width % Quad<Policy>::kCount == 0 && reinterpret_cast<uintptr_t>(w) % sizeof(Words) == 0),
        w_(w),
        gates_(gates),
        width_(width),
        units_(units),
        first_u_(first_u) {}

  FUSED_RNN_DEVICE Words quad(int row, int k) const {
    const Weight* from = at(row);
    return Quad<Policy>::gather([&](int i) { return from && k + i < width_ ? from[k + i] : Weight{}; });
  }
  FUSED_RNN_DEVICE void load(int row0, int k0, uint32_t (&kept)[Policy::kKept]) const {
    FUSED_RNN_UNROLL
    for (int q = 0; q < Policy::kRegisters / 4; ++q) {
      const Weight* from = at(row0 + Policy::row(q));
      const int k = k0 + Policy::depth(q);
      Words v{};
      if (from && k < width_) v = *reinterpret_cast<const Words*>(from + k);
      v = Quad<Policy>::keep(v);
      memcpy(kept + q * Quad<Policy>::kWords, &v, sizeof(v));
    }
  }

 private:
  // A row of W_hh; null outside.
  FUSED_RNN_DEVICE const Weight* at(int row) const {
    const int g = row / units_, u = first_u_ + row % units_;
    return g < gates_ && u < width_ ? w_ + (int64_t(g) * width_ + u) * width_ : nullptr;
  }

  const Weight* w_;
  int gates_, width_, units_, first_u_;
};

// Backward: rows are this member's units, W_hh's last dimension; the depth is [G, C U], gates and units, where 16 bytes never reach from
// one gate into the next. So what is contiguous in memory are the rows, of which a lane has one or two neighbours.
template <class Policy>
class BackwardWeights {
  using Storage = typename Policy::Storage;
  static constexpr int kRows = Policy::kPrecision == Precision::ieee ? 1 : 2;
  struct alignas(kRows * sizeof(Storage)) Neighbours {
    Storage of[kRows];
  };

 public:
  const bool aligned;

  FUSED_RNN_DEVICE BackwardWeights(const Storage* w, int gates, int width, int padded, int units, int first_u)
      : aligned(width % kRows == 0 && reinterpret_cast<uintptr_t>(w) % alignof(Neighbours) == 0),
        w_(w),
        gates_(gates),
        width_(width),
        padded_(padded),
        units_(units),
        first_u_(first_u) {}

  FUSED_RNN_DEVICE auto quad(int row, int k) const {
    const int g = k / padded_, from = k % padded_, u = first_u_ + row;
    const bool inside = row < units_ && u < width_ && g < gates_;
    return Quad<Policy>::gather(
        [&](int i) { return inside && from + i < width_ ? w_[(int64_t(g) * width_ + from + i) * width_ + u] : Storage{}; });
  }
  FUSED_RNN_DEVICE void load(int row0, int k0, uint32_t (&a)[Policy::kRegisters]) const {
    const int row = row0 + Policy::row(0), u = first_u_ + row;
    FUSED_RNN_UNROLL
    for (int q = 0; q < Policy::kRegisters / 4; q += kRows) {
      const int k = k0 + Policy::depth(q), g = k / padded_, from = k % padded_;
      const bool inside = row < units_ && u < width_ && g < gates_;
      const Storage* at = w_ + (int64_t(g) * width_ + from) * width_ + u;
      Neighbours found[Quad<Policy>::kCount];
      FUSED_RNN_UNROLL
      for (int i = 0; i < Quad<Policy>::kCount; ++i)
        found[i] = inside && from + i < width_ ? *reinterpret_cast<const Neighbours*>(at + int64_t(i) * width_) : Neighbours{};
      FUSED_RNN_UNROLL
      for (int n = 0; n < kRows; ++n) {
        const auto v = Quad<Policy>::gather([&](int i) { return found[i].of[n]; });
        memcpy(a + 4 * (q + n), &v, sizeof(v));
      }
    }
  }

 private:
  const Storage* w_;
  int gates_, width_, padded_, units_, first_u_;
};

}  // namespace fused_rnn::cuda
