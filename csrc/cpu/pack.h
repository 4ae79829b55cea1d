// Packing a weight matrix into the panels that gemm.h reads: [panel][k / k_group][vector][lane][k_group], zero where the
// matrix ends. Done once a call; the pages are kept (team.h, scratch).
#pragma once
#include "gemm.h"

namespace FUSED_RNN_ISA {

// A vector of columns taken from rows of src: column l is src[l, :], first <= l < n <= lanes.
template <class Kind, class T>
static __attribute__((noinline)) void pack_rows(typename Kind::Operand* dst, int vectors, int v, const T* src, int64_t ld, int n, int64_t k,
                                                int first = 0) {
  using S = typename Kind::Accumulator;
  constexpr int L = kKindLanes<Kind>, KG = Kind::k_group;
  const int64_t k_end = round_up(k, Kind::k_multiple), step = int64_t(vectors) * L * KG;
  typename Kind::Operand* d = dst + int64_t(v) * L * KG;
  for (int64_t k0 = 0; k0 < k_end; k0 += L * KG) {
    Vec<S> r[L];
    const int left = int(k - k0 < L * KG ? (k - k0 < 0 ? 0 : k - k0) : L * KG);
    for (int l = 0; l < L; ++l) {
      if (l < first || l >= n || left == 0) r[l] = Vec<S>{};
      else r[l] = load_row<Kind>(src + l * ld + k0, left);
    }
    transpose<S>(r);
    const int64_t count = (k_end - k0 < L * KG ? k_end - k0 : L * KG) / KG;
    if (count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) *(Vec<S>*)(d + i * step) = r[i];
    } else {
      for (int64_t i = 0; i < count; ++i) *(Vec<S>*)(d + i * step) = r[i];
    }
    d += L * step;
  }
}

// n elements of two rows side by side, as the 16-bit kinds want them; a null row is zero.
template <class T>
static ALWAYS_INLINE Vf pairs(const T* first, const T* second, int n) {
  using U = VectorOf<float>::U;
  const auto widened = [n](const T* row) __attribute__((always_inline)) {
    Half16V half{};
    if (row && __builtin_expect(n >= kLanes<float>, 1)) memcpy(&half, (const void*)row, sizeof(half));
    else if (row) memcpy(&half, (const void*)row, size_t(n) * 2);
    return __builtin_convertvector(half, U);
  };
  return (Vf)(widened(first) | widened(second) << 16);
}

// A vector of columns that are columns of src already: src[:, lane..n), n <= lanes. From row `first` on, and then those before it.
template <class Kind, class T>
static __attribute__((noinline)) void pack_columns(typename Kind::Operand* dst, int vectors, int v, const T* src, int64_t ld, int n,
                                                   int64_t k, int64_t first = 0, int lane = 0) {
  using S = typename Kind::Accumulator;
  constexpr int L = kKindLanes<Kind>, KG = Kind::k_group;
  T shifted[2][L] = {};  // rows of which the first lanes are zero
  const int64_t k_end = round_up(k, Kind::k_multiple), step = int64_t(vectors) * L * KG;
  typename Kind::Operand* d = dst + int64_t(v) * L * KG;
  const auto row = [&](int64_t i) -> const T* {
    if (i >= k) return nullptr;
    const T* const from = src + (i < k - first ? i + first : i + first - k) * ld;
    if (lane == 0) return from;
    memcpy((void*)(shifted[i & 1] + lane), (const void*)(from + lane), size_t(n - lane) * sizeof(T));
    return shifted[i & 1];
  };
  for (int64_t k0 = 0; k0 < k_end; k0 += KG, d += step) {
    if constexpr (KG == 1) *(Vec<S>*)d = k0 < k ? load(row(k0), n) : Vec<S>{};
    else *(Vec<S>*)d = pairs(row(k0), row(k0 + 1), n);
  }
}

// n elements of T as operands, zero up to `padded`.
template <class Operand, class T>
static ALWAYS_INLINE void convert_row(Operand* dst, const T* src, int64_t n, int64_t padded) {
  if constexpr (sizeof(Operand) == sizeof(T)) {
    memcpy((void*)dst, (const void*)src, size_t(n) * sizeof(T));
  } else {
    constexpr int L = kLanes<Acc<T>>;
    for (int64_t i = 0; i < n; i += L) store(dst + i, load(src + i, int(n - i < L ? n - i : L)), int(n - i < L ? n - i : L));
  }
  memset((void*)(dst + n), 0, size_t(padded - n) * sizeof(Operand));
}

}  // namespace FUSED_RNN_ISA
