// Math policies: what a cell's formula calls for its activations.
//
// A policy M works on a number type N (a scalar, or a whole SIMD vector) and offers
//   M::one                      the constant 1 of N's element type
//   M::sigmoid(N), M::tanh(N)
//   M::relu(N)                  max(x, 0); NaN stays NaN
//   M::relu_gradient(N h, N dh)  dh, but 0 where h = relu(x) <= 0; as in torch, dh passes where h is NaN
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

template <class Scalar>
struct Libm {
  static constexpr Scalar one = 1;
  static FUSED_RNN_HD Scalar sigmoid(Scalar x) { return one / (one + std::exp(-x)); }
  static FUSED_RNN_HD Scalar tanh(Scalar x) { return std::tanh(x); }
  static FUSED_RNN_HD Scalar relu(Scalar x) { return x < 0 ? Scalar(0) : x; }
  static FUSED_RNN_HD Scalar relu_gradient(Scalar h, Scalar dh) { return h <= 0 ? Scalar(0) : dh; }
};

}  // namespace fused_rnn
