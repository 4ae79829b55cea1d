// The GPU's math policies for csrc/cells. NaN in, NaN out.
#pragma once
#include "../../cells/math.h"
#include "platform.h"

namespace fused_rnn::cuda {

// ---- what differs between the GPU and the emulator: single instructions

FUSED_RNN_DEVICE float exp2_approx(float x) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::flushed(std::exp2(x));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

FUSED_RNN_DEVICE float reciprocal_approx(float x) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::flushed(1.0f / x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

FUSED_RNN_DEVICE float tanh_approx(float x) {
#if defined(FUSED_RNN_EMULATE)
  return std::isinf(x) ? std::copysign(1.0f, x) : emulator::off_by_11_bits(std::tanh(x));
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

FUSED_RNN_DEVICE float multiply_add(float a, float b, float c) {
#if defined(FUSED_RNN_EMULATE)
  return std::fma(a, b, c);
#else
  return __fmaf_rn(a, b, c);
#endif
}

// ---- the policies

// For results that are stored in 16 bits: one instruction of about 11 bits a tanh, and so a sigmoid.
struct Fast : Operations<float> {
  static FUSED_RNN_DEVICE float exp(float x) { return exp2_approx(1.44269504f * x); }
  static FUSED_RNN_DEVICE float tanh(float x) { return tanh_approx(x); }
  static FUSED_RNN_DEVICE float sigmoid(float x) { return multiply_add(0.5f, tanh_approx(0.5f * x), 0.5f); }
};

// For float32: a few ulp, also relative to results near 0.
struct Exact : Operations<float> {
  // 1 / (1 + exp(-x)). For large -x the product with log2(e) needs more bits than a float has: `rest` is what it lost.
  static FUSED_RNN_DEVICE float sigmoid(float x) {
    constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596299e-8f, kLn2 = 0.693147181f;
    // Beyond, the result is 0, what is subnormal being flushed, or 1; a product with an infinity would be NaN.
    const float z = x < -88.0f ? 88.0f : x > 88.0f ? -88.0f : -x;
    const float power = z * kLog2e;
    const float rest = multiply_add(z, kLog2eRest, multiply_add(z, kLog2e, -power));
    const float e = exp2_approx(power);
    return reciprocal_approx(1.0f + multiply_add(e, rest * kLn2, e));
  }

  // Near 0 an odd polynomial (largest relative error 0.05 ulp before rounding), else 1 - 2 / (1 + exp(2 |x|)).
  static FUSED_RNN_DEVICE float tanh(float x) {
    const float z = x < 0 ? -x : x, y = x * x;
    float q = -5.8951024e-3f;
    q = multiply_add(q, y, 2.0795926e-2f);
    q = multiply_add(q, y, -5.3783782e-2f);
    q = multiply_add(q, y, 1.3331924e-1f);
    q = multiply_add(q, y, -3.3333300e-1f);
    const float near = multiply_add(q * y, x, x);
    const float far = multiply_add(-2.0f, reciprocal_approx(1.0f + exp2_approx(2.88539008f * z)), 1.0f);
    return z < 0.6f ? near : x < 0 ? -far : far;
  }
};

}  // namespace fused_rnn::cuda
