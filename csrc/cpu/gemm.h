// The one matrix product of the CPU backend:   C[m, n] = init[m, n] + sum_k A[m, k] W[k, n]
// for a tile of few rows (batch) and one panel of W: kPanelVectors vectors of columns, packed so that every k is one contiguous,
// aligned read. The loops call it for the input product, the recurrent one, the projection and their gradients.
//
// A `Kind` says in which types: operands (A), weights as they are packed (W) and accumulator, how many k stand together, and how many
// rows a tile has.
#pragma once
#include "vec.h"
#if defined(__AMX_BF16__)
#define FUSED_RNN_AMX 1
#endif

namespace FUSED_RNN_ISA {

constexpr int kPanelVectors = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;  // 32 vector registers: 6 x 4 accumulators, 4 of W, the broadcast
#else
constexpr int kTileRows = 3;  // 16 vector registers
#endif

struct F32 {
  using Operand = float;
  using Weight = float;
  using Accumulator = float;
  static constexpr int k_group = 1, k_multiple = 1, tile_rows = kTileRows;
};
// float against weights kept in fewer bits, which are widened as they are read.
struct F32FromBf16 : F32 {  // two k of a column side by side in 32 bits, which a shift and a mask take apart
  using Weight = bf16;
  static constexpr int k_group = 2, k_multiple = 2;
};
struct F32FromInt8 : F32 {
  using Weight = int8_t;  // times a scale for each column, TileArgs::scale
};
struct F64 {
  using Operand = double;
  using Weight = double;
  using Accumulator = double;
  static constexpr int k_group = 1, k_multiple = 1, tile_rows = kTileRows;
};
#if defined(FUSED_RNN_AMX)
#define FUSED_RNN_BF16_KIND Bf16
struct Bf16 {  // tiles of 16 x 32 bf16, two of them deep
  using Operand = bf16;
  using Weight = bf16;
  using Accumulator = float;
  static constexpr int k_group = 2, k_multiple = 32, tile_rows = 32;
};
#elif defined(__AVX512BF16__)
#define FUSED_RNN_BF16_KIND Bf16
struct Bf16 {  // pairs of k, multiplied and added by one instruction
  using Operand = bf16;
  using Weight = bf16;
  using Accumulator = float;
  static constexpr int k_group = 2, k_multiple = 2, tile_rows = kTileRows;
};
#else
#define FUSED_RNN_BF16_KIND F32
#endif

template <class Kind>
constexpr int kKindLanes = kLanes<typename Kind::Accumulator>;

// v as a part of an operand's row that has n columns left. Kinds that multiply several k together read on into the padding, and a
// column that is not there is zero only while nothing infinite has come by: 0 * inf is NaN.
template <class Kind>
static ALWAYS_INLINE Vec<typename Kind::Accumulator> zero_padded(Vec<typename Kind::Accumulator> v, int n) {
  if constexpr (Kind::k_multiple == 1) return v;
  else return first_lanes<typename Kind::Accumulator>(v, n);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Elements of a packed panel of `vectors` vectors.
template <class Kind>
static ALWAYS_INLINE int64_t panel_size(int64_t k, int vectors) {
  return round_up(k, Kind::k_multiple) * vectors * kKindLanes<Kind>;
}

template <class Kind>
struct TileArgs {
  const typename Kind::Operand* a;  // [rows, k rounded up to k_multiple], row stride lda; zero in the padding
  int64_t lda;
  const typename Kind::Weight* w;  // packed panel
  int64_t k;
  const typename Kind::Accumulator* init;  // [rows, vectors * lanes], row stride ldi (0: one row for all)
  int64_t ldi;
  typename Kind::Accumulator* c;  // [rows, vectors * lanes], row stride ldc; may be init itself
  int64_t ldc;
  // The panel that comes next, to be brought from L3 into L2 meanwhile: `ahead_lines` cache lines for every k. Null: leave it.
  const char* ahead = nullptr;
  int ahead_lines = 0;
  // The row of a batch of one: summed in twice as many parts, to keep the arithmetic busy. Others have the same sums wherever they are.
  bool lone = false;
  const typename Kind::Accumulator* scale = nullptr;  // [vectors * lanes] of F32FromInt8
};
template <class Kind>
constexpr bool kNarrow = sizeof(typename Kind::Weight) < sizeof(typename Kind::Operand);
template <class Kind>
constexpr bool kScaled = sizeof(typename Kind::Weight) == 1;
template <class Kind>
constexpr bool kByBytes = kScaled<Kind> && Kind::k_group == 4;  // operands are brought to bytes, too (bytes.h)

// ---- vector units ----
// PV: how many vectors the panel has, of which NV are multiplied.
template <class Kind, int MR, int NV, int KU, int PV = NV>
static ALWAYS_INLINE void multiply(Vec<typename Kind::Accumulator> (&acc)[KU][MR][NV], const typename Kind::Operand* a, int64_t lda,
                                   const typename Kind::Weight* w) {
  using S = typename Kind::Accumulator;
  constexpr int L = kKindLanes<Kind>;
#pragma GCC unroll 8
  for (int u = 0; u < KU; ++u) {
    Vec<S> wv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const auto* at = w + int64_t(u * PV + v) * L * Kind::k_group;
      if constexpr (kScaled<Kind>) wv[v] = load(at);
      else wv[v] = *(const Vec<S>*)at;
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      if constexpr (Kind::k_group == 1) {
        const Vec<S> b = splat(a[m * lda + u]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[u][m][v] += b * wv[v];
      } else {
#if defined(__AVX512BF16__)
        int32_t pair;
        memcpy(&pair, a + m * lda + 2 * u, 4);
        const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[u][m][v] = (Vec<S>)_mm512_dpbf16_ps((__m512)acc[u][m][v], b, (__m512bh)wv[v]);
#endif
      }
    }
  }
}

// As many k as `pairs` of F32FromBf16 hold, into the parts of the sum that F32 would put them into.
template <int MR, int NV, int KU, int pairs>
static ALWAYS_INLINE void multiply_pairs(Vf (&acc)[KU][MR][NV], const float* a, int64_t lda, const bf16* w) {
  using U = VectorOf<float>::U;
#pragma GCC unroll 4
  for (int u = 0; u < pairs; ++u) {
    Vf low[NV], high[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const U both = (U)load((const float*)(w + (u * NV + v) * kLanes<float> * 2));
      low[v] = (Vf)(both << 16);
      high[v] = (Vf)(both & 0xffff0000u);
    }
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      const Vf first = splat(a[m * lda + 2 * u]), second = splat(a[m * lda + 2 * u + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[2 * u % KU][m][v] += first * low[v];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[(2 * u + 1) % KU][m][v] += second * high[v];
    }
  }
}

// A lone row of narrow weights does more arithmetic for each byte than the processor can look past: the bytes are asked for early. With
// float weights that only costs (a tenth of the step). Intel Xeon with AMX, November 2026.
constexpr int64_t kFetchAhead = 1024;
template <int bytes>
static ALWAYS_INLINE void fetch_ahead(const void* w) {
#pragma GCC unroll 8
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)w + kFetchAhead + i, 0, 3);
}

// KU: how many parts every sum is split into. An FMA takes four cycles and two start in each: few accumulators are split over several k to
// keep eight in flight. By NV alone, so that a row has the same sums among any number of others; but for a batch of one.
template <class Kind, int MR, int NV, int kAhead, int KU = 4 / NV>
static __attribute__((noinline)) void vector_tile(const TileArgs<Kind>& t) {
  using S = typename Kind::Accumulator;
  constexpr int L = kKindLanes<Kind>, KG = Kind::k_group;
  // The sums start from zero and init comes last: added first, it would have every term rounded at its scale.
  Vec<S> acc[KU][MR][NV];
#pragma GCC unroll 8
  for (int u = 0; u < KU; ++u)
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[u][m][v] = Vec<S>{};
  const auto* a = t.a;
  const auto* w = t.w;
  constexpr bool kPairs = kNarrow<Kind> && KG == 2;
  constexpr int kStep = kPairs && KU == 1 ? 2 : KU;  // counted in k, or in groups of k
  int64_t k = kPairs ? t.k : (t.k + KG - 1) / KG;
  const char* ahead = t.ahead;
  if constexpr (kPairs) {
    for (; k >= kStep; k -= kStep, a += kStep, w += int64_t(kStep) * NV * L) {
      if constexpr (MR == 1) fetch_ahead<kStep * NV * L * 2>(w);
      multiply_pairs<MR, NV, KU, kStep / 2>(acc, a, t.lda, w);
    }
    for (; k > 0; k -= 2, a += 2, w += 2 * NV * L) multiply_pairs<MR, NV, 1, 1>(*(Vf(*)[1][MR][NV])(&acc), a, t.lda, w);
  }
  for (; k >= KU; k -= KU, a += KU * KG, w += int64_t(KU) * KG * NV * L) {
    if constexpr (MR == 1 && kNarrow<Kind>) fetch_ahead<KU * KG * NV * L* int(sizeof(*w))>(w);
    multiply<Kind, MR, NV, KU>(acc, a, t.lda, w);
    if constexpr (kAhead > 0) {
#pragma GCC unroll 2
      for (int i = 0; i < kAhead; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
      ahead += kAhead * 64;
    }
  }
  if constexpr (KU > 1)
    for (; k > 0; --k, a += KG, w += int64_t(KG) * NV * L) {
      Vec<S>(&first)[1][MR][NV] = *(Vec<S>(*)[1][MR][NV])(&acc);
      multiply<Kind, MR, NV, 1>(first, a, t.lda, w);
    }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec<S> sum = acc[0][m][v];
#pragma GCC unroll 8
      for (int u = 1; u < KU; ++u) sum += acc[u][m][v];
      if constexpr (kScaled<Kind>) sum *= load(t.scale + v * L);
      store(t.c + m * t.ldc + v * L, load(t.init + m * t.ldi + v * L) + sum);
    }
}

template <class Kind, int MR, int NV>
static ALWAYS_INLINE void vector_tile(const TileArgs<Kind>& t) {
  if constexpr (MR == 1) {
    if (t.lone) return vector_tile<Kind, MR, NV, 0, 8 / NV>(t);
  }
  if constexpr (MR >= 3 && NV >= 3) {
    if (t.ahead_lines == 1) return vector_tile<Kind, MR, NV, 1>(t);
    if (t.ahead_lines == 2) return vector_tile<Kind, MR, NV, 2>(t);
  }
  vector_tile<Kind, MR, NV, 0>(t);
}

template <class Kind, int NV>
static ALWAYS_INLINE void vector_rows(int rows, const TileArgs<Kind>& t) {
  switch (rows) {
    case 1: return vector_tile<Kind, 1, NV>(t);
    case 2: return vector_tile<Kind, 2, NV>(t);
    case 3: return vector_tile<Kind, 3, NV>(t);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4: return vector_tile<Kind, 4, NV>(t);
    case 5: return vector_tile<Kind, 5, NV>(t);
    case 6: return vector_tile<Kind, 6, NV>(t);
#endif
  }
}

// Seven or eight rows, which are more than a tile has: half of the panel's vectors at a time, so that of a panel that comes from L3 every
// byte is read once. The sums are vector_tile's.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTallRows = 8;
#else
constexpr int kTallRows = 0;  // 16 vector registers
#endif
template <class Kind>
constexpr bool kTall = kTallRows > 0 && Kind::k_multiple < 32 && !kNarrow<Kind>;
template <class Kind, int MR>
static __attribute__((noinline)) void tall_tile(const TileArgs<Kind>& t) {
  using S = typename Kind::Accumulator;
  constexpr int L = kKindLanes<Kind>, KG = Kind::k_group, NV = kPanelVectors / 2;
  const char* ahead = t.ahead;
  for (int v0 = 0; v0 < kPanelVectors; v0 += NV) {
    Vec<S> acc[1][MR][NV] = {};
    const auto* a = t.a;
    const auto* w = t.w + v0 * L * KG;
    for (int64_t k = (t.k + KG - 1) / KG; k > 0; --k, a += KG, w += kPanelVectors * L * KG, ahead += t.ahead_lines * 64) {
      multiply<Kind, MR, NV, 1, kPanelVectors>(acc, a, t.lda, w);
      for (int i = 0; i < t.ahead_lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        const int64_t column = (v0 + v) * L;
        store(t.c + m * t.ldc + column, load(t.init + m * t.ldi + column) + acc[0][m][v]);
      }
  }
}

#if defined(FUSED_RNN_AMX)
// ---- AMX: C tiles of 16 rows x 16 columns, A 16 x 32 bf16, W 16 pairs x 16 columns ----
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static thread_local int amx_configured = 0;  // the rows the tiles are set up for, as rows0 * 32 + rows1; 0: not set up

static void amx_configure(int rows0, int rows1) {
  const int key = rows0 * 32 + rows1;
  if (key == amx_configured) return;
  amx_configured = key;
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64;
  // Two row blocks: C 0 1 | 2 3, A 4 | 5, W 6 7.  One row block: C 0..3, A 4, W 5 6 7.
  for (int i = 0; i < 4; ++i) config.rows[i] = uint8_t(rows1 && i >= 2 ? rows1 : rows0);
  config.rows[4] = uint8_t(rows0);
  config.rows[5] = uint8_t(rows1 ? rows1 : 16);
  config.rows[6] = config.rows[7] = 16;
  _tile_loadconfig(&config);
}

// The tiles start from init: operands of 16 bits bring errors of their own, beside which its rounding is nothing (unlike vector_tile's).
static __attribute__((noinline)) void amx_tile(int rows, int vectors, const TileArgs<Bf16>& t) {
  const int rows0 = rows <= 16 ? rows : (rows + 1) / 2, rows1 = rows - rows0;
  amx_configure(rows0, rows1);
  const int64_t k_end = round_up(t.k, 32), ws = int64_t(vectors) * 64, as = t.lda * 2, is = t.ldi * 4, cs = t.ldc * 4;
  const bf16 *a0 = t.a, *a1 = t.a + rows0 * t.lda, *w = t.w;
  const int64_t w_step = int64_t(16) * vectors * 32;  // elements of W for 32 k
  if (rows1) {
    const float* init1 = t.init + rows0 * t.ldi;
    float* c1 = t.c + rows0 * t.ldc;
    for (int v = 0; v < vectors; v += 2) {
      const bool two = v + 1 < vectors;
      _tile_loadd(0, t.init + v * 16, is);
      _tile_loadd(2, init1 + v * 16, is);
      if (two) {
        _tile_loadd(1, t.init + v * 16 + 16, is);
        _tile_loadd(3, init1 + v * 16 + 16, is);
      }
      const bf16* wv = w + v * 32;
      for (int64_t k = 0; k < k_end; k += 32, wv += w_step) {
        _tile_loadd(4, a0 + k, as);
        _tile_loadd(6, wv, ws);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a1 + k, as);
        _tile_dpbf16ps(2, 5, 6);
        if (two) {
          _tile_loadd(7, wv + 32, ws);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, t.c + v * 16, cs);
      _tile_stored(2, c1 + v * 16, cs);
      if (two) {
        _tile_stored(1, t.c + v * 16 + 16, cs);
        _tile_stored(3, c1 + v * 16 + 16, cs);
      }
    }
  } else {
    _tile_loadd(0, t.init, is);
    if (vectors > 1) _tile_loadd(1, t.init + 16, is);
    if (vectors > 2) _tile_loadd(2, t.init + 32, is);
    if (vectors > 3) _tile_loadd(3, t.init + 48, is);
    for (int64_t k = 0; k < k_end; k += 32, w += w_step) {
      _tile_loadd(4, a0 + k, as);
      _tile_loadd(5, w, ws);
      _tile_dpbf16ps(0, 4, 5);
      if (vectors > 1) {
        _tile_loadd(6, w + 32, ws);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (vectors > 2) {
        _tile_loadd(7, w + 64, ws);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (vectors > 3) {
        _tile_loadd(5, w + 96, ws);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, t.c, cs);
    if (vectors > 1) _tile_stored(1, t.c + 16, cs);
    if (vectors > 2) _tile_stored(2, t.c + 32, cs);
    if (vectors > 3) _tile_stored(3, t.c + 48, cs);
  }
}
#endif

// rows <= Kind::tile_rows, vectors <= kPanelVectors.
template <class Kind>
static ALWAYS_INLINE void multiply_tile(int rows, int vectors, const TileArgs<Kind>& t) {
#if defined(FUSED_RNN_AMX)
  if constexpr (Kind::k_multiple == 32) return amx_tile(rows, vectors, t);
#endif
  switch (vectors) {
    case 1: return vector_rows<Kind, 1>(rows, t);
    case 2: return vector_rows<Kind, 2>(rows, t);
    case 3: return vector_rows<Kind, 3>(rows, t);
    case 4: return vector_rows<Kind, 4>(rows, t);
  }
}

// Any number of rows: split evenly into tiles, so that none is much smaller than the others. Long sums are cut into blocks of k, each
// summed by itself. `ahead_bytes`: size of the panel that follows this one and would have to come from L3; where this one is gone through
// twice or more there is time to fetch it meanwhile.
constexpr int64_t kSumBlock = 256;
template <class Kind>
constexpr int64_t kBlock = sizeof(typename Kind::Operand) == 2 ? 2 * kSumBlock : kSumBlock;  // such operands are coarser than sums
template <class Kind>
static ALWAYS_INLINE void multiply_panel(int64_t rows, int vectors, TileArgs<Kind> t, int64_t ahead_bytes = 0,
                                         int64_t block = kBlock<Kind>) {
  const TileArgs<Kind> all = t;
  const bool tall = kTall<Kind> && all.ahead && vectors == kPanelVectors && rows > Kind::tile_rows && rows <= kTallRows;
  const int64_t tiles = tall ? 1 : (rows + Kind::tile_rows - 1) / Kind::tile_rows;
  const int64_t passes = tall ? 2 : 1, groups = (t.k + Kind::k_group - 1) / Kind::k_group;  // of a tile through its k
  const int lines = !all.ahead || tiles * passes < 2 ? 0 : tiles * passes * groups * 64 >= ahead_bytes ? 1 : 2;
  for (int64_t q = 0; q < tiles; ++q) {
    const int64_t first = rows * q / tiles, last = rows * (q + 1) / tiles;
    t.init = all.init + first * all.ldi;
    t.ldi = all.ldi;
    t.c = all.c + first * all.ldc;
    for (int64_t k = 0; k < all.k; k += block) {
      t.a = all.a + first * all.lda + k;
      t.w = all.w + k * vectors * kKindLanes<Kind>;
      t.k = all.k - k < block ? all.k - k : block;
      const int64_t fetch = passes * lines * 64, here = (t.k + Kind::k_group - 1) / Kind::k_group;
      const int64_t offset = (q * groups + k / Kind::k_group) * fetch;
      t.ahead_lines = lines && offset + here * fetch <= ahead_bytes ? lines : 0;
      t.ahead = all.ahead + offset;
      if constexpr (kTall<Kind>) {
        if (tall) rows == kTallRows ? tall_tile<Kind, kTallRows>(t) : tall_tile<Kind, kTallRows - 1>(t);
      }
      if (!tall) multiply_tile<Kind>(int(last - first), vectors, t);
      t.init = t.c;
      t.ldi = all.ldc;
    }
  }
}

// ---- W as it stands in memory, for a handful of rows, where packing would cost more than it saves ----
// A vector of so many operands, or of weights as operands, and sum += its products.
template <class Kind>
constexpr int kRowLanes = kKindLanes<Kind> * Kind::k_group;
template <class Kind, class T>
static ALWAYS_INLINE Vec<typename Kind::Accumulator> load_row(const T* p, int n) {
  using V = Vec<typename Kind::Accumulator>;
  if constexpr (Kind::k_group == 1) {
    return load(p, n);
  } else {
    V v{};
    if (__builtin_expect(n >= kRowLanes<Kind>, 1)) memcpy(&v, (const void*)p, sizeof(v));
    else memcpy(&v, (const void*)p, size_t(n) * sizeof(T));
    return v;
  }
}
template <class Kind>
static ALWAYS_INLINE void add_products(Vec<typename Kind::Accumulator>& sum, Vec<typename Kind::Accumulator> a,
                                       Vec<typename Kind::Accumulator> w) {
  if constexpr (Kind::k_group == 1) sum += a * w;
#if defined(__AVX512BF16__)
  else sum = (Vec<typename Kind::Accumulator>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#endif
}

// C[m, 0..n) = init + sum_k A[m, k] W[i, k] for n <= lanes rows i of W. One vector of C; lanes past n come out as init.
template <class Kind, class T>
static __attribute__((noinline)) void multiply_rows(int64_t rows, const typename Kind::Operand* a, int64_t lda, const T* w, int64_t ldw,
                                                    int n, int64_t k, const Acc<T>* init, int64_t ldi, Acc<T>* c, int64_t ldc) {
  using S = Acc<T>;
  constexpr int L = kLanes<S>, step = kRowLanes<Kind>;
  for (int64_t m = 0; m < rows; ++m) {
    Vec<S> acc[L];
    const auto* am = a + m * lda;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) acc[i] = Vec<S>{};
    if (n == L) {
      int64_t j = 0;
      for (; j + step <= k; j += step) {
        const Vec<S> b = load_row<Kind>(am + j, step);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) add_products<Kind>(acc[i], b, load_row<Kind>(w + i * ldw + j, step));
      }
      if (j < k) {
        const Vec<S> b = load_row<Kind>(am + j, int(k - j));
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) add_products<Kind>(acc[i], b, load_row<Kind>(w + i * ldw + j, int(k - j)));
      }
    } else {
      for (int i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; j += step) {
          const int left = int(k - j < step ? k - j : step);
          add_products<Kind>(acc[i], load_row<Kind>(am + j, left), load_row<Kind>(w + i * ldw + j, left));
        }
    }
    store(c + m * ldc, load(init + m * ldi) + sums<S>(acc));
  }
}

}  // namespace FUSED_RNN_ISA
