// Tensor-core products, in the fragment layouts of the PTX manual ("Matrix fragments for mma").
//
// With group = lane / 4 and member = lane % 4, a lane holds
//   a  of m16n8k16  rows group, group + 8 (registers 0, 2 and 1, 3); columns 2 member + {0, 1}, the same + 8 (registers
//   2, 3) b               column group; rows 2 member + {0, 1}, the same + 8 (register 1) a  of m16n8k8   rows group,
//   group + 8 (registers 0, 2 and 1, 3); columns member, member + 4 b               column group; rows member, member +
//   4 d  of both      rows group, group + 8; columns 2 member + {0, 1}
#pragma once
#include "async.h"
#include "numbers.h"

namespace fused_rnn::emulator {

struct MmaArguments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Half a row of eight: g++ keeps a vector of this size in a register whatever it compiles for and however little it optimises.
using Half = float __attribute__((vector_size(16), may_alias));

// a[row][k] b[k][column], of a whole warp
template <int kDepth>
struct Tile {
  float a[16][kDepth];
  alignas(16) float b[kDepth][8];
};

FUSED_RNN_EMULATOR_INLINE const MmaArguments& mma_arguments(const Warp& warp, int lane) {
  return *static_cast<const MmaArguments*>(warp.arguments[lane]);
}

template <class Number>
FUSED_RNN_EMULATOR_RAW inline void gather(const Warp& warp, Tile<16>& tile) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaArguments& m = mma_arguments(warp, lane);
    const int group = lane / 4, member = lane % 4;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        tile.a[group + r % 2 * 8][2 * member + r / 2 * 8 + half] = Number::to_float(uint16_t(m.a[r] >> (16 * half)));
      for (int r = 0; r < 2; ++r) tile.b[2 * member + r * 8 + half][group] = Number::to_float(uint16_t(m.b[r] >> (16 * half)));
    }
  }
}

FUSED_RNN_EMULATOR_RAW inline void gather_tf32(const Warp& warp, Tile<8>& tile) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaArguments& m = mma_arguments(warp, lane);
    const int group = lane / 4, member = lane % 4;
    for (int r = 0; r < 4; ++r) tile.a[group + r % 2 * 8][member + r / 2 * 4] = tf32_to_float(m.a[r]);
    for (int r = 0; r < 2; ++r) tile.b[member + r * 4][group] = tf32_to_float(m.b[r]);
  }
}

template <int kDepth>
FUSED_RNN_EMULATOR_RAW inline void multiply(const Warp& warp, const Tile<kDepth>& tile) {
  for (int row = 0; row < 16; ++row) {
    Half left = {}, right = {};
    for (int k = 0; k < kDepth; ++k) {
      const Half* b = reinterpret_cast<const Half*>(tile.b[k]);
      left += tile.a[row][k] * b[0];
      right += tile.a[row][k] * b[1];
    }
    for (int pair = 0; pair < 4; ++pair) {
      float* d = mma_arguments(warp, row % 8 * 4 + pair).d + row / 8 * 2;
      const Half& sum = pair < 2 ? left : right;
      d[0] += sum[pair % 2 * 2];
      d[1] += sum[pair % 2 * 2 + 1];
    }
  }
}

struct Bf16 {
  static constexpr const char* kName = "mma of bf16";
  static FUSED_RNN_EMULATOR_INLINE float to_float(uint16_t bits) { return bf16_to_float(bits); }
};
struct F16 {
  static constexpr const char* kName = "mma of f16";
  static FUSED_RNN_EMULATOR_INLINE float to_float(uint16_t bits) { return f16_to_float(bits); }
};

template <class Number>
inline void mma16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  check_whole_warp(Number::kName);
  MmaArguments arguments{d, a, b};
  collective(Number::kName, &arguments, [](Warp& warp) FUSED_RNN_EMULATOR_RAW {
    Tile<16> tile;
    gather<Number>(warp, tile);
    multiply(warp, tile);
  });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  check_whole_warp("mma_tf32");
  MmaArguments arguments{d, a, b};
  collective("mma_tf32", &arguments, [](Warp& warp) FUSED_RNN_EMULATOR_RAW {
    Tile<8> tile;
    gather_tf32(warp, tile);
    multiply(warp, tile);
  });
}

}  // namespace fused_rnn::emulator
