// The gradients of weights and input: products of dgates with inputs, hidden states and weights over all steps of a range.
//
//   dW[m, n] += sum over rows k of dgates[k, m] in[k, n]      in = x, h_{t-1}: given row by row, since h_{t-1} may be h0 or zero
//   db[m]    += sum over rows k of dgates[k, m]
//   dx[k, n]  = sum over m of dgates[k, m] W_ih[m, n]
//
// Threads divide the hidden units (dW) and the rows (dx); every sum has one owner and one order.
#pragma once
#include "layout.h"

namespace FUSED_RNN_ISA {

using fused_rnn::Products;

constexpr int64_t kDepth = 512;    // rows k multiplied at a time: a tile of dgates and a panel of `in` fit L1 and L2
// A sum over all steps and sequences cancels more than one over units does: shorter blocks than kSumBlock, where a sum has all bits.
template <class Kind>
constexpr int64_t kGradientBlock = Kind::k_group == 1 ? 64 : kSumBlock;
constexpr int64_t kDxRows = 96;
constexpr int64_t kFewRows = 16;   // up to here W_ih is not packed for dx
constexpr int kRowsAtOnce = kTileRows > 4 ? 4 : 2;

// A sum in double of vectors of either type.
struct WideSum {
  Vd part[2] = {};
  ALWAYS_INLINE void add(Vd v) { part[0] += v; }
  ALWAYS_INLINE void add(Vf v) {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    Half half[2];
    memcpy(half, &v, sizeof(v));
    for (int i = 0; i < 2; ++i) part[i] += __builtin_convertvector(half[i], Vd);
  }
  ALWAYS_INLINE double operator[](int lane) const { return part[lane / kLanes<double>][lane % kLanes<double>]; }
};

template <class Kind, class T, class Cell>
struct ProductsLoop : Counts<Cell> {
  using A = typename Kind::Operand;
  using S = typename Kind::Accumulator;
  using C = Counts<Cell>;
  using C::G, C::GH, C::DG, C::apart, C::recurrent, C::x_gate, C::diagonal, C::p, C::active;
  static constexpr int L = kKindLanes<Kind>, W = kPanelVectors * L;
  static constexpr int64_t kLd = kDepth + 64 / int64_t(sizeof(A));  // row stride of the transposed dgates: not a power of two

  const Products& f;
  int64_t first_row, rows;  // of this range, in time order

  struct Memory {
    int64_t* barrier;
    A *left, *panel, *w_ih, *dx_left;  // left: transposed dgates, [DG, units of this thread, kLd]
    S *zero, *dx_tile;
    double* sums;  // of the gradients of this thread's units
    const T** row;
    int64_t* live;  // rows of this range that have a step, in order; only where some have none
  };

  ProductsLoop(const Products& products) : C(products.p), f(products), rows((products.p.stop - products.p.start) * products.p.B) {}

  // Which row blocks of W_ih and of W_hh belong to gradient d, -1: none.
  ALWAYS_INLINE int input_gate(int d) const { return d < G ? x_gate(d) : -1; }
  ALWAYS_INLINE int recurrent_gate(int d) const { return !recurrent || d < apart || d >= G + apart ? -1 : d - apart; }

  Memory layout(Arena& shared, Arena& own, int threads) const {
    Memory m{};
    m.barrier = shared.take<int64_t>(Barrier::words(threads));
    if (f.dx) m.w_ih = shared.take<A>(((p.D + L - 1) / L) * panel_size<Kind>(G * p.H, 1));
    const int64_t units = (p.H + threads - 1) / threads, outs = (p.P + threads - 1) / threads;
    m.left = own.take<A>((DG * units > outs ? DG * units : outs) * kLd);
    m.panel = own.take<A>(panel_size<Kind>(kDepth, kPanelVectors));
    m.zero = own.take<S>(W);
    m.sums = own.take<double>(units);
    if (f.dx) {
      m.dx_tile = own.take<S>(kDxRows * W);
      m.dx_left = own.take<A>(kDxRows * row_stride<Kind>(G * p.H));
    }
    m.row = own.take<const T*>(kDepth);
    if (p.lengths) m.live = own.take<int64_t>(rows);
    return m;
  }

  // Rows of the range by their place among those that have a step: from the k-th on.
  struct Chosen {
    const int64_t* live;  // null: all have
    int64_t k;
    ALWAYS_INLINE int64_t operator[](int64_t i) const { return live ? live[k + i] : k + i; }
  };
  // Of recurrence r; how many there are.
  int64_t choose(const Memory& m, int r) const {
    if (!p.lengths) return rows;
    int64_t n = 0;
    for (int64_t k = 0; k < rows; ++k)
      if (active(first_time(p, r) + k / p.B, k % p.B)) m.live[n++] = k;
    return n;
  }

  // left[i, k] = src[row k, i] for i < n, k < depth; zero beyond depth up to what the kind multiplies at a time. src: row 0 of all.
  static void transpose_into(A* left, const T* src, int64_t ld, const Chosen& row, int64_t n, int64_t depth) {
    const int64_t padded = round_up(depth, Kind::k_multiple);
    if constexpr (sizeof(A) == sizeof(S)) {
      for (int64_t k = 0; k < depth; k += L)
        for (int64_t i = 0; i < n; i += L) {
          Vec<S> r[L];
          for (int l = 0; l < L; ++l) r[l] = k + l < depth ? load(src + row[k + l] * ld + i, lanes_left(n, i, L)) : Vec<S>{};
          transpose<S>(r);
          for (int l = 0; l < L && i + l < n; ++l) store(left + (i + l) * kLd + k, r[l], lanes_left(depth, k, L));
        }
    } else {  // 16-bit operands: interleave pairs of rows, then transpose the pairs
      for (int64_t k = 0; k < padded; k += 2 * L)
        for (int64_t i = 0; i < n; i += L) {
          Vec<S> r[L];
          const int here = lanes_left(n, i, L);
          for (int l = 0; l < L; ++l) {
            const auto at = [&](int64_t k) { return k < depth ? src + row[k] * ld + i : nullptr; };
            r[l] = pairs(at(k + 2 * l), at(k + 2 * l + 1), here);
          }
          transpose<S>(r);
          const int64_t room = padded - k < 2 * L ? padded - k : 2 * L;
          for (int l = 0; l < here; ++l) {
            if (room == 2 * L) store((float*)(void*)(left + (i + l) * kLd + k), r[l]);
            else memcpy((void*)(left + (i + l) * kLd + k), &r[l], size_t(room) * 2);
          }
        }
    }
  }

  // A panel of `in`, columns [column, column + nv L): rows by pointer, null for zero.
  static void pack_panel(A* panel, const T* const* row, int64_t depth, int64_t column, int64_t n, int nv) {
    constexpr int KG = Kind::k_group;
    const int64_t padded = round_up(depth, Kind::k_multiple);
    for (int64_t k = 0; k < padded; k += KG)
      for (int v = 0; v < nv; ++v) {
        const int here = lanes_left(n, column + v * L, L);
        A* d = panel + (k / KG * nv + v) * L * KG;
        const auto at = [&](int64_t i) { return i < depth && row[i] ? row[i] + column + v * L : nullptr; };
        if constexpr (KG == 1) *(Vec<S>*)d = at(k) ? load(at(k), here) : Vec<S>{};
        else *(Vec<S>*)d = pairs(at(k), at(k + 1), here);
      }
  }

  // dw[block(i) + 0..n) += left_i in, for the `count` row blocks of `left` that take part. from: the first column of `in`.
  void weight_gradient(const Memory& m, S* dw, int64_t columns, int64_t depth, bool first, int count, const int64_t* left_row,
                       const int64_t* dw_row, int64_t n, int64_t from = 0) const {
    const int64_t ld = round_up(columns, L);
    if (depth == 0) {  // every sequence is empty
      for (int i = 0; i < count && first; ++i) memset((void*)(dw + dw_row[i] * ld), 0, size_t(n * ld) * sizeof(S));
      return;
    }
    for (int64_t column = 0; column < columns; column += W) {
      const int nv = int((columns - column + L - 1) / L < kPanelVectors ? (columns - column + L - 1) / L : kPanelVectors);
      pack_panel(m.panel, m.row, depth, from + column, from + columns, nv);
      for (int i = 0; i < count; ++i) {
        S* c = dw + dw_row[i] * ld + column;
        multiply_panel<Kind>(n, nv, {m.left + left_row[i] * kLd, kLd, m.panel, depth, first ? m.zero : c, first ? 0 : ld, c, ld}, 0,
                             kGradientBlock<Kind>);
      }
    }
  }

  // sums[i] = sum over rows k of src[k, i], in double: a bias adds up every step of a sequence, however long.
  static void column_sums(double* sums, const T* src, int64_t ld, const Chosen& row, int64_t n, int64_t depth) {
    for (int64_t i = 0; i < n; i += L) {
      WideSum sum;
      for (int64_t k = 0; k < depth; ++k) sum.add(load(src + row[k] * ld + i, lanes_left(n, i, L)));
      for (int l = 0; l < lanes_left(n, i, L); ++l) sums[i + l] = sum[l];
    }
  }

  // What weight_gradient makes of rows of zeros: 0 for each unit, NaN for one whose gradients (`sums` of them) are not all finite.
  static void zero_gradient(S* dw, int64_t ld, bool first, const double* sums, int64_t n) {
    if (first) memset((void*)dw, 0, size_t(n * ld) * sizeof(S));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < ld && sums[i] * 0 != 0; ++c) dw[i * ld + c] = S(sums[i] * 0);
  }

  static void accumulate(double* to, const double* from, int64_t n, bool first) {
    for (int64_t i = 0; i < n; ++i) to[i] = first ? from[i] : to[i] + from[i];
  }

  // What h_{t-1} was for row (t, b): a row of `hidden`, of h0, or null for zero.
  const T* h_before(int r, int64_t t, int64_t b) const {
    const Weights& w = p.weights[r];
    if (p.reset && p.reset[t * p.B + b]) return nullptr;
    const int64_t before = t - w.direction;
    if (before < 0 || before >= p.T || !active(before, b)) return f.h0 ? (const T*)f.h0 + (r * p.B + b) * p.P : nullptr;
    return (const T*)f.hidden + ((before * p.B + b) * p.R + r) * p.P;
  }

  void weights_of(const Memory& m, int r, int me, int team) const {
    const int64_t u0 = part(p.H, me, team), units = part(p.H, me + 1, team) - u0;
    const int64_t t0 = first_time(p, r);
    const T* x = (const T*)f.x.data + t0 * f.x.time + r * f.x.recurrence;
    const int64_t ld = p.R * DG * p.H, columns = p.P / diagonal, ld_hh = round_up(columns, L);
    const int64_t chosen = choose(m, r);
    for (int64_t k0 = 0; k0 == 0 || k0 < chosen; k0 += kDepth) {
      const Chosen row{m.live, k0};
      const int64_t depth = chosen - k0 < kDepth ? chosen - k0 : kDepth;
      const bool first = f.first && k0 == 0;
      int64_t left_x[kGradients<Cell>], dw_x[kGradients<Cell>], left_h[kGradients<Cell>], dw_h[kGradients<Cell>];
      int count_x = 0, count_h = 0;
      for (int d = 0; d < DG; ++d) {
        transpose_into(m.left + d * units * kLd, (const T*)f.dgates + (r * DG + d) * p.H + u0, ld, row, units, depth);
        if (input_gate(d) >= 0) left_x[count_x] = d * units, dw_x[count_x++] = input_gate(d) * p.H + u0;
        if (recurrent_gate(d) >= 0 && recurrent_gate(d) < GH) left_h[count_h] = d * units, dw_h[count_h++] = recurrent_gate(d) * p.H + u0;
      }
      for (int64_t k = 0; k < depth; ++k) m.row[k] = x + row[k] / p.B * f.x.time + row[k] % p.B * f.x.batch;
      weight_gradient(m, (S*)f.dw_ih[r], p.D, depth, first, count_x, left_x, dw_x, units);
      for (int g = GH; g < G && recurrent && first; ++g)
        memset((S*)f.dw_hh[r] + (g * p.H + u0) * ld_hh, 0, size_t(units * ld_hh) * sizeof(S));
      bool from_zero = recurrent;  // the first step without an initial state
      for (int64_t k = 0; k < depth && recurrent; ++k) {
        m.row[k] = h_before(r, t0 + row[k] / p.B, row[k] % p.B);
        from_zero = from_zero && !m.row[k];
      }
      const int64_t block_units = p.H / diagonal;
      for (int64_t block = u0 / block_units; recurrent && !from_zero && block * block_units < u0 + units; ++block) {
        const int64_t begin = block * block_units < u0 ? u0 : block * block_units, end = (block + 1) * block_units;
        int64_t left[kGradients<Cell>], dw[kGradients<Cell>];
        for (int i = 0; i < count_h; ++i) left[i] = left_h[i] + begin - u0, dw[i] = dw_h[i] + begin - u0;
        const int64_t n = (end < u0 + units ? end : u0 + units) - begin;
        weight_gradient(m, (S*)f.dw_hh[r], columns, depth, first, count_h, left, dw, n, block * columns);
      }
      for (int d = 0; d < G + apart && (f.db_ih || from_zero); ++d) {
        column_sums(m.sums, (const T*)f.dgates + (r * DG + d) * p.H + u0, ld, row, units, depth);
        const int64_t h_row = recurrent_gate(d) * p.H + u0;
        if (from_zero && h_row >= 0) zero_gradient((S*)f.dw_hh[r] + h_row * ld_hh, ld_hh, first, m.sums, units);
        if (f.db_ih && input_gate(d) >= 0) accumulate((double*)f.db_ih[r] + input_gate(d) * p.H + u0, m.sums, units, first);
        if (f.db_ih && h_row >= 0) accumulate((double*)f.db_hh[r] + h_row, m.sums, units, first);
      }
      if constexpr (kInterpreted<Cell>) gradients_of_matrices(m, r, row, depth, first, u0, units);
      if (f.dprojected) {
        const int64_t o0 = part(p.P, me, team), outs = part(p.P, me + 1, team) - o0, zero = 0;
        transpose_into(m.left, (const T*)f.dprojected + r * p.P + o0, p.R * p.P, row, outs, depth);
        for (int64_t k = 0; k < depth; ++k) m.row[k] = (const T*)f.unprojected + (row[k] * p.R + r) * p.H;
        weight_gradient(m, (S*)f.dw_hr[r], p.H, depth, first, 1, &zero, &o0, outs);
      }
    }
  }

  // Of each matrix: its operand is what a step keeps in its place.
  void gradients_of_matrices(const Memory& m, int r, const Chosen& row, int64_t depth, bool first, int64_t u0, int64_t units) const {
    const fused_rnn::CellDescriptor& cell = *p.cell;
    const T* const saved = at<const T>(f.saved, (f.whole ? first_time(p, r) * p.B * p.R : 0) * cell.saved * p.H);
    int64_t left[fused_rnn::kMostBlocks], to[fused_rnn::kMostBlocks];
    for (int j = 0, d = G + apart; j < cell.matrices; d += cell.blocks_of[j++]) {
      for (int i = 0; i < cell.blocks_of[j]; ++i) left[i] = (d + i) * units, to[i] = i * p.H + u0;
      for (int64_t k = 0; k < depth; ++k) m.row[k] = saved + ((row[k] * p.R + r) * cell.saved + j) * p.H;
      weight_gradient(m, (S*)f.dmatrices[r * cell.matrices + j], p.H, depth, first, cell.blocks_of[j], left, to, units);
    }
  }

  int64_t dx_stride() const { return f.x.recurrence ? p.R * p.D : p.D; }
  T* dx_of(int r) const { return (T*)f.dx + first_time(p, r) * p.B * dx_stride() + (f.x.recurrence ? r * p.D : 0); }

  // dx of a few rows, from W_ih as it stands: reading it is most of the work. Threads divide the columns.
  void input_of_few(int r, int me, int team) const {
    const int64_t panels = (p.D + W - 1) / W;
    for (int64_t column = part(panels, me, team) * W; column < p.D && column < part(panels, me + 1, team) * W; column += W) {
      int64_t k = 0;
      for (; k + kRowsAtOnce <= rows; k += kRowsAtOnce) input_rows<kRowsAtOnce>(r, column, k);
      for (; k < rows; ++k) input_rows<1>(r, column, k);
    }
  }
  // A panel of columns of rows [k, k + N).
  template <int N>
  void input_rows(int r, int64_t column, int64_t k) const {
    const int64_t ld = p.R * DG * p.H, ld_x = dx_stride(), D = p.D, H = p.H;
    T* dx = dx_of(r) + k * ld_x + column;
    int n[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) n[v] = lanes_left(D, column + v * L, L);
    Vec<S> sum[N][kPanelVectors] = {};
    for (int d = 0; d < G; ++d) {
      const T* g = (const T*)f.dgates + k * ld + (r * DG + d) * H;
      const T* w = (const T*)p.weights[r].w_ih + input_gate(d) * H * D + column;
      for (int64_t i0 = 0; i0 < H; i0 += kSumBlock / 8) {  // summed in blocks: one long chain would round too often
        const int64_t i1 = i0 + kSumBlock / 8 < H ? i0 + kSumBlock / 8 : H;
        Vec<S> block[N][kPanelVectors] = {};
        for (int64_t i = i0; i < i1; ++i) {
          Vec<S> wv[kPanelVectors];
          if (column + W <= D) {
#pragma GCC unroll 4
            for (int v = 0; v < kPanelVectors; ++v) wv[v] = load(w + i * D + v * L);
          } else {
            for (int v = 0; v < kPanelVectors; ++v) wv[v] = n[v] ? load(w + i * D + v * L, n[v]) : Vec<S>{};
          }
#pragma GCC unroll 4
          for (int m = 0; m < N; ++m) {
            const Vec<S> b = splat(scalar(g[m * ld + i]));
#pragma GCC unroll 4
            for (int v = 0; v < kPanelVectors; ++v) block[m][v] += b * wv[v];
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < N; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVectors; ++v) sum[m][v] += block[m][v];
      }
    }
    for (int m = 0; m < N; ++m)
      for (int v = 0; v < kPanelVectors && n[v]; ++v) {
        T* out = dx + m * ld_x + v * L;
        store(out, f.add_dx ? load(out, n[v]) + sum[m][v] : sum[m][v], n[v]);
      }
  }

  void input_of(const Memory& m, int r, int me, int team, Barrier& barrier) const {
    if (rows <= kFewRows) return input_of_few(r, me, team);
    const Weights& w = p.weights[r];
    const int64_t vectors = (p.D + L - 1) / L, panels = (vectors + kPanelVectors - 1) / kPanelVectors;
    const auto vectors_of = [&](int64_t j) {
      return int(vectors - j * kPanelVectors < kPanelVectors ? vectors - j * kPanelVectors : kPanelVectors);
    };
    for (int64_t j = part(panels, me, team); j < part(panels, me + 1, team); ++j)
      for (int v = 0; v < vectors_of(j); ++v)
        pack_columns<Kind, T>(m.w_ih + j * kPanelVectors * panel_size<Kind>(G * p.H, 1), vectors_of(j), v,
                              (const T*)w.w_ih + (j * kPanelVectors + v) * L, p.D, lanes_left(p.D, (j * kPanelVectors + v) * L, L), G * p.H,
                              x_gate(0) * p.H);
    barrier.wait(me);
    const int64_t stride = row_stride<Kind>(G * p.H), ld = p.R * DG * p.H, ld_x = dx_stride();
    T* dx = dx_of(r);
    const bool direct = sizeof(A) == sizeof(T) && (G * p.H) % Kind::k_multiple == 0 && !p.lengths;
    for (int64_t k = part(rows, me, team); k < part(rows, me + 1, team) && p.lengths && !f.add_dx; ++k)
      if (!active(first_time(p, r) + k / p.B, k % p.B)) memset((void*)(dx + k * ld_x), 0, size_t(p.D) * sizeof(T));
    const int64_t chosen = choose(m, r), end = part(chosen, me + 1, team);
    for (int64_t k0 = part(chosen, me, team); k0 < end; k0 += kDxRows) {
      const Chosen row{m.live, k0};
      const int64_t n = end - k0 < kDxRows ? end - k0 : kDxRows;
      const T* dgates = (const T*)f.dgates + r * DG * p.H;
      for (int64_t k = 0; k < n && !direct; ++k) convert_row(m.dx_left + k * stride, dgates + row[k] * ld, G * p.H, stride);
      for (int64_t j = 0; j < panels; ++j) {
        const int nv = vectors_of(j);
        multiply_panel<Kind>(n, nv,
                             {direct ? (const A*)(dgates + k0 * ld) : m.dx_left, direct ? ld : stride,
                              m.w_ih + j * kPanelVectors * panel_size<Kind>(G * p.H, 1), G * p.H, m.zero, 0, m.dx_tile, W});
        for (int64_t k = 0; k < n; ++k)
          for (int v = 0; v < nv; ++v) {
            const int64_t column = (j * kPanelVectors + v) * L;
            T* out = dx + row[k] * ld_x + column;
            Vec<S> sum = load(m.dx_tile + k * W + v * L);
            if (f.add_dx) sum += load(out, lanes_left(p.D, column, L));
            store(out, sum, lanes_left(p.D, column, L));
          }
      }
    }
    barrier.wait(me);  // the next recurrence packs its W_ih into the same place, and adds to the same dx
  }

  struct Context {
    const ProductsLoop& loop;
    char* base;
  };
  static void body(void* context, int me, int team) {
    auto& [loop, base] = *(Context*)context;
    FlushDenormals region;
    Arena shared{nullptr}, own{nullptr};
    loop.layout(shared, own, team);
    Arena carve_shared{base}, carve_own{base + shared.used + own.used * me};
    const Memory m = loop.layout(carve_shared, carve_own, team);
    Barrier barrier(m.barrier, team);
    memset((void*)m.zero, 0, W * sizeof(S));
    for (int r = 0; r < loop.p.R; ++r) {
      if (loop.f.dw_ih) loop.weights_of(m, r, me, team);
      if (loop.f.dx) loop.input_of(m, r, me, team, barrier);
    }
  }
  static void run(const Products& products) {
    const ProductsLoop loop(products);
    const int threads = products.p.threads;
    Arena shared{nullptr}, own{nullptr}, ignored{nullptr}, alone{nullptr};
    loop.layout(shared, own, threads);
    loop.layout(ignored, alone, 1);  // a team that comes out smaller than asked has more units each
    Context context{loop, (char*)fused_rnn::cpu::scratch(shared.used + own.used * size_t(threads) + alone.used)};
    memset(context.base, 0, Barrier::words(threads) * sizeof(int64_t));
    fused_rnn::cpu::run_team(threads, body, &context);
  }
};

}  // namespace FUSED_RNN_ISA
