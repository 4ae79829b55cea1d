// 16-bit numbers and TF32, in bits: rounding to the nearest even number (TF32: ties away from zero), NaN stays NaN.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "context.h"

namespace fused_rnn::emulator {

FUSED_RNN_EMULATOR_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
FUSED_RNN_EMULATOR_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

FUSED_RNN_EMULATOR_INLINE float bf16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

FUSED_RNN_EMULATOR_INLINE uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t u = bits_of(x);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

FUSED_RNN_EMULATOR_INLINE float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  constexpr uint32_t kInfinity = 0x1fu << 23;  // f16's exponent of infinity and NaN, in float's place
  if (rest >= kInfinity) return float_of(sign | rest | 0x7f800000);
  return float_of(sign | bits_of(float_of(rest) * 0x1p112f));  // the product puts the exponent right, subnormals included
}

FUSED_RNN_EMULATOR_INLINE uint16_t float_to_f16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  const float a = std::fabs(x);
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a < 0x1p-14f) return sign | uint16_t(std::nearbyint(a * 0x1p24f));  // subnormal: multiples of 2^-24
  const uint32_t u = bits_of(a);
  return sign | uint16_t((u + 0xfff + (u >> 13 & 1) - (112u << 23)) >> 13);
}

FUSED_RNN_EMULATOR_INLINE uint32_t float_to_tf32(float x) {
  if (std::isnan(x)) return 0x7fffffff;
  if (std::isinf(x)) return bits_of(x);
  return (bits_of(x) + 0x1000) & ~0x1fffu;
}

// What a tensor core reads of a register that holds a TF32: it ignores the low bits, whatever they are.
FUSED_RNN_EMULATOR_INLINE float tf32_to_float(uint32_t bits) { return float_of(bits & ~0x1fffu); }

// As an instruction with .ftz leaves it.
FUSED_RNN_EMULATOR_INLINE float flushed(float x) { return x < FLT_MIN && x > -FLT_MIN ? 0.0f * x : x; }

// As far from the true result as the hardware's tanh may be, 2^-11 of it, to one side or the other, but never beyond 1.
FUSED_RNN_EMULATOR_INLINE float off_by_11_bits(float x) {
  const uint32_t scattered = bits_of(x) * 2654435761u;
  const float off = x * (scattered >> 31 ? 1 + 0x1p-11f : 1 - 0x1p-11f);
  return off > 1 ? 1.0f : off < -1 ? -1.0f : off;
}

}  // namespace fused_rnn::emulator
