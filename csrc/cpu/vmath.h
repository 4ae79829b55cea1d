// The CPU's math policy: branch-free polynomials over whole vectors. Largest errors (tests/cpu/test_activations.py measures them):
// sigmoid 2.4 ulp, tanh 1.4 ulp, as torch's own to the digit on average; NaN in, NaN out.
//
// exp(k x) = 2^n exp(k r), n = round(k x / ln 2), |k r| <= ln 2 / 2. From s = 2^n and v = expm1(k r):
//   1 + exp(k x) = (s + 1) + s v: one rounding, since s + 1 is exact wherever the 1 matters
//
//   sigmoid(x)   = 1 / (1 + exp(-x)): exp must not overflow. Where a FlushDenormals flushes
//                  denormal numbers (layout.h), it is 0 from -88 on
//
//   tanh(|x|)    = 1 - 2 / (1 + exp(2 |x|)) from |x| = 0.55 on, an odd polynomial below
//
// In double, tanh(x) = e / (e + 2) with e = expm1(2x) kept as a sum of two numbers: rounded to one, the error of e alone would be
// twice that of the whole function in torch.
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

// 2^n, for the integer n that adding `magic` has left in the low bits of t.
static ALWAYS_INLINE Vf power_of_two(Vf t) { return (Vf)(((VectorOf<float>::I)t - 0x4B400000 + 127) << 23); }
static ALWAYS_INLINE Vd power_of_two(Vd t) { return (Vd)(((VectorOf<double>::I)t - 0x4338000000000000ll + 1023) << 52); }

// The same for packs, vector by vector.
template <class S, int N>
static ALWAYS_INLINE Pack<S, N> at_least(S low, const Pack<S, N>& x) {
  return each<S, N>([&](int i) { return at_least<S>(low, x.v[i]); });
}
template <class S, int N>
static ALWAYS_INLINE Pack<S, N> at_most(S high, const Pack<S, N>& x) {
  return each<S, N>([&](int i) { return at_most<S>(high, x.v[i]); });
}
template <int N>
static ALWAYS_INLINE Pack<float, N> reciprocal(const Pack<float, N>& b) {
  return each<float, N>([&](int i) { return reciprocal(b.v[i]); });
}
template <class S, int N>
static ALWAYS_INLINE Pack<S, N> power_of_two(const Pack<S, N>& t) {
  return each<S, N>([&](int i) { return power_of_two(t.v[i]); });
}

// 1 + exp(k x), k one of -1, 2.
template <int k, int N>
static ALWAYS_INLINE Pack<float, N> one_plus_exp(const Pack<float, N>& x) {
  using P = Pack<float, N>;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const P t = x * (k * 1.44269504088896341f) + magic;
  const P n = t - magic;
  // ln 2 in two parts; the first has few bits, so n times it is exact
  const P r = (x + n * (-0.693145751953125f / k)) + n * (-1.42860682030941723212e-6f / k);
  P q = r * (k * k * k * k * k * k * 1.395054045e-3f) + k * k * k * k * k * 8.368918672e-3f;  // minimax: error 3e-9 of v
  q = q * r + k * k * k * k * 4.166620597e-2f;
  q = q * r + k * k * k * 1.666651815e-1f;
  q = q * r + k * k * 0.5f;
  q = q * r + float(k);
  const P s = power_of_two(t);
  return s * (q * r) + (s + 1.0f);
}

template <int N>
static ALWAYS_INLINE void expm1_parts(const Pack<double, N>& x, Pack<double, N>& r, Pack<double, N>& w, Pack<double, N>& s) {
  using P = Pack<double, N>;
  const double magic = 0x1.8p52;
  const P t = x * 1.4426950408889634074 + magic;
  const P n = t - magic;
  const P high = x + n * -0x1.62e42feep-1;  // 33 bits of ln 2, then the rest
  r = high + n * -0x1.a39ef35793c76p-33;
  P q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;  // 1/13!, 1/12!, .. 1/2!
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
  s = power_of_two(t);
}

template <int N>
static ALWAYS_INLINE Pack<float, N> sigmoid_of(const Pack<float, N>& x) {
  return 1.0f / one_plus_exp<-1>(at_most(88.0f, at_least(-88.0f, x)));
}
template <int N>
static ALWAYS_INLINE Pack<double, N> sigmoid_of(const Pack<double, N>& x) {
  Pack<double, N> r, w, s;
  expm1_parts(at_most(709.0, at_least(-709.0, -x)), r, w, s);
  return 1.0 / (1.0 + ((r + w) * s + s));
}

template <int N>
static ALWAYS_INLINE Pack<float, N> tanh_of(const Pack<float, N>& x) {
  using P = Pack<float, N>;
  using I = VectorOf<float>::I;
  const P a = each<float, N>([&](int i) { return (Vf)((I)x.v[i] & 0x7fffffff); });
  const P square = a * a;
  P q = square * -6.282450166e-3f + 2.107774280e-2f;  // minimax on |x| <= 0.55: error 2e-9
  q = q * square + -5.385385454e-2f;
  q = q * square + 1.333260238e-1f;
  q = q * square + -3.333331943e-1f;
  const P low = a + a * (q * square);
  const P inverse = reciprocal(one_plus_exp<2>(at_most(9.1f, a)));  // tanh is 1 to the last bit there
  return each<float, N>([&](int i) {
    const Vf size = a.v[i] < 0.55f ? low.v[i] : 1.0f - 2.0f * inverse.v[i];
    return (Vf)((I)size | ((I)x.v[i] & int32_t(0x80000000u)));
  });
}
template <int N>
static ALWAYS_INLINE Pack<double, N> tanh_of(const Pack<double, N>& x) {
  using P = Pack<double, N>;
  P r, w, s;
  const P z = at_most(20.0, at_least(-20.0, x));
  expm1_parts(z + z, r, w, s);
  const P big = r * s + (s - 1.0), small = w * s + (r * s + ((s - 1.0) - big));
  const P e = big + small, e_low = (big - e) + small;
  const P d = e + 2.0, d_low = (e - (d - 2.0)) + e_low;
  const P inverse = 1.0 / d, q = e * inverse;
  return q + inverse * ((e - q * d) + (e_low - q * d_low));
}

template <class Scalar, int N>
struct Polynomial {
  using P = Pack<Scalar, N>;
  static constexpr Scalar one = 1;
  static ALWAYS_INLINE P sigmoid(const P& x) { return sigmoid_of(x); }
  static ALWAYS_INLINE P tanh(const P& x) { return tanh_of(x); }
  static ALWAYS_INLINE P relu(const P& x) {
    return each<Scalar, N>([&](int i) { return x.v[i] < Vec<Scalar>{} ? Vec<Scalar>{} : x.v[i]; });
  }
  static ALWAYS_INLINE P relu_gradient(const P& h, const P& dh) {
    return each<Scalar, N>([&](int i) { return h.v[i] <= Vec<Scalar>{} ? Vec<Scalar>{} : dh.v[i]; });
  }
};

}  // namespace FUSED_RNN_ISA
