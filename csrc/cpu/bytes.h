// Products of bytes: narrow weights against operands that are themselves brought to int8, a row at a time, each with a scale of its own.
// Sums of integers are exact, so neither their order nor the rows beside them show in the result.
#pragma once
#include <type_traits>

#include "gemm.h"

namespace FUSED_RNN_ISA {

// A row of k operands as bytes: its scale, minus 128 times its sum, and the bytes, zero up to a whole group. In floats.
struct ByteRow {
  float scale;
  int32_t offset;
  int8_t at[];
};
constexpr int64_t kByteRow = offsetof(ByteRow, at);
static ALWAYS_INLINE int64_t byte_stride(int64_t k) { return round_up(kByteRow + round_up(k, 4), 64) / int64_t(sizeof(float)); }

#if defined(__AVX512VNNI__)
struct Bytes : F32 {             // of four k one sum, by one instruction
  using Weight = uint8_t;        // 128 more than they are, times a scale for each column
  static constexpr int k_group = 4, k_multiple = 4;
};

using Integers = VectorOf<float>::I;

// All lanes of a vector by a function of two. (The compiler's own names for it warn.)
template <int n = 1, class V, class F>
static ALWAYS_INLINE V folded(V v, F function) {
  if constexpr (n == kLanes<float>) {
    return v;
  } else {
    Integers other;
    for (int i = 0; i < kLanes<float>; ++i) other[i] = i ^ n;
    return folded<2 * n>(function(v, __builtin_shuffle(v, other)), function);
  }
}

// As 127ths of the largest magnitude, to nearest. A row with what is not finite in it stands for nothing finite.
static __attribute__((noinline)) void row_to_bytes(const float* x, int64_t k, float* out) {
  constexpr int L = kLanes<float>;
  __m512 most = _mm512_setzero_ps(), poison = most;
  const auto part = [&](int64_t i) { return k - i < L ? __mmask16((1u << (k - i)) - 1) : __mmask16(-1); };
  for (int64_t i = 0; i < k; i += L) {
    const __m512 v = _mm512_maskz_loadu_ps(part(i), x + i);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
  }
  auto* const row = (ByteRow*)out;
  const float scale = folded((Vf)most, [](Vf a, Vf b) { return a > b ? a : b; })[0] / 127;
  const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += L) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(part(i), x + i), inverse));
    const __m512i bounded = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
    sum = _mm512_add_epi32(sum, bounded);
    _mm512_mask_cvtepi32_storeu_epi8(row->at + i, part(i), bounded);
  }
  memset(row->at + k, 0, size_t(round_up(k, 4) - k));
  row->scale = scale + sum_of<float>((Vf)poison)[0];
  row->offset = -128 * folded((Integers)sum, [](Integers a, Integers b) { return a + b; })[0];
}

constexpr int kByteRows = 48;     // of tiles that go through the same part of a panel one after the other
constexpr int64_t kByteBlock = 256;  // k of such a part: with the rows' and their sums it fits L1

// Part of a tile's sums: k from k0 to before k1. sums: [MR, NV, lanes], where they wait for the next part.
template <int MR, int NV, bool kAhead>
static __attribute__((noinline)) void bytes_tile(const TileArgs<Bytes>& t, int64_t k0, int64_t k1, int32_t* sums) {
  constexpr int L = kLanes<float>, KU = MR * NV >= 8 ? 1 : 8 / (MR * NV) > 4 ? 4 : 8 / (MR * NV);
  __m512i acc[KU][MR][NV];
  const int8_t* a[MR];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    const auto* const row = (const ByteRow*)(t.a + m * t.lda);
    a[m] = row->at;
#pragma GCC unroll 4
    for (int u = 0; u < KU; ++u)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[u][m][v] = u ? _mm512_setzero_si512() : k0 ? _mm512_loadu_si512(sums + (m * NV + v) * L) : _mm512_set1_epi32(row->offset);
  }
  const uint8_t* w = t.w + k0 * NV * L;
  const char* ahead = t.ahead + k0 * NV * L;
  const auto step = [&](int u, int64_t k) __attribute__((always_inline)) {
    __m512i wv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) wv[v] = _mm512_loadu_si512(w + (int64_t(u) * NV + v) * 64);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      int32_t four;
      memcpy(&four, a[m] + k + 4 * u, 4);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[u][m][v] = _mm512_dpbusd_epi32(acc[u][m][v], wv[v], _mm512_set1_epi32(four));
    }
  };
  int64_t k = k0;
  for (; k + 4 * KU <= round_up(k1, 4); k += 4 * KU, w += KU * NV * 64) {
    if constexpr (MR == 1) fetch_ahead<KU * NV * 64>(w);
    if constexpr (kAhead) {
#pragma GCC unroll 4
      for (int i = 0; i < KU * NV; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
      ahead += KU * NV * 64;
    }
#pragma GCC unroll 4
    for (int u = 0; u < KU; ++u) step(u, k);
  }
  for (; k < k1; k += 4, w += NV * 64) step(0, k);
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      __m512i sum = acc[0][m][v];
#pragma GCC unroll 4
      for (int u = 1; u < KU; ++u) sum = _mm512_add_epi32(sum, acc[u][m][v]);
      if (k1 < t.k) {
        _mm512_storeu_si512(sums + (m * NV + v) * L, sum);
        continue;
      }
      const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(t.scale + v * L), _mm512_set1_ps(((const ByteRow*)(t.a + m * t.lda))->scale));
      const __m512 init = _mm512_loadu_ps(t.init + m * t.ldi + v * L);
      _mm512_storeu_ps(t.c + m * t.ldc + v * L, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, init));
    }
}

template <int NV>
static ALWAYS_INLINE void bytes_rows(int rows, const TileArgs<Bytes>& t, int64_t k0, int64_t k1, int32_t* sums) {
  const auto tile = [&](auto count) __attribute__((always_inline)) {
    constexpr int MR = decltype(count)::value;
    if constexpr (NV == 4 && MR > 1)
      if (t.ahead) return bytes_tile<MR, NV, true>(t, k0, k1, sums);
    bytes_tile<MR, NV, false>(t, k0, k1, sums);
  };
  switch (rows) {
    case 1: return tile(std::integral_constant<int, 1>{});
    case 2: return tile(std::integral_constant<int, 2>{});
    case 3: return tile(std::integral_constant<int, 3>{});
    case 4: return tile(std::integral_constant<int, 4>{});
    case 5: return tile(std::integral_constant<int, 5>{});
    case 6: return tile(std::integral_constant<int, 6>{});
  }
}

// As multiply_panel; the rows of t.a are ByteRows. The first tile asks for the panel that follows, if that is to come from L3.
static ALWAYS_INLINE void multiply_bytes(int64_t rows, int vectors, TileArgs<Bytes> t) {
  const TileArgs<Bytes> all = t;
  const int64_t groups = (rows + kByteRows - 1) / kByteRows;
  for (int64_t g = 0; g < groups; ++g) {
    alignas(64) int32_t sums[kByteRows * kPanelVectors * kLanes<float>];
    const int64_t from = rows * g / groups, count = rows * (g + 1) / groups - from, tiles = (count + kTileRows - 1) / kTileRows;
    const int64_t block = tiles > 1 ? kByteBlock : all.k;
    for (int64_t k0 = 0; k0 < all.k; k0 += block) {
      const int64_t k1 = k0 + block < all.k ? k0 + block : all.k;
      for (int64_t q = 0; q < tiles; ++q) {
        const int64_t first = count * q / tiles;
        const int of_tile = int(count * (q + 1) / tiles - first);
        t.a = all.a + (from + first) * all.lda;
        t.init = all.init + (from + first) * all.ldi;
        t.c = all.c + (from + first) * all.ldc;
        t.ahead = g == 0 && q == 0 ? all.ahead : nullptr;
        int32_t* const own = sums + first * vectors * kLanes<float>;
        switch (vectors) {
          case 1: bytes_rows<1>(of_tile, t, k0, k1, own); break;
          case 2: bytes_rows<2>(of_tile, t, k0, k1, own); break;
          case 3: bytes_rows<3>(of_tile, t, k0, k1, own); break;
          case 4: bytes_rows<4>(of_tile, t, k0, k1, own); break;
        }
      }
    }
  }
}
#endif

}  // namespace FUSED_RNN_ISA
