// From W_hh in memory to a lane's fragments. Rows and depth of the product may lie outside of W_hh, where weights are zero. Two ways:
// `load` takes all of a lane's m tile and block in whole vectors, straight to the registers that will hold them, where `aligned`; `quad`
// takes 16 bytes along the depth weight by weight, whatever the width.
#pragma once
#include "precision.h"

namespace fused_rnn::cuda {

template <class Policy>
struct Quad {
  using Storage = typename Policy::Storage;
  static constexpr int kCount = 16 / int(sizeof(Storage));  // weights in 16 bytes

  template <class Weight>
  FUSED_RNN_DEVICE static uint4 gather(const Weight& weight) {
    Storage each[kCount];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kCount; ++i) each[i] = weight(i);
    uint4 all;
    memcpy(&all, each, 16);
    return Policy::round(all);
  }
};

// Forward: rows are [G, U], gates and this member's units; the depth is W_hh's last dimension.
template <class Policy>
class ForwardWeights {
  using Storage = typename Policy::Storage;

 public:
  const bool aligned;

  FUSED_RNN_DEVICE ForwardWeights(const Storage* w, int gates, int width, int units, int first_u)
      : aligned(width % Quad<Policy>::kCount == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0),
        w_(w),
        gates_(gates),
        width_(width),
        units_(units),
        first_u_(first_u) {}

  FUSED_RNN_DEVICE uint4 quad(int row, int k) const {
    const Storage* from = at(row);
    return Quad<Policy>::gather([&](int i) { return from && k + i < width_ ? from[k + i] : Storage{}; });
  }
  FUSED_RNN_DEVICE void load(int row0, int k0, uint32_t (&a)[Policy::kRegisters]) const {
    FUSED_RNN_UNROLL
    for (int q = 0; q < Policy::kRegisters / 4; ++q) {
      const Storage* from = at(row0 + Policy::row(q));
      const int k = k0 + Policy::depth(q);
      uint4 v{0, 0, 0, 0};
      if (from && k < width_) v = Policy::round(*reinterpret_cast<const uint4*>(from + k));
      a[4 * q] = v.x, a[4 * q + 1] = v.y, a[4 * q + 2] = v.z, a[4 * q + 3] = v.w;
    }
  }

 private:
  // A row of W_hh; null outside.
  FUSED_RNN_DEVICE const Storage* at(int row) const {
    const int g = row / units_, u = first_u_ + row % units_;
    return g < gates_ && u < width_ ? w_ + (int64_t(g) * width_ + u) * width_ : nullptr;
  }

  const Storage* w_;
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

  FUSED_RNN_DEVICE uint4 quad(int row, int k) const {
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
        const uint4 v = Quad<Policy>::gather([&](int i) { return found[i].of[n]; });
        a[4 * (q + n)] = v.x, a[4 * (q + n) + 1] = v.y, a[4 * (q + n) + 2] = v.z, a[4 * (q + n) + 3] = v.w;
      }
    }
  }

 private:
  const Storage* w_;
  int gates_, width_, padded_, units_, first_u_;
};

}  // namespace fused_rnn::cuda
