// Math policies: what a cell's formula calls for its activations.
//
// A policy M works on a number type N (a scalar, or a whole SIMD vector) and offers
//   M::one                      the constant 1 of N's element type
//   M::sigmoid(N), M::tanh(N)
//   M::relu(N)                  max(x, 0); NaN stays NaN
//   M::relu_gradient(N h, N dh)  dh, but 0 where h = relu(x) <= 0; as in torch, dh passes where h is NaN
//
// A user's cell, printed from its program, may call every one of `Operations`, on scalars.
//
// `Libm` is the plain scalar policy (the C library). The CPU backend brings its vector polynomials (cpu/vmath.h).
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define FUSED_RNN_HD __host__ __device__ __forceinline__
#else
#define FUSED_RNN_HD inline __attribute__((always_inline))
#endif

namespace fused_rnn {

// A product that is rounded by itself. Of a b + c d a compiler fuses one product with the sum, here this one and there the other, and
// the results would differ with the number of vectors that go through a cell together. The CPU's vectors bring their own.
template <class N>
static FUSED_RNN_HD N rounded_product(const N& product) {
  return product;
}

// The operations of fused_rnn/cells/program.py that are no operator of C++; sigmoid and tanh are a policy's own.
template <class Scalar>
struct Operations {
  static constexpr Scalar one = 1;
  // Rounded by itself, whatever sum reads it.
  static FUSED_RNN_HD Scalar product(Scalar a, Scalar b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Scalar) == sizeof(float)) return __fmul_rn(a, b);
    else return __dmul_rn(a, b);
#else
    Scalar made = a * b;
#if defined(__x86_64__)
    asm("" : "+x"(made));
#elif defined(__aarch64__)
    asm("" : "+w"(made));
#endif
    return made;
#endif
  }
  static FUSED_RNN_HD Scalar abs(Scalar x) { return std::abs(x); }
  static FUSED_RNN_HD Scalar sign(Scalar x) { return Scalar((x > 0) - (x < 0)); }
  static FUSED_RNN_HD Scalar exp(Scalar x) { return std::exp(x); }
  static FUSED_RNN_HD Scalar expm1(Scalar x) { return std::expm1(x); }
  static FUSED_RNN_HD Scalar log(Scalar x) { return std::log(x); }
  static FUSED_RNN_HD Scalar log1p(Scalar x) { return std::log1p(x); }
  static FUSED_RNN_HD Scalar sqrt(Scalar x) { return std::sqrt(x); }
  static FUSED_RNN_HD Scalar rsqrt(Scalar x) { return one / std::sqrt(x); }
  static FUSED_RNN_HD Scalar reciprocal(Scalar x) { return one / x; }
  static FUSED_RNN_HD Scalar relu(Scalar x) { return x < 0 ? Scalar(0) : x; }
  static FUSED_RNN_HD Scalar relu_gradient(Scalar h, Scalar dh) { return h <= 0 ? Scalar(0) : dh; }
  static FUSED_RNN_HD Scalar erf(Scalar x) { return std::erf(x); }
  static FUSED_RNN_HD Scalar sin(Scalar x) { return std::sin(x); }
  static FUSED_RNN_HD Scalar cos(Scalar x) { return std::cos(x); }
  static FUSED_RNN_HD Scalar softplus(Scalar x) { return x > 40 ? x : std::log1p(std::exp(x)); }
  static FUSED_RNN_HD Scalar maximum(Scalar a, Scalar b) { return a != a || a > b ? a : b; }
  static FUSED_RNN_HD Scalar minimum(Scalar a, Scalar b) { return a != a || a < b ? a : b; }
  static FUSED_RNN_HD Scalar pow(Scalar a, Scalar b) { return std::pow(a, b); }
};

template <class Scalar>
struct Libm : Operations<Scalar> {
  static FUSED_RNN_HD Scalar sigmoid(Scalar x) { return Scalar(1) / (Scalar(1) + std::exp(-x)); }
  static FUSED_RNN_HD Scalar tanh(Scalar x) { return std::tanh(x); }
};

}  // namespace fused_rnn
