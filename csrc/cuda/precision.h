// How a product is taken in each precision. A policy says, for one warp:
//   kPrecision, Math                 its name, and the activations that go with it
//   Storage, Operand                 types of states and gates in memory and of the operand in shared memory
//   kNarrow, Weight                  how W_hh is kept, and its type in memory
//   kRows                            rows of an m tile
//   kDepth                           depth of a block: 64 bytes of an operand's row
//   kRegisters                       of a lane, for an m tile's weights of one block
//   kKept                            registers in which it keeps them: as many, or fewer where they are narrow
//   kSums                            of a lane, for an m tile times 8 rows of the batch
//   row(q), depth(q)                 where the lane's weights begin that registers 4 q .. 4 q + 3 take: 16 bytes along the operand's depth
//   keep(v)                          a register of weights from memory as it is kept
//   widen(kept, a)                   where they are narrow, what is kept as the product reads it
//   Fragment, read(operand, stride)  the lane's part of a block of the operand, 8 rows of the batch
//   multiply(low, high, a, b)        low, high += weights times that, for several m tiles; two sums, or twice the same
//   store(sums, to, stride)          to [8 rows of the batch, kRows]
//   operand(v)                       v as the product reads it
#pragma once
#include <type_traits>

#include "primitives/activations.h"
#include "primitives/mma.h"
#include "primitives/widen.h"
#include "storage.h"
#include "tiles.h"

namespace fused_rnn::cuda {

FUSED_RNN_DEVICE int lane() { return int(threadIdx.x) % 32; }

// On tensor cores: two mma a block. Which row of W_hh is which row of an mma, and which of the 64 bytes of depth is which of its k, is
// free as long as both operands agree. So lane 4 r + c has rows 2 r and 2 r + 1 of the weights and row r of the operand, of each the
// 16 bytes from 16 c on: all of them one access of 16 bytes, to memory as well as to shared memory, and no ldmatrix.
template <class Storage_, Precision kPrecision_, class Math_>
struct TensorProduct {
  static constexpr Precision kPrecision = kPrecision_;
  using Math = Math_;
  using Storage = Storage_;
  using Operand = Storage;
  using Weight = Storage;
  static constexpr Narrow kNarrow = Narrow::none;
  static constexpr int kRows = 16, kDepth = 64 / int(sizeof(Storage)), kRegisters = 8, kKept = kRegisters, kSums = 4;

  FUSED_RNN_DEVICE static int row(int q) { return lane() / 4 * 2 + q; }
  FUSED_RNN_DEVICE static int depth(int) { return lane() % 4 * (kDepth / 4); }
  FUSED_RNN_DEVICE static uint32_t keep(uint32_t v) {
    if constexpr (kPrecision != Precision::tf32) return v;
    else return to_tf32(as_float(v));
  }
  FUSED_RNN_DEVICE static Operand operand(Storage v) {
    if constexpr (kPrecision != Precision::tf32) return v;
    else return as_float(to_tf32(v));
  }

  using Fragment = uint4;
  FUSED_RNN_DEVICE static Fragment read(const Operand* operand, int stride) {
    return *reinterpret_cast<const uint4*>(operand + lane() / 4 * stride + depth(0));
  }
  template <int MT>
  FUSED_RNN_DEVICE static void multiply(float (&low)[MT][kSums], float (&high)[MT][kSums], const uint32_t (&a)[MT][kRegisters],
                                        const Fragment& b) {
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) add(low[m], {a[m][0], a[m][4], a[m][1], a[m][5]}, {b.x, b.y});
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) add(high[m], {a[m][2], a[m][6], a[m][3], a[m][7]}, {b.z, b.w});
  }
  // The lane has rows 2 r and 2 r + 1 of columns 2 c (sums 0 and 2) and 2 c + 1.
  FUSED_RNN_DEVICE static void store(const float (&sums)[kSums], float* to, int stride) {
    to += lane() % 4 * 2 * stride + row(0);
    *reinterpret_cast<float2*>(to) = {sums[0], sums[2]};
    *reinterpret_cast<float2*>(to + stride) = {sums[1], sums[3]};
  }

 private:
  FUSED_RNN_DEVICE static void add(float (&sums)[kSums], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kPrecision == Precision::tf32) mma_tf32(sums, a, b);
    else mma(sums, a, b, Storage{});
  }
};

// float32 as it is, by FMA: a lane has a row of the weights, and the operand is read by all lanes at once.
struct IeeeProduct {
  static constexpr Precision kPrecision = Precision::ieee;
  using Math = Exact;
  using Storage = float;
  using Operand = float;
  using Weight = float;
  static constexpr Narrow kNarrow = Narrow::none;
  static constexpr int kRows = 32, kDepth = 16, kRegisters = 16, kKept = kRegisters, kSums = 8;

  FUSED_RNN_DEVICE static int row(int) { return lane(); }
  FUSED_RNN_DEVICE static int depth(int q) { return 4 * q; }
  FUSED_RNN_DEVICE static uint32_t keep(uint32_t v) { return v; }
  FUSED_RNN_DEVICE static float operand(float v) { return v; }

  struct Fragment {
    const float* operand;
    int stride;
  };
  FUSED_RNN_DEVICE static Fragment read(const float* operand, int stride) { return {operand, stride}; }
  template <int MT>
  FUSED_RNN_DEVICE static void multiply(float (&sums)[MT][kSums], float (&)[MT][kSums], const uint32_t (&a)[MT][kRegisters],
                                        const Fragment& b) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < 8; ++n) {
      FUSED_RNN_UNROLL
      for (int k = 0; k < kDepth; k += 4) {
        const float4 h = *reinterpret_cast<const float4*>(b.operand + n * b.stride + k);
        FUSED_RNN_UNROLL
        for (int m = 0; m < MT; ++m) {
          sums[m][n] += as_float(a[m][k]) * h.x;
          sums[m][n] += as_float(a[m][k + 1]) * h.y;
          sums[m][n] += as_float(a[m][k + 2]) * h.z;
          sums[m][n] += as_float(a[m][k + 3]) * h.w;
        }
      }
    }
  }
  FUSED_RNN_DEVICE static void store(const float (&sums)[kSums], float* to, int stride) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < kSums; ++n) to[n * stride + lane()] = sums[n];
  }
};

using Bf16Product = TensorProduct<bf16, Precision::bf16, Fast>;
using F16Product = TensorProduct<f16, Precision::f16, Fast>;
using Tf32Product = TensorProduct<float, Precision::tf32, Exact>;

// The same with W_hh in fewer bytes. What a lane keeps is widened, which is exact: an integer of 8 bits, and a bfloat16, are numbers
// of all the wider types. The scale of a row of int8 is for its whole sum (RowScales in weights.h).
template <class Whole, Narrow narrow>
struct NarrowProduct : Whole {
  using typename Whole::Operand;
  using Weight = std::conditional_t<narrow == Narrow::int8, int8_t, bf16>;
  static constexpr Narrow kNarrow = narrow;
  static constexpr int kRegisters = Whole::kRegisters, kKept = kRegisters * int(sizeof(Weight)) / int(sizeof(Operand));
  static_assert(sizeof(Weight) < sizeof(Operand));

  FUSED_RNN_DEVICE static uint32_t keep(uint32_t v) { return narrow == Narrow::int8 ? keep_int8(v, Operand{}) : v; }
  FUSED_RNN_DEVICE static void widen(const uint32_t (&kept)[kKept], uint32_t (&a)[kRegisters]) {
    constexpr int kTimes = kRegisters / kKept;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kKept; ++i)  // renewed: the compiler would widen them all before the loop over time, and spill them
      widen(uint32_t(renewed(int(kept[i]))), reinterpret_cast<uint32_t (&)[kTimes]>(a[kTimes * i]));
  }

 private:
  FUSED_RNN_DEVICE static void widen(uint32_t word, uint32_t (&wide)[kRegisters / kKept]) {
    if constexpr (narrow == Narrow::bf16) widen_bf16(word, wide);
    else widen_int8(word, wide, Operand{});
  }
};

}  // namespace fused_rnn::cuda
