// The functions that a program may call beside those of vmath.h, over whole vectors. In float polynomials, of a few ulp; in double, and
// for powers, the C library lane by lane. NaN and infinities as torch has them. A denormal counts as zero (layout.h, FlushDenormals).
//
// No sum here has two products to choose from: what a compiler fuses must not depend on how many vectors go together.
#pragma once
#include "vmath.h"

namespace FUSED_RNN_ISA {

template <class S>
using Mask = typename VectorOf<S>::I;

template <class S>
static ALWAYS_INLINE Vec<S> magnitude(Vec<S> x) {
  return (Vec<S>)((Mask<S>)x & ~(Mask<S>)splat(S(-0.0)));
}
template <class S>
static ALWAYS_INLINE Vec<S> with_sign(Vec<S> x, Vec<S> sign) {
  return (Vec<S>)((Mask<S>)x | ((Mask<S>)sign & (Mask<S>)splat(S(-0.0))));
}
template <class S>
static ALWAYS_INLINE Vec<S> one_where(Mask<S> mask) {
  return mask ? splat(S(1)) : Vec<S>{};
}
static ALWAYS_INLINE Vf square_root(Vf x) {
#if defined(__AVX512F__)
  return (Vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Vf)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Vf)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
static ALWAYS_INLINE Vd square_root(Vd x) {
#if defined(__AVX512F__)
  return (Vd)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Vd)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (Vd)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__)
  return (Vd)vsqrtq_f64((float64x2_t)x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// A function of the C library, lane by lane.
template <class S, class F>
static ALWAYS_INLINE Vec<S> by_lane(Vec<S> x, F function) {
  Vec<S> out;
  for (int i = 0; i < kLanes<S>; ++i) out[i] = function(x[i]);
  return out;
}
template <class S, int N, class F>
static ALWAYS_INLINE Pack<S, N> by_lanes(const Pack<S, N>& x, F function) {
  Pack<S, N> out;
  for (int e = 0; e < N; ++e) out.v[e] = by_lane<S>(x.v[e], function);
  return out;
}

// exp(x) = 2^n (1 + v): n, and v = expm1 of what is left of x, |x - n ln 2| <= ln 2 / 2.
template <int N>
static ALWAYS_INLINE Pack<float, N> expm1_rest(const Pack<float, N>& x, Pack<float, N>& n) {
  using P = Pack<float, N>;
  const float magic = 0x1.8p23f;
  n = x * 1.44269504088896341f + magic - magic;
  const P r = (x + n * -0.693145751953125f) + n * -1.42860682030941723212e-6f;
  P q = r * 1.9875691500e-4f + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  return r + (r * r) * q;
}
static ALWAYS_INLINE Vf power_of(Vf n) { return power_of_two(n + 0x1.8p23f); }

template <int N>
static ALWAYS_INLINE Pack<float, N> exp_of(const Pack<float, N>& x) {
  Pack<float, N> n;
  const Pack<float, N> v = expm1_rest(at_most(89.0f, at_least(-104.0f, x)), n);
  return each<float, N>([&](int i) {  // in two steps: 2^128 and 2^-150 are no numbers
    const Vf half = n.v[i] * 0.5f + 0x1.8p23f - 0x1.8p23f;
    return (1.0f + v.v[i]) * power_of(half) * power_of(n.v[i] - half);
  });
}
template <int N>
static ALWAYS_INLINE Pack<float, N> expm1_of(const Pack<float, N>& x) {
  Pack<float, N> n;
  const Pack<float, N> v = expm1_rest(at_most(89.0f, at_least(-40.0f, x)), n);
  return each<float, N>([&](int i) {
    const Vf s = power_of(n.v[i] - 1.0f);
    const Vf y = 2.0f * (s * v.v[i] + (s - 0.5f));
    return x.v[i] == 0.0f ? x.v[i] : y;
  });
}

// log(x), x > 0 and finite: x = 2^e (1 + f), f from sqrt(1/2) - 1 to sqrt(2) - 1.
static ALWAYS_INLINE Vf finite_log(Vf x) {
  using I = VectorOf<float>::I;
  const I bits = (I)x - 0x3f3504f3;  // of sqrt(1/2)
  const Vf e = __builtin_convertvector(bits >> 23, Vf);
  const Vf f = (Vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vf z = f * f;
  Vf q = f * 7.0376836292e-2f + -1.1514610310e-1f;
  q = q * f + 1.1676998740e-1f;
  q = q * f + -1.2420140846e-1f;
  q = q * f + 1.4249322787e-1f;
  q = q * f + -1.6668057665e-1f;
  q = q * f + 2.0000714765e-1f;
  q = q * f + -2.4999993993e-1f;
  q = q * f + 3.3333331174e-1f;
  const Vf y = rounded_product(Pack<float, 1>{{z * (f * q + -0.5f)}}).v[0];
  return f + (e * -2.12194440e-4f + y) + e * 0.693359375f;
}
static ALWAYS_INLINE Vf log_of(Vf x) {
  const float infinity = __builtin_inff();
  const Vf y = finite_log(x);
  const Vf at_ends = x == 0.0f ? splat(-infinity) : x < 0.0f ? splat(__builtin_nanf("")) : x;  // infinity and NaN stay
  return (x > 0.0f) & (x < infinity) ? y : at_ends;
}
static ALWAYS_INLINE Vf log1p_of(Vf x) {
  const Vf u = 1.0f + x;
  const Vf y = log_of(u);
  const Vf lost = (x - (u - 1.0f)) / u;  // what the sum's rounding has left out
  return (u > 0.0f) & (u < __builtin_inff()) ? (x == 0.0f ? x : y + lost) : y;
}

// After N. Juffa: within 1 ulp.
template <int N>
static ALWAYS_INLINE Pack<float, N> erf_of(const Pack<float, N>& x) {
  using P = Pack<float, N>;
  const P t = each<float, N>([&](int i) { return at_most(4.5f, magnitude<float>(x.v[i])); });
  const P s = t * t;
  P far = t * -1.72853470e-5f + 3.83197126e-4f;
  const P u = t * -3.88396438e-3f + 2.42546219e-2f;
  far = far * s + u;
  far = far * t + -1.06777877e-1f;
  far = far * t + -6.34846687e-1f;
  far = far * t + -1.28717512e-1f;
  far = far * t - t;
  far = 1.0f - exp_of(far);
  P near = s * -5.96761703e-4f + 4.99119423e-3f;
  near = near * s + -2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s + -3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * t + t;
  return each<float, N>([&](int i) { return with_sign<float>(t.v[i] > 0.927734375f ? far.v[i] : near.v[i], x.v[i]); });
}

// sin(x), or cos(x) = sin(x + pi / 2): x less a multiple of pi / 2, in double; then one of two polynomials.
static ALWAYS_INLINE Vf wave(Vf x, int quarter) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  using I = VectorOf<float>::I;
  Half half[2], turned[2], turns[2];
  memcpy(half, &x, sizeof(x));
  for (int i = 0; i < 2; ++i) {
    const Vd wide = __builtin_convertvector(half[i], Vd);
    const Vd n = wide * 0.63661977236758134308 + 0x1.8p52 - 0x1.8p52;
    const Vd r = (wide + n * -0x1.921fb544p0) + n * -0x1.0b4611a626331p-34;
    turned[i] = __builtin_convertvector(r, Half);
    turns[i] = __builtin_convertvector(n, Half);
  }
  Vf r, n;
  memcpy(&r, turned, sizeof(r));
  memcpy(&n, turns, sizeof(n));
  const Vf z = r * r;
  Vf sine = z * 2.718311493989822e-6f + -1.984008743e-4f;
  sine = sine * z + 8.333331876e-3f;
  sine = sine * z + -1.666666716e-1f;
  sine = (sine * z) * r + r;
  Vf cosine = z * 2.443315711809948e-5f + -1.388731625493765e-3f;
  cosine = cosine * z + 4.166664568298827e-2f;
  cosine = (cosine * z + -0.5f) * z + 1.0f;
  const I turn = __builtin_convertvector(n, I) + quarter;
  const Vf y = (turn & 1) != 0 ? cosine : sine;
  return (Vf)((I)y ^ (turn & 2) << 30);
}
constexpr float kFarAngle = 1 << 22;  // beyond, the C library: the quarter turns no longer fit a float
static __attribute__((noinline)) void far_wave(const Vf& x, int quarter, Vf& y) {
  for (int i = 0; i < kLanes<float>; ++i)
    if (!(__builtin_fabsf(x[i]) < kFarAngle)) y[i] = quarter ? __builtin_cosf(x[i]) : __builtin_sinf(x[i]);
}
static ALWAYS_INLINE Vf sine_of(Vf x, int quarter) {
  const VectorOf<float>::I near = magnitude<float>(x) < kFarAngle;
  Vf y = wave(near ? x : Vf{}, quarter);
  if (!quarter) y = x == 0.0f ? x : y;
  bool all = true;
  for (int i = 0; i < kLanes<float>; ++i) all &= near[i] != 0;
  if (!all) far_wave(x, quarter, y);
  return y;
}

// What a program calls, on packs: each name is a function of program.h.
template <class S, int N>
struct Functions {
  using P = Pack<S, N>;
  using V = Vec<S>;
  template <class F>
  static ALWAYS_INLINE P map(F f) {
    return each<S, N>(f);
  }
  static constexpr bool kFloat = sizeof(S) == 4;

  static ALWAYS_INLINE P copy(const P& x) { return x; }
  static ALWAYS_INLINE P neg(const P& x) { return -x; }
  static ALWAYS_INLINE P abs(const P& x) {
    return map([&](int i) { return magnitude<S>(x.v[i]); });
  }
  static ALWAYS_INLINE P sign(const P& x) {
    return map([&](int i) { return one_where<S>(x.v[i] > S(0)) - one_where<S>(x.v[i] < S(0)); });
  }
  static ALWAYS_INLINE P sqrt(const P& x) {
    return map([&](int i) { return square_root(x.v[i]); });
  }
  static ALWAYS_INLINE P rsqrt(const P& x) {
    return map([&](int i) { return S(1) / square_root(x.v[i]); });
  }
  static ALWAYS_INLINE P reciprocal(const P& x) { return S(1) / x; }
  static ALWAYS_INLINE P sigmoid(const P& x) { return sigmoid_of(x); }
  static ALWAYS_INLINE P tanh(const P& x) { return tanh_of(x); }
  static ALWAYS_INLINE P relu(const P& x) { return Polynomial<S, N>::relu(x); }

#define FUSED_RNN_ONE(name, in_float, builtin) \
  static ALWAYS_INLINE P name(const P& x) { \
    if constexpr (kFloat) return in_float; \
    else return by_lanes(x, [](S value) __attribute__((always_inline)) { return S(builtin(value)); }); \
  }
  FUSED_RNN_ONE(exp, exp_of(x), __builtin_exp)
  FUSED_RNN_ONE(expm1, expm1_of(x), __builtin_expm1)
  FUSED_RNN_ONE(log, map([&](int i) { return log_of(x.v[i]); }), __builtin_log)
  FUSED_RNN_ONE(log1p, map([&](int i) { return log1p_of(x.v[i]); }), __builtin_log1p)
  FUSED_RNN_ONE(erf, erf_of(x), __builtin_erf)
  FUSED_RNN_ONE(sin, map([&](int i) { return sine_of(x.v[i], 0); }), __builtin_sin)
  FUSED_RNN_ONE(cos, map([&](int i) { return sine_of(x.v[i], 1); }), __builtin_cos)
#undef FUSED_RNN_ONE
  static ALWAYS_INLINE P softplus(const P& x) {
    const P soft = log1p(exp(x));
    return map([&](int i) { return x.v[i] > S(40) ? x.v[i] : soft.v[i]; });
  }

  static ALWAYS_INLINE P add(const P& a, const P& b) { return a + b; }
  static ALWAYS_INLINE P sub(const P& a, const P& b) { return a - b; }
  static ALWAYS_INLINE P mul(const P& a, const P& b) { return a * b; }
  static ALWAYS_INLINE P div(const P& a, const P& b) { return a / b; }
  static ALWAYS_INLINE P maximum(const P& a, const P& b) {
    return map([&](int i) { return (a.v[i] > b.v[i]) | (a.v[i] != a.v[i]) ? a.v[i] : b.v[i]; });
  }
  static ALWAYS_INLINE P minimum(const P& a, const P& b) {
    return map([&](int i) { return (a.v[i] < b.v[i]) | (a.v[i] != a.v[i]) ? a.v[i] : b.v[i]; });
  }
  static ALWAYS_INLINE P pow(const P& a, const P& b) {
    P out;
    for (int e = 0; e < N; ++e)
      for (int i = 0; i < kLanes<S>; ++i)
        out.v[e][i] = kFloat ? S(__builtin_powf(float(a.v[e][i]), float(b.v[e][i]))) : S(__builtin_pow(a.v[e][i], b.v[e][i]));
    return out;
  }
#define FUSED_RNN_COMPARISON(name, condition) \
  static ALWAYS_INLINE P name(const P& a, const P& b) { \
    return map([&](int i) { return one_where<S>(condition); }); \
  }
  FUSED_RNN_COMPARISON(lt, a.v[i] < b.v[i])
  FUSED_RNN_COMPARISON(le, a.v[i] <= b.v[i])
  FUSED_RNN_COMPARISON(gt, a.v[i] > b.v[i])
  FUSED_RNN_COMPARISON(ge, a.v[i] >= b.v[i])
  FUSED_RNN_COMPARISON(eq, a.v[i] == b.v[i])
  FUSED_RNN_COMPARISON(ne, a.v[i] != b.v[i])
  FUSED_RNN_COMPARISON(both, (a.v[i] != S(0)) & (b.v[i] != S(0)))
  FUSED_RNN_COMPARISON(either, (a.v[i] != S(0)) | (b.v[i] != S(0)))
#undef FUSED_RNN_COMPARISON
  static ALWAYS_INLINE P sigmoid_backward(const P& d, const P& s) { return d * (s * (S(1) - s)); }
  static ALWAYS_INLINE P tanh_backward(const P& d, const P& t) { return d * (S(1) - t * t); }
  static ALWAYS_INLINE P relu_backward(const P& d, const P& h) { return Polynomial<S, N>::relu_gradient(h, d); }

  static ALWAYS_INLINE P where(const P& c, const P& a, const P& b) {
    return map([&](int i) { return c.v[i] != S(0) ? a.v[i] : b.v[i]; });
  }
  static ALWAYS_INLINE P fma(const P& a, const P& b, const P& c) { return a * b + c; }
  static ALWAYS_INLINE P mul_sub(const P& a, const P& b, const P& c) { return a * b - c; }
  static ALWAYS_INLINE P sub_mul(const P& a, const P& b, const P& c) { return c - a * b; }
  static ALWAYS_INLINE P mul_mul(const P& a, const P& b, const P& c) { return a * b * c; }
  static ALWAYS_INLINE P add_add(const P& a, const P& b, const P& c) { return a + b + c; }
  static ALWAYS_INLINE P add_mul(const P& a, const P& b, const P& c) { return (a + b) * c; }
  static ALWAYS_INLINE P less_mul(const P& a, const P& b, const P& c) { return (a - b) * c; }
};

}  // namespace FUSED_RNN_ISA
