// Each primitive against its plain meaning.
#include <cfloat>
#include "cuda/primitives/activations.h"
#include "cuda/primitives/barrier.h"
#include "cuda/primitives/copy.h"
#include "cuda/primitives/flags.h"
#include "cuda/primitives/mma.h"
#include "cuda/primitives/types.h"
#include "harness.h"

using namespace fused_rnn::cuda;
using harness::Buffer;
using harness::launch;
using harness::Shape;

namespace {

FUSED_RNN_DEVICE int lane() { return int(threadIdx.x % 32); }

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

// ---- numbers

// The value of a 16-bit number, by the definition of the format.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class T>
struct Widen {
  static FUSED_RNN_DEVICE void body(float* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = to_float(T{uint16_t(i)});
  }
};

template <class T>
struct Narrow {
  static FUSED_RNN_DEVICE void body(const float* in, uint16_t* out, uint32_t* pairs) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = from_float<T>(in[i]).bits;
    pairs[i] = pack<T>(in[i], in[i ^ 1]);
  }
};

template <class T>
void check_numbers(int exponent_bits) {
  Buffer<float> wide(1 << 16);
  launch<Widen<T>>({256, 256}, 0, wide.data());
  for (int i = 0; i < 1 << 16; ++i) {
    const double expected = value_of(uint16_t(i), exponent_bits);
    REQUIRE(std::isnan(expected) ? std::isnan(wide[i]) : wide[i] == expected, i);
  }

  const uint32_t infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  Buffer<float> in(1 << 16);
  std::mt19937 random(1);
  for (uint32_t i = 0; i < 1 << 16; ++i) {
    // neighbours' midpoints (ties), a little to both sides of them, and anything at all
    const uint16_t magnitude = uint16_t(i % infinity);
    const double middle = (value_of(magnitude, exponent_bits) + value_of(magnitude + (magnitude + 1u < infinity), exponent_bits)) / 2;
    in[i] = i % 4 == 3 ? float_of(random()) : float(middle * (1 + (int(i % 4) - 1) * 0x1p-20) * (i & 64 ? -1 : 1));
  }
  Buffer<uint16_t> out(in.size());
  Buffer<uint32_t> pairs(in.size());
  launch<Narrow<T>>({256, 256}, 0, in.data(), out.data(), pairs.data());
  for (size_t i = 0; i < in.size(); ++i) {
    REQUIRE(pairs[i] == (out[i] | uint32_t(out[i ^ 1]) << 16), i);
    const uint16_t magnitude = out[i] & 0x7fff;
    if (std::isnan(in[i])) {
      REQUIRE(magnitude > infinity, i);
      continue;
    }
    REQUIRE(magnitude <= infinity && (out[i] >> 15) == (bits_of(in[i]) >> 31), i);
    // the nearest: no neighbour is nearer, and one that is as near has an odd last bit
    const double x = std::fabs(double(in[i]));
    auto value = [&](uint32_t m) {
      return m == infinity ? 2 * value_of(uint16_t(m - 1), exponent_bits) - value_of(uint16_t(m - 2), exponent_bits)
                           : value_of(uint16_t(m), exponent_bits);
    };
    if (magnitude == infinity) {
      REQUIRE(x - value(infinity - 1) >= (value(infinity) - value(infinity - 1)) / 2, i, in[i]);
      continue;
    }
    const double error = std::fabs(value(magnitude) - x);
    for (uint32_t other : {magnitude + 1u, magnitude - 1u}) {
      if (other > infinity) continue;  // below 0
      const double other_error = std::fabs(value(other) - x);
      REQUIRE(error < other_error || (error == other_error && magnitude % 2 == 0), i, in[i]);
    }
  }
}

TEST(bf16_numbers) { check_numbers<bf16>(8); }
TEST(f16_numbers) { check_numbers<f16>(5); }

struct ToTf32 {
  static FUSED_RNN_DEVICE void body(const float* in, uint32_t* out) { out[threadIdx.x] = to_tf32(in[threadIdx.x]); }
};

TEST(tf32_rounds_ties_away) {
  const float cases[] = {1.0f, 1.0f + 0x1p-11f, 1.0f + 0x1p-12f, -1.0f - 0x1p-11f, 3.0f - 0x1p-22f, 0.0f, 1e-30f, INFINITY, NAN};
  const float expected[] = {
      1.0f, 1.0f + 0x1p-10f, 1.0f, -1.0f - 0x1p-10f, 3.0f, 0.0f, float_of((bits_of(1e-30f) + 0x1000) & ~0x1fffu), INFINITY, NAN};
  Buffer<float> in(32);
  Buffer<uint32_t> out(32);
  for (size_t i = 0; i < 9; ++i) in[i] = cases[i];
  launch<ToTf32>({1, 32}, 0, in.data(), out.data());
  for (size_t i = 0; i < 9; ++i) {
    const float read = float_of(out[i] & ~0x1fffu);  // the tensor core ignores the rest
    REQUIRE(std::isnan(expected[i]) ? std::isnan(read) : read == expected[i], i, read);
  }
}

// ---- products: the fragments are filled and read by the PTX manual's formulas, not by the emulator's

constexpr int kRows = 16, kColumns = 8;

// "groupID = laneid >> 2, threadID_in_group = laneid % 4", and the tables for m16n8k16 and m16n8k8
FUSED_RNN_DEVICE int d_row(int i) { return i < 2 ? lane() / 4 : lane() / 4 + 8; }
FUSED_RNN_DEVICE int d_column(int i) { return lane() % 4 * 2 + (i & 1); }
FUSED_RNN_DEVICE int a16_row(int i) { return (i < 2) || (i >= 4 && i < 6) ? lane() / 4 : lane() / 4 + 8; }
FUSED_RNN_DEVICE int a16_column(int i) { return i < 4 ? lane() % 4 * 2 + (i & 1) : lane() % 4 * 2 + (i & 1) + 8; }
FUSED_RNN_DEVICE int b16_row(int i) { return i < 2 ? lane() % 4 * 2 + (i & 1) : lane() % 4 * 2 + (i & 1) + 8; }
FUSED_RNN_DEVICE int a8_row(int i) { return i % 2 == 0 ? lane() / 4 : lane() / 4 + 8; }
FUSED_RNN_DEVICE int a8_column(int i) { return i < 2 ? lane() % 4 : lane() % 4 + 4; }
FUSED_RNN_DEVICE int b8_row(int i) { return i == 0 ? lane() % 4 : lane() % 4 + 4; }

// d [16, 8] += a [16, 16] b [16, 8], with d starting at 0.5
template <class T>
struct Product16 {
  static FUSED_RNN_DEVICE void body(const float* a, const float* b, float* d) {
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; ++r) {
      fa[r] = 0;
      for (int i = 2 * r; i < 2 * r + 2; ++i) fa[r] |= uint32_t(from_float<T>(a[a16_row(i) * 16 + a16_column(i)]).bits) << 16 * (i & 1);
    }
    for (int r = 0; r < 2; ++r) {
      fb[r] = 0;
      for (int i = 2 * r; i < 2 * r + 2; ++i) fb[r] |= uint32_t(from_float<T>(b[b16_row(i) * kColumns + lane() / 4]).bits) << 16 * (i & 1);
    }
    float fd[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    mma(fd, fa, fb, T{});
    for (int i = 0; i < 4; ++i) d[d_row(i) * kColumns + d_column(i)] = fd[i];
  }
};

struct Product8 {
  static FUSED_RNN_DEVICE void body(const float* a, const float* b, float* d) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fa[i] = to_tf32(a[a8_row(i) * 8 + a8_column(i)]);
    for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[b8_row(i) * kColumns + lane() / 4]);
    float fd[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    mma_tf32(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[d_row(i) * kColumns + d_column(i)] = fd[i];
  }
};

// Small integers, whose products and sums are exact in every format and order.
template <class Kernel>
void check_product(int depth) {
  Buffer<float> a(kRows * depth), b(depth * kColumns), d(kRows * kColumns);
  std::mt19937 random(2);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(random() % 31) - 15);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(random() % 31) - 15);
  for (int seed = 0; seed < harness::seeds; ++seed) {
    launch<Kernel>({1, 32}, seed, a.data(), b.data(), d.data());
    for (int row = 0; row < kRows; ++row)
      for (int column = 0; column < kColumns; ++column) {
        float expected = 0.5f;
        for (int k = 0; k < depth; ++k) expected += a[row * depth + k] * b[k * kColumns + column];
        REQUIRE(d[row * kColumns + column] == expected, row, column);
      }
  }
}

TEST(mma_bf16) { check_product<Product16<bf16>>(16); }
TEST(mma_f16) { check_product<Product16<f16>>(16); }
TEST(mma_tf32_product) { check_product<Product8>(8); }

// ---- copies

// Two groups under way; every third copy is not valid.
struct Copies {
  static FUSED_RNN_DEVICE void body(const uint4* in, uint4* out, int n) {
    const int t = int(threadIdx.x), threads = int(blockDim.x);
    uint4* buffer = shared_array<uint4>(0, 2 * threads);
    copy_async16(buffer + t, in + t, t % 3 != 0);
    copy_commit();
    for (int i = 0; i < n; ++i) {
      if (i + 1 < n) copy_async16(buffer + (i + 1) % 2 * threads + t, in + (i + 1) * threads + t, t % 3 != 0);
      copy_commit();
      copy_wait<1>();
      sync_threads();
      out[i * threads + t] = buffer[i % 2 * threads + (t + 1) % threads];  // a neighbour's
      sync_threads();
    }
  }
};

TEST(copies_arrive_or_are_zeros) {
  const int n = 5, threads = 96;
  Buffer<uint4> in(n * threads), out(n * threads);
  for (unsigned i = 0; i < in.size(); ++i) in[i] = {i, i + 1, i + 2, i + 3};
  for (int seed = 0; seed < harness::seeds; ++seed) {
    launch<Copies>({1, threads, 1, 2 * threads * 16}, seed, (const uint4*)in.data(), out.data(), n);
    for (unsigned i = 0; i < n; ++i)
      for (unsigned t = 0; t < threads; ++t) {
        const unsigned source = i * threads + (t + 1) % threads, x = (t + 1) % threads % 3 == 0 ? 0 : source;
        REQUIRE(out[i * threads + t].x == x && out[i * threads + t].w == (x ? source + 3 : 0), i, t);
      }
  }
}

// ---- clusters

// Each step every CTA tells every CTA of its cluster a number, by 16 bytes a thread; two buffers, two mbarriers.
struct ClusterSum {
  static FUSED_RNN_DEVICE void body(uint32_t* out, int steps) {
    if constexpr (kHasCluster) {
      const unsigned rank = cluster_rank(), size = gridDim.x / 2, threads = blockDim.x, t = threadIdx.x;
      uint4* buffer = shared_array<uint4>(0, int(2 * size * threads));
      uint64_t* barriers = shared_array<uint64_t>(int(2 * size * threads * 16) + kSharedGap, 2);
      if (t == 0)
        for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
      barrier_fence();
      cluster_arrive();
      cluster_wait();
      uint32_t mine = blockIdx.x + 1;
      for (int step = 0; step < steps; ++step) {
        uint4* now = buffer + step % 2 * size * threads;
        if (t == 0) barrier_expect(barriers + step % 2, int(size * threads * 16));
        for (unsigned peer = 0; peer < size; ++peer)
          store_async(remote(now + rank * threads + t, peer), remote(barriers + step % 2, peer), {mine, mine + t, t, 1});
        barrier_wait(barriers + step % 2, unsigned(step / 2 % 2));
        mine = 0;
        for (unsigned i = 0; i < size * threads; ++i) mine += now[i].x + now[i].z;
        sync_threads();
      }
      out[blockIdx.x * threads + t] = mine;
      cluster_arrive();
      cluster_wait();
    } else {
      out[blockIdx.x * blockDim.x + threadIdx.x] = 0;
    }
  }
};

TEST(stores_within_a_cluster) {
  if (!harness::has_cluster()) return;
  const int steps = 5;
  const unsigned threads = 8;
  for (unsigned size : {1u, 2u, 3u, 4u, 7u, 8u}) {
    std::vector<uint32_t> expected(2 * size);
    for (unsigned i = 0; i < 2 * size; ++i) expected[i] = i + 1;
    for (int step = 0; step < steps; ++step)
      for (unsigned cluster = 0; cluster < 2; ++cluster) {
        uint32_t sum = 0;
        for (unsigned i = 0; i < size; ++i) sum += threads * expected[cluster * size + i] + threads * (threads - 1) / 2;
        for (unsigned i = 0; i < size; ++i) expected[cluster * size + i] = sum;
      }
    for (int seed = 0; seed < 2 * harness::seeds; ++seed) {
      Buffer<uint32_t> out(2 * size * threads);
      launch<ClusterSum>({2 * size, threads, size, int(2 * size * threads * 16 + 16) + kSharedGap}, seed, out.data(), steps);
      for (unsigned i = 0; i < out.size(); ++i) REQUIRE(out[i] == expected[i / threads], size, seed, i);
    }
  }
}

// ---- flags

// Each step every CTA adds up what all CTAs have published; two buffers in global memory, one counter.
struct GridSum {
  static FUSED_RNN_DEVICE void body(uint4* exchanged, uint32_t* flag, uint32_t* out, int steps) {
    const unsigned ctas = gridDim.x, t = threadIdx.x;
    uint4* seen = shared_array<uint4>(0, int(ctas));
    uint32_t mine = blockIdx.x;
    for (int step = 0; step < steps; ++step) {
      uint4* now = exchanged + step % 2 * ctas;
      if (t == 0) store_global(now + blockIdx.x, {mine, 0, 0, 0});
      sync_threads();
      if (t == 0) {
        add_release(flag, 1);
        while (load_acquire(flag) < ctas * unsigned(step + 1)) pause();
      }
      sync_threads();
      if (t < ctas) copy_async16(seen + t, now + t, true);
      copy_commit();
      copy_wait<0>();
      sync_threads();
      mine = 0;
      for (unsigned i = 0; i < ctas; ++i) mine += seen[i].x + 1;
    }
    out[blockIdx.x * blockDim.x + t] = mine;
  }
};

TEST(flags_order_the_grid) {
  const int steps = 5;
  const unsigned ctas = 7, threads = 64;
  uint32_t expected = ctas * (ctas - 1) / 2 + ctas;
  for (int step = 1; step < steps; ++step) expected = ctas * (expected + 1);
  for (int seed = 0; seed < 2 * harness::seeds; ++seed) {
    Buffer<uint4> exchanged(2 * ctas);
    Buffer<uint32_t> flag(1), out(ctas * threads);
    launch<GridSum>({ctas, threads, 1, int(ctas) * 16, true}, seed, exchanged.data(), flag.data(), out.data(), steps);
    for (unsigned i = 0; i < out.size(); ++i) REQUIRE(out[i] == expected, seed, i, out[i]);
  }
}

// ---- activations

template <class Math>
struct Activations {
  static FUSED_RNN_DEVICE void body(const float* in, float* sigmoid, float* tanh, float* relu) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    sigmoid[i] = Math::sigmoid(in[i]);
    tanh[i] = Math::tanh(in[i]);
    relu[i] = Math::relu_gradient(in[i], Math::relu(in[i]));
  }
};

// Largest error relative to the result; where a sigmoid's bound is absolute, 1 stands for the result.
template <class Math>
void check_activations(double sigmoid_bound, bool sigmoid_relative, double tanh_bound) {
  const size_t n = 1 << 15;
  Buffer<float> in(n), sigmoid(n), tanh(n), relu(n);
  for (size_t i = 0; i < n; ++i) {
    const double size = std::exp2(-20 + 27.0 * double(i / 2) / double(n / 2));  // 1e-6 to 128, both signs
    in[i] = float(i % 2 ? -size : size);
  }
  in[0] = 0, in[1] = NAN, in[2] = INFINITY, in[3] = -INFINITY, in[4] = FLT_MAX, in[5] = -FLT_MAX;
  launch<Activations<Math>>({n / 256, 256}, 0, (const float*)in.data(), sigmoid.data(), tanh.data(), relu.data());
  double worst_sigmoid = 0, worst_tanh = 0;
  for (size_t i = 0; i < n; ++i) {
    const double x = in[i], s = 1 / (1 + std::exp(-x)), t = std::tanh(x);
    if (i == 1) {
      REQUIRE(std::isnan(sigmoid[i]) && std::isnan(tanh[i]) && std::isnan(relu[i]));
      continue;
    }
    REQUIRE(!std::isnan(sigmoid[i]) && !std::isnan(tanh[i]), x);
    REQUIRE(relu[i] == (x > 0 ? in[i] : 0.0f), i);
    if (x >= -87) worst_sigmoid = std::fmax(worst_sigmoid, std::fabs(sigmoid[i] - s) / (sigmoid_relative ? s : 1));
    else REQUIRE(sigmoid[i] >= 0 && sigmoid[i] < 1e-3, i);
    if (x == 0) REQUIRE(tanh[i] == 0);
    else worst_tanh = std::fmax(worst_tanh, std::fabs(tanh[i] - t) / std::fabs(t));
  }
  std::printf("        sigmoid 2^%.1f, tanh 2^%.1f\n", std::log2(worst_sigmoid), std::log2(worst_tanh));
  REQUIRE(worst_sigmoid <= sigmoid_bound, std::log2(worst_sigmoid));
  REQUIRE(worst_tanh <= tanh_bound, std::log2(worst_tanh));
}

TEST(exact_activations) { check_activations<Exact>(0x1p-21, true, 0x1p-21); }
TEST(fast_activations) { check_activations<Fast>(0x1p-11, false, 0x1p-10); }

}  // namespace

int main(int count, char** names) { return harness::run_all(count, names); }
