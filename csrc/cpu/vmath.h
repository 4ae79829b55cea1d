// The CPU's math policy: branch-free polynomials over whole vectors. Largest errors (tests/test_activations.py measures them):
// sigmoid 2.5 ulp, tanh 1.5 ulp, as torch's own to the digit on average; NaN in, NaN out.
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, and expm1(r) = r + w with a small w. From s = 2^n, r and w:
//   sigmoid(x) = 1 / (1 + exp(-x)),   exp = s (1 + r + w)
//   tanh(x)    = e / (e + 2),         e = expm1(2x) = s (r + w) + (s - 1), kept as a sum of two numbers: rounded to one, the
//                error of e alone would be twice that of the whole function in torch
#pragma once
#include "../cells/math.h"
#include "vec.h"

namespace FUSED_RNN_ISA {

// Clamps through which a NaN passes: the x86 instructions return their second operand where either is NaN.
template <class Scalar>
static ALWAYS_INLINE Vec<Scalar> at_least(Scalar low, Vec<Scalar> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar) == 4) return (Vec<Scalar>)_mm512_max_ps((__m512)splat(low), (__m512)x);
  else return (Vec<Scalar>)_mm512_max_pd((__m512d)splat(low), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(Scalar) == 4) return (Vec<Scalar>)_mm256_max_ps((__m256)splat(low), (__m256)x);
  else return (Vec<Scalar>)_mm256_max_pd((__m256d)splat(low), (__m256d)x);
#else
  return splat(low) > x ? splat(low) : x;
#endif
}
template <class Scalar>
static ALWAYS_INLINE Vec<Scalar> at_most(Scalar high, Vec<Scalar> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar) == 4) return (Vec<Scalar>)_mm512_min_ps((__m512)splat(high), (__m512)x);
  else return (Vec<Scalar>)_mm512_min_pd((__m512d)splat(high), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(Scalar) == 4) return (Vec<Scalar>)_mm256_min_ps((__m256)splat(high), (__m256)x);
  else return (Vec<Scalar>)_mm256_min_pd((__m256d)splat(high), (__m256d)x);
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

// 1 / b for 1 <= b < 2^126 to about 1 ulp. The 512-bit divider is busy 16 cycles a vector, about as long as the rest of an activation
// is on the two arithmetic ports; sigmoid divides, tanh comes here, and the two share the load.
static ALWAYS_INLINE Vf reciprocal(Vf b) {
#if defined(__AVX512F__)
  const Vf guess = (Vf)_mm512_rcp14_ps((__m512)b);
  return guess + guess * (1.0f - b * guess);
#else
  return 1.0f / b;
#endif
}
static ALWAYS_INLINE Vd reciprocal(Vd b) { return 1.0 / b; }

static ALWAYS_INLINE void expm1_parts(Vf x, Vf& r, Vf& w, Vf& s) {
  using I = VectorOf<float>::I;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const Vf t = x * 1.44269504088896341f + magic;
  const Vf n = t - magic;
  const Vf high = x + n * -0.693145751953125f;  // ln 2 in two parts; the first has few bits, so n times it is exact
  r = high + n * -1.42860682030941723212e-6f;
  Vf q = splat(1.9841270e-4f);  // 1/7!, 1/6!, .. 1/2!
  q = q * r + 1.3888889e-3f;
  q = q * r + 8.3333337e-3f;
  q = q * r + 4.1666668e-2f;
  q = q * r + 1.6666667e-1f;
  q = q * r + 0.5f;
  w = (q * r) * r + ((high - r) + n * -1.42860682030941723212e-6f);  // the second term: what rounding r has lost
  s = (Vf)(((I)t - 0x4B400000 + 127) << 23);
}

static ALWAYS_INLINE void expm1_parts(Vd x, Vd& r, Vd& w, Vd& s) {
  using I = VectorOf<double>::I;
  const double magic = 0x1.8p52;
  const Vd t = x * 1.4426950408889634074 + magic;
  const Vd n = t - magic;
  const Vd high = x + n * -0x1.62e42feep-1;  // 33 bits of ln 2, then the rest
  r = high + n * -0x1.a39ef35793c76p-33;
  Vd q = splat(1.0 / 6227020800.0);  // 1/13!, 1/12!, .. 1/2!
  q = q * r + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  w = (q * r) * r + ((high - r) + n * -0x1.a39ef35793c76p-33);
  s = (Vd)(((I)t - 0x4338000000000000ll + 1023) << 52);
}

template <class Scalar>
struct Polynomial {
  using V = Vec<Scalar>;
  static constexpr Scalar one = 1;
  static constexpr bool wide = sizeof(Scalar) == 8;
  static ALWAYS_INLINE V sigmoid(V x) {
    V r, w, s;
    expm1_parts(at_most<Scalar>(wide ? 708 : 87, at_least<Scalar>(wide ? -708 : -87, -x)), r, w, s);
    return one / (one + ((r + w) * s + s));
  }
  static ALWAYS_INLINE V tanh(V x) {
    V r, w, s;
    const V z = at_most<Scalar>(wide ? 20 : 9.1, at_least<Scalar>(wide ? -20 : -9.1, x));  // tanh is 1 to the last bit there
    expm1_parts(z + z, r, w, s);
    const V big = r * s + (s - one), small = w * s + (r * s + ((s - one) - big));
    const V e = big + small, e_low = (big - e) + small;
    const V d = e + Scalar(2), d_low = (e - (d - Scalar(2))) + e_low;
    const V inverse = reciprocal(d), q = e * inverse;
    return q + inverse * ((e - q * d) + (e_low - q * d_low));
  }
  static ALWAYS_INLINE V relu(V x) { return x < V{} ? V{} : x; }
  static ALWAYS_INLINE V positive(V a, V b) { return a > V{} ? b : V{}; }
};

}  // namespace FUSED_RNN_ISA
