// How the numbers of a product are multiplied. A policy says, for one warp:
//   kKind, Math                      its name, and the activations that go with it
//   Storage, Operand                 types of the weights in memory and of the operand in shared memory
//   kRows                            rows of an m tile
//   kDepth                           depth of a block: 64 bytes of an operand's row
//   kRegisters                       of a lane, for an m tile's weights of one block
//   kSums                            of a lane, for an m tile times 8 rows of the batch
//   load(q, weight)                  weight(row, k) of an m tile and block → its registers 4 q .. 4 q + 3
//   multiply(sums, a, operand, stride)  sums += weights x 8 rows of the operand, for several m tiles
//   row(i), column(i)                which row of the m tile and of the batch sum i of this lane belongs to
//   operand(v)                       v as the product reads it
#pragma once
#include "primitives/activations.h"
#include "primitives/mma.h"
#include "storage.h"
#include "tiles.h"

namespace fused_rnn::cuda {

FUSED_RNN_DEVICE int lane() { return int(threadIdx.x) % 32; }

// 16-bit numbers on tensor cores: two mma.m16n8k16 a block.
template <class Half, NumberKind kHalf>
struct HalfProduct {
  static constexpr NumberKind kKind = kHalf;
  using Math = Fast;
  using Storage = Half;
  using Operand = Half;
  static constexpr int kRows = 16, kDepth = 32, kRegisters = 8, kSums = 4;

  template <class Weight>
  FUSED_RNN_DEVICE static uint4 load(int q, const Weight& weight) {
    const int row = lane() / 4, k = lane() % 4 * 2 + 16 * q;
    const auto pair = [&](int row, int k) { return uint32_t(weight(row, k).bits) | uint32_t(weight(row, k + 1).bits) << 16; };
    return {pair(row, k), pair(row + 8, k), pair(row, k + 8), pair(row + 8, k + 8)};
  }
  template <int MT>
  FUSED_RNN_DEVICE static void multiply(float (&sums)[MT][kSums], const uint32_t (&a)[MT][kRegisters], const Half* operand, int stride) {
    uint32_t b[4];
    ldmatrix_x4(b, operand + lane() % 8 * stride + lane() / 8 * 8);
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) {
      mma(sums[m], {a[m][0], a[m][1], a[m][2], a[m][3]}, low, Half{});
      mma(sums[m], {a[m][4], a[m][5], a[m][6], a[m][7]}, high, Half{});
    }
  }
  FUSED_RNN_DEVICE static int row(int i) { return lane() / 4 + 8 * (i >> 1); }
  FUSED_RNN_DEVICE static int column(int i) { return lane() % 4 * 2 + (i & 1); }
  FUSED_RNN_DEVICE static Half operand(Half v) { return v; }
};

// float32 rounded to TF32 on tensor cores: two mma.m16n8k8 a block.
struct Tf32Product {
  static constexpr NumberKind kKind = NumberKind::tf32;
  using Math = Exact;
  using Storage = float;
  using Operand = float;
  static constexpr int kRows = 16, kDepth = 16, kRegisters = 8, kSums = 4;

  template <class Weight>
  FUSED_RNN_DEVICE static uint4 load(int q, const Weight& weight) {
    const int row = lane() / 4, k = lane() % 4 + 8 * q;
    return {to_tf32(weight(row, k)), to_tf32(weight(row + 8, k)), to_tf32(weight(row, k + 4)), to_tf32(weight(row + 8, k + 4))};
  }
  template <int MT>
  FUSED_RNN_DEVICE static void multiply(float (&sums)[MT][kSums], const uint32_t (&a)[MT][kRegisters], const float* operand, int stride) {
    uint32_t b[4];
    ldmatrix_x4(b, operand + lane() % 8 * stride + lane() / 8 * 4);  // a matrix row is 16 bytes: 4 floats, one a lane
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    FUSED_RNN_UNROLL
    for (int m = 0; m < MT; ++m) {
      mma_tf32(sums[m], {a[m][0], a[m][1], a[m][2], a[m][3]}, low);
      mma_tf32(sums[m], {a[m][4], a[m][5], a[m][6], a[m][7]}, high);
    }
  }
  FUSED_RNN_DEVICE static int row(int i) { return lane() / 4 + 8 * (i >> 1); }
  FUSED_RNN_DEVICE static int column(int i) { return lane() % 4 * 2 + (i & 1); }
  FUSED_RNN_DEVICE static float operand(float v) { return as_float(to_tf32(v)); }
};

// float32 as it is, by FMA: a lane has a row of the weights, and the operand is read by all lanes at once.
struct IeeeProduct {
  static constexpr NumberKind kKind = NumberKind::ieee;
  using Math = Exact;
  using Storage = float;
  using Operand = float;
  static constexpr int kRows = 32, kDepth = 16, kRegisters = 16, kSums = 8;

  template <class Weight>
  FUSED_RNN_DEVICE static uint4 load(int q, const Weight& weight) {
    return {as_bits(weight(lane(), 4 * q)), as_bits(weight(lane(), 4 * q + 1)), as_bits(weight(lane(), 4 * q + 2)), as_bits(weight(lane(), 4 * q + 3))};
  }
  template <int MT>
  FUSED_RNN_DEVICE static void multiply(float (&sums)[MT][kSums], const uint32_t (&a)[MT][kRegisters], const float* operand, int stride) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < 8; ++n) {
      FUSED_RNN_UNROLL
      for (int k = 0; k < kDepth; k += 4) {
        const float4 h = *reinterpret_cast<const float4*>(operand + n * stride + k);
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
  FUSED_RNN_DEVICE static int row(int) { return lane(); }
  FUSED_RNN_DEVICE static int column(int i) { return i; }
  FUSED_RNN_DEVICE static float operand(float v) { return v; }
};

using Bf16Product = HalfProduct<bf16, NumberKind::bf16>;
using F16Product = HalfProduct<f16, NumberKind::f16>;

}  // namespace fused_rnn::cuda
