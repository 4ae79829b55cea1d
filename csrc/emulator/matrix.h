// Tensor-core products and ldmatrix, in the fragment layouts of the PTX manual ("Matrix fragments for mma").
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

// a[row][k] b[k][column], of a whole warp
template <int kDepth>
struct Tile {
  float a[16][kDepth], b[kDepth][8];
};

inline const MmaArguments& mma_arguments(const Warp& warp, int lane) {
  return *static_cast<const MmaArguments*>(warp.arguments[lane]);
}

template <float (*kToFloat)(uint16_t)>
inline void gather(const Warp& warp, Tile<16>& tile) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaArguments& m = mma_arguments(warp, lane);
    const int group = lane / 4, member = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r)
        tile.a[group + r % 2 * 8][2 * member + r / 2 * 8 + half] = kToFloat(uint16_t(m.a[r] >> (16 * half)));
      for (int r = 0; r < 2; ++r) tile.b[2 * member + r * 8 + half][group] = kToFloat(uint16_t(m.b[r] >> (16 * half)));
    }
  }
}

inline void gather_tf32(const Warp& warp, Tile<8>& tile) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const MmaArguments& m = mma_arguments(warp, lane);
    const int group = lane / 4, member = lane % 4;
    for (int r = 0; r < 4; ++r) tile.a[group + r % 2 * 8][member + r / 2 * 4] = tf32_to_float(m.a[r]);
    for (int r = 0; r < 2; ++r) tile.b[member + r * 4][group] = tf32_to_float(m.b[r]);
  }
}

template <int kDepth>
inline void multiply(const Warp& warp, const Tile<kDepth>& tile) {
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < 8; ++column) sum[column] += tile.a[row][k] * tile.b[k][column];
    for (int column = 0; column < 8; ++column) {
      const int lane = row % 8 * 4 + column / 2;
      mma_arguments(warp, lane).d[row / 8 * 2 + column % 2] += sum[column];
    }
  }
}

template <float (*kToFloat)(uint16_t)>
inline void mma16(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  check_whole_warp(name);
  MmaArguments arguments{d, a, b};
  collective(name, &arguments, [](Warp& warp) {
    Tile<16> tile;
    gather<kToFloat>(warp, tile);
    multiply(warp, tile);
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma16<bf16_to_float>("mma of bf16", d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma16<f16_to_float>("mma of f16", d, a, b);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  check_whole_warp("mma_tf32");
  MmaArguments arguments{d, a, b};
  collective("mma_tf32", &arguments, [](Warp& warp) {
    Tile<8> tile;
    gather_tf32(warp, tile);
    multiply(warp, tile);
  });
}

// ---- ldmatrix: lane 8 i + r brings the address of row r of matrix i, and receives two neighbours of row lane / 4 of
// each matrix

struct LoadArguments {
  uint32_t* registers;
  const void* row;
};

template <int kMatrices>
inline void ldmatrix(uint32_t (&registers)[kMatrices], const void* row) {
  static constexpr const char* kName = kMatrices == 4 ? "ldmatrix_x4" : "ldmatrix_x2";
  {
    Inside guard;
    check_whole_warp(kName);
    if (machine.current->lane < 8 * kMatrices) {  // the other lanes' addresses are ignored
      check_shared(kName, row, kCopyBytes, kCopyBytes);
      races::read(row, kCopyBytes);
    }
  }
  LoadArguments arguments{registers, row};
  collective(kName, &arguments, [](Warp& warp) {
    for (int matrix = 0; matrix < kMatrices; ++matrix)
      for (int lane = 0; lane < kWarp; ++lane) {
        const auto& source = *static_cast<const LoadArguments*>(warp.arguments[8 * matrix + lane / 4]);
        const auto& target = *static_cast<const LoadArguments*>(warp.arguments[lane]);
        std::memcpy(&target.registers[matrix], static_cast<const char*>(source.row) + 4 * (lane % 4), 4);
      }
  });
}

}  // namespace fused_rnn::emulator
