// Storage types of 16 bits, and TF32. Rounding is to the nearest even number; a NaN stays a NaN.
#pragma once
#include "platform.h"

namespace fused_rnn::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FUSED_RNN_DEVICE float to_float(float x) { return x; }

FUSED_RNN_DEVICE float to_float(bf16 x) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::bf16_to_float(x.bits);
#else
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#endif
}

FUSED_RNN_DEVICE float to_float(f16 x) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::f16_to_float(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

template <class T>
FUSED_RNN_DEVICE T from_float(float x);

template <>
FUSED_RNN_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
FUSED_RNN_DEVICE bf16 from_float<bf16>(float x) {
#if defined(FUSED_RNN_EMULATE)
  return {emulator::float_to_bf16(x)};
#else
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

template <>
FUSED_RNN_DEVICE f16 from_float<f16>(float x) {
#if defined(FUSED_RNN_EMULATE)
  return {emulator::float_to_f16(x)};
#else
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

// Two numbers in one register, `low` in the lower half: one instruction instead of three.
template <class T>
FUSED_RNN_DEVICE uint32_t pack(float low, float high);

template <>
FUSED_RNN_DEVICE uint32_t pack<bf16>(float low, float high) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::float_to_bf16(low) | uint32_t(emulator::float_to_bf16(high)) << 16;
#else
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}

template <>
FUSED_RNN_DEVICE uint32_t pack<f16>(float low, float high) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::float_to_f16(low) | uint32_t(emulator::float_to_f16(high)) << 16;
#else
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}

// The operand of mma_tf32: 11 significant bits, ties away from zero, as torch and cuBLAS round.
FUSED_RNN_DEVICE uint32_t to_tf32(float x) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::float_to_tf32(x);
#else
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fused_rnn::cuda
