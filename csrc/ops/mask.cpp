// Random masks, which the loops' regularisers read: a tensor of two numbers, drawn by Philox4x32-10 (Salmon et al. 2011) from a key that
// torch's generator made. torch's own Bernoulli numbers cost several times as much on a CPU, and may cost more than the layer.
#include <algorithm>

#include "tensors.h"

namespace fused_rnn::ops {
namespace {

// AVX-512 multiplies the halves of 64 bits at once; below it the plain code is as good as any.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSED_RNN_CLONES __attribute__((target_clones("arch=x86-64-v4", "default")))
#else
#define FUSED_RNN_CLONES
#endif

constexpr int kSide = 16;          // counters side by side
constexpr int kBlock = 4 * kSide;  // numbers that they make
constexpr int kBlocks = 16;        // at a time: they stay in L1
typedef uint32_t Side __attribute__((vector_size(4 * kSide)));
typedef uint64_t Half __attribute__((vector_size(4 * kSide)));

// The products by m, 64 bits each: what lies above 32 bits, and the rest.
inline __attribute__((always_inline)) void multiply(uint32_t m, const Side& a, Side& high, Side& low) {
  constexpr uint64_t mask = 0xFFFFFFFFu;
  const Half even = ((Half)a & mask) * uint64_t(m), odd = ((Half)a >> 32) * uint64_t(m);
  low = (Side)((even & mask) | (odd << 32));
  high = (Side)((even >> 32) | (odd & ~mask));
}

// The numbers of so many blocks of a key, from block `first` on.
FUSED_RNN_CLONES void philox(uint64_t key, uint64_t stream, uint64_t first, int blocks, uint32_t* out) {
  Side lane;
  for (int i = 0; i < kSide; ++i) lane[i] = uint32_t(i);
  for (uint64_t block = first; block < first + uint64_t(blocks); ++block, out += kBlock) {
    const uint64_t counter = block * kSide;  // a block's counters differ in the lowest four bits alone
    Side a = lane + uint32_t(counter), b = Side{} + uint32_t(counter >> 32), c = Side{} + uint32_t(stream),
         d = Side{} + uint32_t(stream >> 32);
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      Side x_high, x_low, y_high, y_low;
      multiply(0xD2511F53u, a, x_high, x_low);
      multiply(0xCD9E8D57u, c, y_high, y_low);
      a = y_high ^ b ^ k0, b = y_low;
      c = x_high ^ d ^ k1, d = x_low;
    }
    memcpy(out, &a, sizeof(a)), memcpy(out + kSide, &b, sizeof(b));
    memcpy(out + 2 * kSide, &c, sizeof(c)), memcpy(out + 3 * kSide, &d, sizeof(d));
  }
}

// Of so many numbers which are below the bound: `low` there, else `high`.
template <class T>
inline __attribute__((always_inline)) void choose(const uint32_t* numbers, uint32_t bound, T low, T high, T* to, int n) {
  for (int k = 0; k < n; ++k) to[k] = numbers[k] < bound ? low : high;
}
FUSED_RNN_CLONES void chosen(const uint32_t* numbers, uint32_t bound, float low, float high, float* to, int n) {
  choose(numbers, bound, low, high, to, n);
}
FUSED_RNN_CLONES void chosen(const uint32_t* numbers, uint32_t bound, double low, double high, double* to, int n) {
  choose(numbers, bound, low, high, to, n);
}
FUSED_RNN_CLONES void chosen(const uint32_t* numbers, uint32_t bound, uint16_t low, uint16_t high, uint16_t* to, int n) {
  choose(numbers, bound, low, high, to, n);
}

template <class T>
void fill(uint64_t key, uint64_t stream, double p, T low, T high, T* to, int64_t n) {
  if (p >= 1) return std::fill(to, to + n, low);
  const auto bound = uint32_t(p * 4294967296.0);
  uint32_t numbers[kBlocks * kBlock];
  for (int64_t i = 0; i < n; i += kBlocks * kBlock) {
    const int left = int(std::min<int64_t>(n - i, kBlocks * kBlock));
    philox(key, stream, uint64_t(i / kBlock), (left + kBlock - 1) / kBlock, numbers);
    chosen(numbers, bound, low, high, to + i, left);
  }
}

// Each number is `low` with probability p, else `high`. like: for shape and dtype. seed: [1] int64. stream: of several masks of a seed
// which.
Tensor mask(Tensor seed, Tensor like, double p, double low, double high, int64_t stream) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.is_cpu() && seed.numel() == 1, "fused_rnn: seed must be one int64 number");
  STD_TORCH_CHECK(like.is_cpu(), "fused_rnn: like must be a tensor on the cpu");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "fused_rnn: p is ", p, ", expected a probability");
  const Tensor out = empty(like, sizes_of(like));
  const auto key = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
  void* const data = out.mutable_data_ptr();
  const int64_t n = out.numel();
  switch (dtype_of(like)) {
    case Dtype::f32: fill(key, uint64_t(stream), p, float(low), float(high), static_cast<float*>(data), n); break;
    case Dtype::f64: fill(key, uint64_t(stream), p, low, high, static_cast<double*>(data), n); break;
    default: {  // 16 bits: the two numbers as they are rounded
      const float both[2] = {float(low), float(high)};
      uint16_t bits[2];
      cpu::kernels().convert(Dtype::f32, dtype_of(like), both, bits, 2);
      fill(key, uint64_t(stream), p, bits[0], bits[1], static_cast<uint16_t*>(data), n);
    }
  }
  return out;
}

}  // namespace
}  // namespace fused_rnn::ops

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("mask", TORCH_BOX(&fused_rnn::ops::mask)); }
