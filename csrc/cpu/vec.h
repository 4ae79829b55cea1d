// SIMD vectors by the compiler's vector extension: one source for SSE2, AVX2, AVX-512 and NEON. Included by every ISA's
// translation unit inside its own namespace FUSED_RNN_ISA with FUSED_RNN_VECTOR_BYTES set. Nothing here may be an inline
// function shared between translation units: the linker would keep one copy, compiled for one ISA, for all.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace FUSED_RNN_ISA {

constexpr int kVectorBytes = FUSED_RNN_VECTOR_BYTES;

template <class Scalar>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
};
template <class Scalar>
using Vec = typename VectorOf<Scalar>::V;
using Vf = Vec<float>;
using Vd = Vec<double>;
template <class Scalar>
constexpr int kLanes = kVectorBytes / int(sizeof(Scalar));

// 16-bit storage types; arithmetic is always in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint16_t Half16V __attribute__((vector_size(kVectorBytes / 2)));

template <class Scalar>
static ALWAYS_INLINE Vec<Scalar> splat(Scalar s) {
  return s - Vec<Scalar>{};  // x - 0, not x + 0: keeps -0
}

// N vectors that take every operation side by side: an activation is a chain of some twenty dependent operations, and a processor
// sees too few of them at once to keep its arithmetic busy with one chain alone.
template <class Scalar, int N>
struct Pack {
  Vec<Scalar> v[N];
};
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPack = 4;  // vectors that go through a cell side by side: what 32 registers hold
#else
constexpr int kPack = 2;
#endif
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class S, int N, class F>
static ALWAYS_INLINE Pack<S, N> each(F function) {
  Pack<S, N> out;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) out.v[i] = function(i);
  return out;
}
#define FUSED_RNN_PACK_OPERATOR(op) \
  template <class S, int N> \
  static ALWAYS_INLINE Pack<S, N> operator op(const Pack<S, N>& a, const Pack<S, N>& b) { \
    return each<S, N>([&](int i) { return a.v[i] op b.v[i]; }); \
  } \
  template <class S, int N> \
  static ALWAYS_INLINE Pack<S, N> operator op(const Pack<S, N>& a, S b) { \
    return each<S, N>([&](int i) { return a.v[i] op b; }); \
  } \
  template <class S, int N> \
  static ALWAYS_INLINE Pack<S, N> operator op(S a, const Pack<S, N>& b) { \
    return each<S, N>([&](int i) { return a op b.v[i]; }); \
  }
FUSED_RNN_PACK_OPERATOR(+)
FUSED_RNN_PACK_OPERATOR(-)
FUSED_RNN_PACK_OPERATOR(*)
FUSED_RNN_PACK_OPERATOR(/)
#undef FUSED_RNN_PACK_OPERATOR
template <class S, int N>
static ALWAYS_INLINE Pack<S, N> operator-(const Pack<S, N>& a) {
  return each<S, N>([&](int i) { return -a.v[i]; });
}

// See cells/math.h.
template <class S, int N>
static ALWAYS_INLINE Pack<S, N> rounded_product(const Pack<S, N>& product) {
  return each<S, N>([&](int i) {
    Vec<S> v = product.v[i];
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
  });
}

// ---- loads and stores of one vector's worth of elements of storage type T, as accumulation type A ----
static ALWAYS_INLINE Vf load(const float* p) { return *(const VectorOf<float>::Unaligned*)p; }
static ALWAYS_INLINE Vd load(const double* p) { return *(const VectorOf<double>::Unaligned*)p; }
static ALWAYS_INLINE void store(float* p, Vf v) { *(VectorOf<float>::Unaligned*)p = v; }
static ALWAYS_INLINE void store(double* p, Vd v) { *(VectorOf<double>::Unaligned*)p = v; }

static ALWAYS_INLINE Vf load(const int8_t* p) {
#if defined(__AVX512F__) && FUSED_RNN_VECTOR_BYTES == 64
  return (Vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && FUSED_RNN_VECTOR_BYTES == 32
  return (Vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  VectorOf<float>::I wide;
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = p[i];
  return __builtin_convertvector(wide, Vf);
#endif
}
static ALWAYS_INLINE Vf load(const bf16* p) {
  const Half16V h = *(const Half16*)p;
  return (Vf)(__builtin_convertvector(h, VectorOf<float>::U) << 16);
}
static ALWAYS_INLINE void store(bf16* p, Vf v) {
#if defined(__AVX512BF16__) && FUSED_RNN_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const VectorOf<float>::U u = (VectorOf<float>::U)v;
  const VectorOf<float>::U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const VectorOf<float>::U nan = (VectorOf<float>::U)(v != v);                // rounding must not turn a NaN into infinity
  const VectorOf<float>::U out = (rounded & ~nan) | (((u >> 16) | 0x40u) & nan);
  *(Half16*)p = __builtin_convertvector(out, Half16V);
#endif
}

static ALWAYS_INLINE float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, em = h.bits & 0x7fffu;
  uint32_t bits;
  if (em >= 0x7c00u) {
    bits = sign | 0x7f800000u | (em & 0x3ffu) << 13;
  } else if (em >= 0x400u) {
    bits = sign | ((em + 0x1c000u) << 13);
  } else {  // subnormal: em * 2^-24, exact in float
    const float f = float(em) * 0x1p-24f;
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static ALWAYS_INLINE f16 from_float(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more: infinity
  if (u < 0x38800000u) {                                    // subnormal in half precision: let float addition round
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return {uint16_t(sign | (u - 0x3f000000u))};
  }
  u += 0xc8000fffu + (u >> 13 & 1u);
  return {uint16_t(sign | u >> 13)};
}
static ALWAYS_INLINE Vf load(const f16* p) {
#if defined(__AVX512F__) && FUSED_RNN_VECTOR_BYTES == 64
  return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && FUSED_RNN_VECTOR_BYTES == 32
  return (Vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (Vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  Vf v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
static ALWAYS_INLINE void store(f16* p, Vf v) {
#if defined(__AVX512F__) && FUSED_RNN_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && FUSED_RNN_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_float(v[i]);
#endif
}

// The accumulation type of a storage type, and the vector its elements are computed in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// One element.
static ALWAYS_INLINE float scalar(float x) { return x; }
static ALWAYS_INLINE double scalar(double x) { return x; }
static ALWAYS_INLINE float scalar(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static ALWAYS_INLINE float scalar(f16 x) { return to_float(x); }

// The first n elements only (the ragged end of a row); absent ones read as zero.
template <class T>
static ALWAYS_INLINE Vec<Acc<T>> load(const T* p, int n) {
  constexpr int L = kLanes<Acc<T>>;
  if (__builtin_expect(n >= L, 1)) return load(p);
  T tmp[L] = {};
  for (int i = 0; i < n; ++i) tmp[i] = p[i];
  return load(tmp);
}
template <class T>
static ALWAYS_INLINE void store(T* p, Vec<Acc<T>> v, int n) {
  constexpr int L = kLanes<Acc<T>>;
  if (__builtin_expect(n >= L, 1)) return store(p, v);
  T tmp[L];
  store(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}

// The first n lanes of v, zeros behind them.
template <class S>
static ALWAYS_INLINE Vec<S> first_lanes(Vec<S> v, int n) {
  typename VectorOf<S>::I lane;
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = i;
  return lane < n ? v : Vec<S>{};
}

// v as storage type T would hold it.
template <class T>
static ALWAYS_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return v;
  } else {
    T tmp[kLanes<Acc<T>>];
    store(tmp, v);
    return load(tmp);
  }
}

// ---- shuffles, for transposes and horizontal sums ----
template <class V, class I>
static ALWAYS_INLINE V interleave(V a, V b, bool high) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  I m;
  for (int i = 0; i < L; ++i) m[i] = (i / 2 + (high ? L / 2 : 0)) + (i & 1 ? L : 0);
  return __builtin_shuffle(a, b, m);
}
template <class V, class I>
static ALWAYS_INLINE V pair_sums(V a, V b) {  // a0+a1, a2+a3, .., b0+b1, ..
  constexpr int L = sizeof(V) / sizeof(a[0]);
  I even, odd;
  for (int i = 0; i < L; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Transpose an L x L block held in L vectors (L = lanes of V): log2 L rounds of interleaving rows i and i + L/2.
template <class Scalar>
static ALWAYS_INLINE void transpose(Vec<Scalar> (&r)[kLanes<Scalar>]) {
  using I = typename VectorOf<Scalar>::I;
  constexpr int L = kLanes<Scalar>;
  Vec<Scalar> t[L];
#pragma GCC unroll 4
  for (int n = 1; n < L; n *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = interleave<Vec<Scalar>, I>(r[i], r[i + L / 2], false);
      t[2 * i + 1] = interleave<Vec<Scalar>, I>(r[i], r[i + L / 2], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = t[i];
  }
}

// The horizontal sums of n vectors, of which `many` are not zero, as one vector.
template <class Scalar, int many = kLanes<Scalar>, int n = kLanes<Scalar>>
static ALWAYS_INLINE Vec<Scalar> sums(Vec<Scalar> (&r)[kLanes<Scalar>]) {
  if constexpr (n == 1) {
    return r[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < (many + 1) / 2; ++i)
      r[i] = pair_sums<Vec<Scalar>, typename VectorOf<Scalar>::I>(r[2 * i], many > 2 * i + 1 ? r[2 * i + 1] : Vec<Scalar>{});
    return sums<Scalar, (many + 1) / 2, n / 2>(r);
  }
}
// The sum of a vector's lanes, in every lane: what sums() has of it.
template <class Scalar, int n = 1>
static ALWAYS_INLINE Vec<Scalar> sum_of(Vec<Scalar> v) {
  if constexpr (n == kLanes<Scalar>) {
    return v;
  } else {
    typename VectorOf<Scalar>::I other;
    for (int i = 0; i < kLanes<Scalar>; ++i) other[i] = i ^ n;
    return sum_of<Scalar, 2 * n>(v + __builtin_shuffle(v, other));
  }
}

}  // namespace FUSED_RNN_ISA
