// The forward time loop, for every cell, dtype and ISA.
//
// Per recurrence: pack W_ih and W_hh; then per chunk of steps the input product of the whole chunk, and step by step
//   pre-activations += h_{t-1} W_hh^T;   cell;   h_t -> y, and as the next step's operand.
#pragma once
#include "bytes.h"
#include "forward_scan.h"
#include "forward_weights.h"

namespace FUSED_RNN_ISA {

constexpr int64_t kChunkRows = 64;            // rows of one input product: enough to reuse every panel of W_ih
constexpr int64_t kChunkBytes = 512 * 1024;   // of pre-activations at the most: they must stay in L2 beside the weights
constexpr int64_t kUnpackedRows = 16;         // T B up to here: packing W costs more than it saves
constexpr int kKeepingPack = 2;               // of a cell that keeps its gates: they are held until they are stored
constexpr int64_t kFewVectors = 8;            // of a program at a time, where there are as many
constexpr int64_t kFarUnpackedRows = 32;      // and up to here where W and its packed form do not fit L2 together
constexpr int64_t kFarUnpackedSteps = 48;     // of one sequence, whose every step reads them once

template <class Kind, class T, class Cell>
struct ForwardLoop : ForwardWeights<Kind, T, Cell> {
  using A = typename Kind::Operand;
  using W = typename Kind::Weight;
  using S = typename Kind::Accumulator;
  using V = Vec<S>;
  using C = Counts<Cell>;
  using C::G, C::GH, C::PA, C::SV, C::ST, C::NP, C::apart, C::recurrent;
  using C::p, C::units, C::x_gate, C::column, C::for_parts, C::time, C::active, C::cut;
  using Weighed = ForwardWeights<Kind, T, Cell>;
  using Weighed::L, Weighed::diagonal, Weighed::columns, Weighed::unit_vectors, Weighed::panels, Weighed::out_vectors, Weighed::row;
  using Weighed::rows_of, Weighed::block_panels;
  using Weighed::state_stride, Weighed::unpacked, Weighed::uses_h, Weighed::last_vector, Weighed::recurrent_size, Weighed::projects;
  static constexpr bool kUnpackable = !kNarrow<Kind>;

  const Forward& f;
  int64_t chunk_steps, x_stride, h_stride, m_stride;
  bool joined_x, direct_x;  // x's rows are equally far apart over all steps and sequences; and it is an operand as it stands
  bool far;  // the packed weights do not fit L2 together with the rest

  // Scratch of one group of threads.
  struct Memory : PackedWeights<Kind> {
    int64_t* barrier;
    S *zero, *pre;
    S* states[Cell::states];  // but h
    A *h[2], *m, *x, *x_bytes, *h_bytes;  // bytes: of this thread, where products are
    S* wide;  // projection: one tile's results before they are rounded
    Workspace<S> work;  // a program's, of this thread
    StageWork<Kind> stages;  // the same, of one with stages
    PieceWork<Kind> pieces;
    ScanWork<S> scan;        // the same, of one that is linear in its states
  };

  ForwardLoop(const Forward& forward) : Weighed(forward.p), f(forward) {
    const int64_t rows = kChunkBytes / (row * int64_t(sizeof(S)));
    chunk_steps = (rows < kChunkRows ? rows : kChunkRows) / p.B;
    if (chunk_steps < 1) chunk_steps = 1;
    if (chunk_steps > p.stop - p.start) chunk_steps = p.stop - p.start;
    x_stride = row_stride<Kind>(p.D);
    h_stride = row_stride<Kind>(p.P);
    m_stride = row_stride<Kind>(p.H);
    uses_h = recurrent && (!f.h_is_zero || p.stop - p.start > 1);
    far = (unit_vectors * panel_size<Kind>(p.D, G) + recurrent_size()) * int64_t(sizeof(W)) > kNearBytes;
    const int64_t most = !far ? kUnpackedRows : p.B == 1 ? kFarUnpackedSteps : kFarUnpackedRows;
    unpacked = kUnpackable && !f.packed && (p.stop - p.start) * p.B <= most;
    joined_x = p.B == 1 || p.T == 1 || f.x.time == p.B * f.x.batch;
    direct_x = joined_x && sizeof(A) == sizeof(T) && p.D % Kind::k_multiple == 0;
  }
  // Of a program with stages; else null.
  const fused_rnn::Stages* staged() const {
    if constexpr (!kInterpreted<Cell>) return nullptr;
    else return f.saved ? p.cell->program->staged_forward : p.cell->program->staged_infer;
  }
  // Of a program that is linear in its states, where many steps at once are quicker; else null.
  const Scan* scan() const {
    if constexpr (!kInterpreted<Cell>) return nullptr;
    else return scanned(p, unit_vectors, f.saved ? p.cell->program->scan_forward : p.cell->program->scan_infer);
  }
  // Panels that a thread takes together: those of the matrices are as wide as a panel may be.
  int64_t grain() const { return kInterpreted<Cell> && p.cell->blocks > 0 ? kPanelVectors / units() : 1; }
  bool any_team() const { return true; }  // with the same bits
  int64_t parts() const { return scan() ? p.T : (panels + grain() - 1) / grain(); }
  int64_t first_panel(const Share& s, int me) const {
    const int64_t j = part(parts(), me, s.size) * grain();
    return j < panels ? j : panels;
  }

  Memory layout(Arena& arena, int threads_in_group, int me = 0) const {
    Memory m{};
    m.barrier = arena.take<int64_t>(Barrier::words(threads_in_group));
    if (!f.packed) Weighed::layout(arena, m);
    m.zero = arena.take<S>(kPanelVectors * L);
    m.pre = arena.take<S>((scan() ? ScanWork<S>::rows(p, threads_in_group) : chunk_steps * p.B) * row);
    for (int i = 1; i < ST; ++i) m.states[i] = arena.take<S>(p.B * state_stride);
    for (auto& h : m.h) h = arena.take<A>(p.B * h_stride);
    if (projects()) {
      m.m = arena.take<A>(p.B * m_stride);
      m.wide = arena.take<S>(p.B * out_vectors * L);
    }
    if (recurrent) m.pieces = diagonal.template take<Kind>(arena, p.B, columns, threads_in_group, me);
    if constexpr (kByBytes<Kind>) {
      m.x_bytes = arena.take<A>(threads_in_group * chunk_steps * p.B * byte_stride(p.D)) + me * chunk_steps * p.B * byte_stride(p.D);
      m.h_bytes = arena.take<A>(threads_in_group * p.B * byte_stride(p.P)) + me * p.B * byte_stride(p.P);
    }
    if (!direct_x) m.x = arena.take<A>(threads_in_group * chunk_steps * p.B * x_stride);
    if (staged()) m.stages = StageWork<Kind>::take(arena, *staged(), p.H, p.B, threads_in_group, me);
    else if (scan()) m.scan = ScanWork<S>::take(arena, *scan(), p, unit_vectors, 2 * ST, threads_in_group, me);
    else if constexpr (kInterpreted<Cell>)
      for (int i = 0; i < threads_in_group; ++i) {
        const auto work = Workspace<S>::take(arena, f.saved ? p.cell->program->forward : p.cell->program->infer);
        if (i == me) m.work = work;
      }
    return m;
  }

  // ---- set-up of a recurrence ----
  void load_state(const Memory& m, int r, int64_t b0, int64_t b1) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, p.start);
    for (int64_t b = b0; b < b1; ++b) {
      A* h = m.h[0] + b * h_stride;
      convert_row(h, (const S*)f.states[0] + (r * p.B + b) * p.P, p.P, h_stride);
      if (cut(t, b)) memset((void*)h, 0, size_t(h_stride) * sizeof(A));
      memset((void*)(m.h[1] + b * h_stride), 0, size_t(h_stride) * sizeof(A));
      if (projects()) memset((void*)(m.m + b * m_stride), 0, size_t(m_stride) * sizeof(A));
      for (int i = 1; i < ST; ++i)
        convert_row(m.states[i] + b * state_stride, (const S*)f.states[i] + (r * p.B + b) * p.H, p.H, state_stride);
    }
  }

  // ---- products ----
  // init + a W^T for panel j of the input's or of the recurrent weights; panel `next` follows (-1: none).
  void product(const Memory& m, const Weights& w, const A* a, int64_t lda, int64_t rows, bool input, int64_t j, int64_t next, const S* init,
               int64_t ldi, S* c) const {
    const int64_t u0 = j * units();
    if (input || diagonal.whole()) {
      const Piece whole{0, u0, int(last_vector(j + 1) - u0), u0};
      product<false>(m, w, a, lda, rows, input, whole, next < 0 ? -1 : next * units(), init, ldi, c);
    } else if constexpr (kInterpreted<Cell>) {
      by_pieces(m, w, a, lda, rows, j, next, c);
    }
  }
  // c += a W_hh^T, by pieces.
  __attribute__((noinline)) void by_pieces(const Memory& m, const Weights& w, const A* a, int64_t lda, int64_t rows, int64_t j,
                                           int64_t next, S* c) const {
    const int64_t after = next < 0 ? -1 : diagonal.slots(next * units());
    diagonal.for_pieces(j * units(), last_vector(j + 1), [&](const Piece& piece) __attribute__((always_inline)) {
      int64_t stride = lda;
      const A* const own = diagonal.template operand<Kind>(m.pieces, a + piece.block * columns, stride, rows, columns);
      product<true>(m, w, own, stride, rows, false, piece, after, c, row, c);
    });
  }
  // after: the slot from which on the next panel lies.
  template <bool of_block>
  ALWAYS_INLINE void product(const Memory& m, const Weights& w, const A* a, int64_t lda, int64_t rows, bool input, const Piece& piece,
                             int64_t after, const S* init, int64_t ldi, S* c) const {
    const int gates = input ? G : GH;
    const int64_t k = input ? p.D : columns;
    const bool shares = of_block && diagonal.shares(piece);
    for_parts(piece.vectors * gates, [&](int v0, int nv) __attribute__((always_inline)) {
      const int64_t from = (piece.u * PA + (input ? 0 : apart) + v0) * L, place = piece.slot * G + v0;
      TileArgs<Kind> tile{a, lda, nullptr, k, init + from, ldi, c + from, row};
      if (shares) tile.init = m.zero, tile.ldi = 0, tile.c = m.pieces.tile, tile.ldc = PieceWork<Kind>::kLd;
      if (kUnpackable && unpacked) {
        if constexpr (kUnpackable)
          for (int v = 0; v < nv; ++v) {
            const auto [first, lane, end] = rows_of(piece, input, v0 + v);
            multiply_rows<Kind, T>(rows, a, lda, (const T*)(input ? w.w_ih : w.w_hh) + (first + lane) * k, k, end - lane, k,
                                   tile.init + v * L, tile.ldi, tile.c + v * L + lane, tile.ldc);
          }
      } else {
        const W* packed = input ? m.w_ih : m.w_hh;
        tile.w = packed + panel_size<Kind>(k, 1) * place;
        tile.lone = !input && p.B == 1;  // how many steps go through the product at once must not show in the result
        if constexpr (kScaled<Kind>) tile.scale = (input ? m.scale_ih : m.scale_hh) + place * L;
        if (far && after >= 0) tile.ahead = (const char*)(packed + after * panel_size<Kind>(k, G) + panel_size<Kind>(k, v0));
        if constexpr (kByBytes<Kind>) multiply_bytes(rows, nv, tile);
        else multiply_panel<Kind>(rows, nv, tile, panel_size<Kind>(k, nv) * int64_t(sizeof(W)));
      }
      if (shares) diagonal.add(m.pieces, piece, gates, v0, nv, rows, c + from, row);
    });
  }

  // The input of steps [s0, s1): x itself where it is an operand as it stands, else converted rows.
  struct Operand {
    const A* a;
    int64_t lda, blocks, rows;  // `rows` rows from b0 on in each of `blocks` time steps; or one block of all rows of all steps
  };
  Operand stage_input(const Memory& m, int r, int me, int64_t s0, int64_t s1, int64_t b0, int64_t b1) const {
    const int64_t t0 = p.weights[r].direction > 0 ? s0 : p.T - s1, steps = s1 - s0;
    const T* x = (const T*)f.x.data + t0 * f.x.time + r * f.x.recurrence;
    const bool whole = b0 == 0 && b1 == p.B;
    const Operand in{(const A*)x, p.B == 1 ? f.x.time : f.x.batch, whole ? 1 : steps, whole ? steps * p.B : b1 - b0};
    if (direct_x) return in;
    A* copy = m.x + me * chunk_steps * p.B * x_stride;
    for (int64_t q = 0; q < steps; ++q)
      for (int64_t b = b0; b < b1; ++b) convert_row(copy + (q * p.B + b) * x_stride, x + q * f.x.time + b * f.x.batch, p.D, x_stride);
    return {copy, x_stride, in.blocks, in.rows};
  }
  // The same as bytes.
  Operand bytes_of(const Memory& m, const Operand& in, int64_t b0) const {
    const int64_t stride = byte_stride(p.D);
    for (int64_t q = 0; q < in.blocks; ++q)
      for (int64_t i = q * p.B + b0; i < q * p.B + b0 + in.rows; ++i) row_to_bytes(in.a + i * in.lda, p.D, m.x_bytes + i * stride);
    return {m.x_bytes, stride, in.blocks, in.rows};
  }
  // Its product, for panel j; panel `next` follows (-1: none).
  void input(const Memory& m, int r, const Operand& in, int64_t b0, int64_t j, int64_t next) const {
    for (int64_t q = 0; q < in.blocks; ++q) {
      S* c = m.pre + (q * p.B + b0) * row;
      product(m, p.weights[r], in.a + (q * p.B + b0) * in.lda, in.lda, in.rows, true, j, q + 1 == in.blocks ? next : -1, m.bias, 0, c);
      for (int64_t i = 0; i < in.rows && apart; ++i)  // the recurrent product's own columns start from their bias
        for (int v = G; v < PA; ++v) store(c + i * row + (j * PA + v) * L, load(m.bias + (j * PA + v) * L));
    }
  }

  // ---- the cell ----
  // Rows [b0, b1) of unit vectors [u0, u1): from pre-activations to h_t (or, with a projection, what it multiplies) and c_t.
  // What the loop reads of the problem is copied first: the compiler must assume that a vector store may change the original.
  __attribute__((noinline)) void cell(const Memory& m, int r, int64_t step, const S* pre, const A* h_in, A* h_out, int64_t u0, int64_t u1,
                                      int64_t b0, int64_t b1) const {
    if constexpr (kInterpreted<Cell>) return interpreted(m, r, step, pre, h_in, h_out, u0, u1, b0, b1);
    else compiled(m, r, step, pre, h_in, h_out, u0, u1, b0, b1);
  }
  ALWAYS_INLINE void compiled(const Memory& m, int r, int64_t step, const S* pre, const A* h_in, A* h_out, int64_t u0, int64_t u1,
                              int64_t b0, int64_t b1) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, step), t_row = t - first_time(p, r), t_next = t + w.direction;
    const int64_t H = p.H, R = p.R, pre_stride = row, in_stride = h_stride, kept_stride = state_stride, unprojected_stride = m_stride;
    const bool project = projects(), last = step + 1 == p.T, masked = p.lengths || p.reset;
    T* const y = project ? nullptr : at<T>(f.y, (t * p.B * R + r) * H);
    T* const hidden = project ? nullptr : at<T>(f.hidden, (t * p.B * R + r) * H);
    T* const saved = SV ? at<T>(f.saved, (t_row * p.B * R + r) * SV * H) : nullptr;
    A* const unprojected = m.m;
    const S* const own_params = m.params;
    S* states[ST];
    T* histories[ST];
    for (int i = 1; i < ST; ++i) states[i] = m.states[i], histories[i] = at<T>(f.histories[i], (t_row * p.B * R + r) * H);
    const auto body = [&](auto size, const auto& units, const auto& rows) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      using P = Pack<S, N>;
      bool on[N], zero[N], zero_next[N];
      P a[PA], s[SV ? SV : 1], before[ST] = {}, params[fused_rnn::kParams<Cell>] = {}, after[ST];
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        const int64_t b = rows[e], first = units[e] * L;
        on[e] = true, zero[e] = zero_next[e] = false;
        if (masked) on[e] = active(t, b), zero[e] = cut(t, b), zero_next[e] = !last && cut(t_next, b);
        const S* a_row = pre + b * pre_stride + first * PA;
#pragma GCC unroll 4
        for (int i = 0; i < PA; ++i) a[i].v[e] = load(a_row + column(i) * L);
#pragma GCC unroll 4
        for (int i = 0; i < NP; ++i) params[i].v[e] = load(own_params + i * kept_stride + first);
#pragma GCC unroll 4
        for (int i = 1; i < ST; ++i)
          if (!zero[e]) before[i].v[e] = load(states[i] + b * kept_stride + first);
        if (Cell::reads_h) before[0].v[e] = load(h_in + b * in_stride + first);
      }
      Cell::template forward<Polynomial<S, N>>(a, before, params, after, s);
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        const int64_t b = rows[e], first = units[e] * L, out = b * R * H + first;
        const int n = lanes_left(H, first, L);
#pragma GCC unroll 4
        for (int i = 1; i < ST; ++i)
          if (on[e]) store(states[i] + b * kept_stride + first, after[i].v[e]);
        V now = rounded<T>(after[0].v[e]);
        if (project) {
          store(unprojected + b * unprojected_stride + first, zero_padded<Kind>(now, n));
        } else {
          V keep = now;
          if (!on[e]) keep = load(h_in + b * in_stride + first), now = V{};  // not running at this step: as it was
          if (y) store(y + out, now, n);
          if (hidden) store(hidden + out, now, n);
          if (zero_next[e]) keep = V{};
          store(h_out + b * in_stride + first, zero_padded<Kind>(keep, n));
        }
        if (saved) {
          T* const kept = saved + b * R * SV * H + first;
#pragma GCC unroll 4
          for (int i = 0; i < SV; ++i) store(kept + i * H, s[i].v[e], n);
        }
#pragma GCC unroll 4
        for (int i = 1; i < ST; ++i)
          if (histories[i]) store(histories[i] + out, on[e] ? after[i].v[e] : V{}, n);
      }
    };
    if (saved) for_packs<kKeepingPack>(u0, u1, b0, b1, body);
    else for_packs<kPack>(u0, u1, b0, b1, body);
  }

  // The same by a program.
  void interpreted(const Memory& m, int r, int64_t step, const S* pre, const A* h_in, A* h_out, int64_t u0, int64_t u1, int64_t b0,
                   int64_t b1) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, step), t_row = t - first_time(p, r), t_next = t + w.direction;
    const int64_t H = p.H, R = p.R;
    const bool last = step + 1 == p.T, masked = p.lengths || p.reset;
    T* const y = at<T>(f.y, (t * p.B * R + r) * H);
    T* const hidden = at<T>(f.hidden, (t * p.B * R + r) * H);
    T* const saved = at<T>(f.saved, (t_row * p.B * R + r) * SV * H);
    const Workspace<S>& work = m.work;
    const Bytecode& code = *work.code;
    for_strips(u0, u1, b0, b1, work.most, [&](const Strip& strip) {
      const int n = strip.n;
      bool on[kStrip], zero_next[kStrip];
      for (int e = 0; e < n; ++e) on[e] = true, zero_next[e] = false;
      if (masked)
        for (int e = 0; e < n; ++e) {
          const int64_t b = strip.row_of(e);
          on[e] = active(t, b), zero_next[e] = !last && cut(t_next, b);
          if (cut(t, b))
            for (int i = 1; i < ST; ++i) store(m.states[i] + b * state_stride + strip.unit_of(e) * L, V{});
        }
      Place<S>* const in = work.operands;
      for (int i = 0; i < PA; ++i) in[i] = {pre + strip.first(PA * L, row) + column(i) * L, strip.step(PA * L, row)};
      if (code.reads[PA]) {
        if constexpr (sizeof(A) == sizeof(S)) {
          in[PA] = {h_in + strip.first(L, h_stride), strip.step(L, h_stride)};
        } else {
          for (int e = 0; e < n; ++e) store(work.copy(PA) + e * L, load(h_in + strip.row_of(e) * h_stride + strip.unit_of(e) * L));
        }
      }
      for (int i = 1; i < ST; ++i) in[PA + i] = {m.states[i] + strip.first(L, state_stride), strip.step(L, state_stride)};
      for (int i = 0; i < NP; ++i) in[PA + ST + i] = {m.params + i * state_stride + strip.unit * L, strip.step(L, 0)};
      for (int i = 0; i < p.cell->masks; ++i) work.lies(strip, PA + ST + NP + i, (const T*)w.masks[i] + t * w.mask_time[i], H, H);
      interpret(code, in, n);
      const auto out = [&](int i, auto function) __attribute__((always_inline)) {
        const Place<S> value = work.output(i);
        for (int e = 0; e < n; ++e) function(e, value[e], strip.row_of(e), strip.unit_of(e) * L);
      };
      for (int i = 0; i < SV && saved; ++i)
        out(ST + i, [&](int, V v, int64_t b, int64_t first) { store(saved + (b * R * SV + i) * H + first, v, lanes_left(H, first, L)); });
      for (int i = 1; i < ST; ++i)
        if (T* const history = at<T>(f.histories[i], (t_row * p.B * R + r) * H))
          out(i,
              [&](int e, V v, int64_t b, int64_t first) { store(history + b * R * H + first, on[e] ? v : V{}, lanes_left(H, first, L)); });
      out(0, [&](int e, V v, int64_t b, int64_t first) {
        const int lanes = lanes_left(H, first, L);
        V now = rounded<T>(v), keep = now;
        if (!on[e]) keep = load(h_in + b * h_stride + first), now = V{};
        if (y) store(y + b * R * H + first, now, lanes);
        if (hidden) store(hidden + b * R * H + first, now, lanes);
        if (zero_next[e]) keep = V{};
        store(h_out + b * h_stride + first, zero_padded<Kind>(keep, lanes));
      });
      for (int i = 1; i < ST; ++i)
        out(i, [&](int e, V v, int64_t b, int64_t first) {
          if (on[e]) store(m.states[i] + b * state_stride + first, v);
        });
    });
  }

  // h = W_hr m for output vectors [v0, v1), rows [b0, b1).
  void project(const Memory& m, int r, int64_t step, const A* h_in, A* h_out, int64_t v0, int64_t v1, int64_t b0, int64_t b1) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, step), t_next = t + w.direction;
    const bool last = step + 1 == p.T;
    for (int64_t v = v0; v < v1; ++v) {
      const int n = lanes_left(p.P, v * L, L);
      S* c = m.wide + b0 * out_vectors * L + v * L;
      const A* a = m.m + b0 * m_stride;
      bool done = false;
      if constexpr (kUnpackable) {
        if (unpacked) {
          multiply_rows<Kind, T>(b1 - b0, a, m_stride, (const T*)w.w_hr + v * L * p.H, p.H, n, p.H, m.zero, 0, c, out_vectors * L);
          done = true;
        }
      }
      if (!done) {
        TileArgs<Kind> tile{a, m_stride, m.w_hr + v * panel_size<Kind>(p.H, 1), p.H, m.zero, 0, c, out_vectors * L};
        if constexpr (kScaled<Kind>) tile.scale = m.scale_hr + v * L;
        tile.lone = p.B == 1;
        if constexpr (!kByBytes<Kind>) multiply_panel<Kind>(b1 - b0, 1, tile);  // of bytes there are none with a projection
      }
      for (int64_t b = b0; b < b1; ++b) {
        V h = rounded<T>(load(m.wide + (b * out_vectors + v) * L)), keep = h;
        if (!active(t, b)) keep = load(h_in + b * h_stride + v * L), h = V{};
        const int64_t out = (t * p.B + b) * p.R + r;
        if (f.y) store((T*)f.y + out * p.P + v * L, h, n);
        if (f.hidden) store((T*)f.hidden + out * p.P + v * L, h, n);
        if (!last && cut(t_next, b)) keep = V{};
        store(h_out + b * h_stride + v * L, zero_padded<Kind>(keep, n));
      }
    }
  }

  // Rows that no longer run at this step, or do not yet, and were left out of it: zeros come out, the state stays.
  void rest(int r, int64_t step, const A* h_in, A* h_out, Rows rows) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, step), t_row = t - first_time(p, r), t_next = t + w.direction;
    const bool last = step + 1 == p.T;
    for (int64_t b = rows.from; b < rows.to; ++b) {
      const auto clear = [&](void* base, int64_t time, int64_t width) {
        if (base) memset((T*)base + ((time * p.B + b) * p.R + r) * width, 0, size_t(width) * sizeof(T));
      };
      clear(f.y, t, p.P);
      clear(f.hidden, t, p.P);
      if (SV) clear(f.saved, t_row, SV * p.H);
      for (int i = 1; i < ST; ++i) clear(f.histories[i], t_row, p.H);
      if (!last && cut(t_next, b)) memset((void*)(h_out + b * h_stride), 0, size_t(h_stride) * sizeof(A));
      else memcpy((void*)(h_out + b * h_stride), h_in + b * h_stride, size_t(h_stride) * sizeof(A));
    }
  }

  void checkpoint(const Memory& m, int r, int64_t step, int64_t b0, int64_t b1) const {
    for (int i = 1; i < ST; ++i)
      for (int64_t b = b0; b < b1; ++b) {
        S* out = (S*)f.checkpoints[i] + ((step / f.every * p.R + r) * p.B + b) * p.H;
        memcpy(out, m.states[i] + b * state_stride, size_t(p.H) * sizeof(S));
      }
  }

  void recurrence(Memory m, int r, const Share& s) const {
    const Weights& w = p.weights[r];
    if (f.packed) {
      Arena whole{(char*)f.packed[r]};
      Weighed::layout(whole, m);
    }
    Barrier barrier(m.barrier, s.size);
    const int64_t b0 = s.by_rows ? part(p.B, s.me, s.size) : 0, b1 = s.by_rows ? part(p.B, s.me + 1, s.size) : p.B;
    const int64_t j0 = s.by_rows ? 0 : first_panel(s, s.me), j1 = s.by_rows ? panels : first_panel(s, s.me + 1);
    const int64_t v0 = s.by_rows ? 0 : part(out_vectors, s.me, s.size), v1 = s.by_rows ? out_vectors : part(out_vectors, s.me + 1, s.size);
    const bool split_units = !s.by_rows && s.size > 1, project_h = projects();
    // A cell without W_hh reads its own units alone; what goes by rows does not: the ends of sequences, checkpoints.
    const bool every_step = split_units && (recurrent || p.lengths || project_h || (ST > 1 && f.every) || staged());

    if constexpr (!kNarrow<Kind>) {  // those come packed
      if (!unpacked && !f.packed) {
        Weighed::pack(m, w, part(panels, s.me, s.size), part(panels, s.me + 1, s.size));
        if (project_h) Weighed::pack_projection(m, w, part(out_vectors, s.me, s.size), part(out_vectors, s.me + 1, s.size));
        if constexpr (kInterpreted<Cell>) {
          const int64_t all = p.cell->blocks * block_panels();
          Weighed::pack_blocks(m, w, part(all, s.me, s.size), part(all, s.me + 1, s.size));
        }
      }
    }
    if (s.me == 0) {
      if (!f.packed) Weighed::fill_vectors(m, w);
      for (int v = 0; v < kPanelVectors; ++v) store(m.zero + v * L, V{});
    }
    load_state(m, r, part(p.B, s.me, s.size), part(p.B, s.me + 1, s.size));
    using OfStages = ForwardStages<ForwardLoop, Kind, T>;
    if constexpr (kInterpreted<Cell>)
      if (staged()) OfStages(*this, m, r, s, j0 * units(), last_vector(j1), b0, b1).prepare();
    barrier.wait(s.me);
    if (scan()) ForwardScan<ForwardLoop, Kind, T>(*this, m, r, s).run(barrier);

    // Every other step runs the panels from the end: what the caches still hold of the weights comes first. So does every other
    // call on weights as they stand, which a stream of single steps makes.
    // Of very few rows, several panels go through the cell together, for it to have a pack of vectors. Where weights come from L2 that
    // would only part the reading from the arithmetic, which otherwise overlap.
    const bool near = recurrent_size() * int64_t(sizeof(W)) <= kNearestBytes;
    int64_t at_once = near && b1 - b0 < kPack ? kPack : 1;
    // A program costs the same for one vector as for a few.
    if (kInterpreted<Cell> && b1 - b0 < kFewVectors) at_once = (kFewVectors + units() - 1) / units();
    const int64_t blocks = (j1 - j0 + at_once - 1) / at_once;
    if constexpr (kInterpreted<Cell>)
      if (!staged() && !scan()) m.work.prepare();
    static thread_local int calls = 0;
    const int64_t turn = f.packed ? f.turn : unpacked ? calls++ : 0;
    const A* h_in = m.h[0];
    A* h_out = m.h[1];
    for (int64_t s0 = p.start; s0 < p.stop && !scan(); s0 += chunk_steps) {
      const int64_t s1 = s0 + chunk_steps < p.stop ? s0 + chunk_steps : p.stop;
      const int64_t chunk_end = live_end(p, w.direction > 0 ? s0 : p.T - s1, b0, b1);  // at its earliest time
      Operand in = stage_input(m, r, s.me, s0, s1, b0, chunk_end);
      if constexpr (kByBytes<Kind>) in = bytes_of(m, in, b0);
      const bool by_panel = s1 - s0 == 1;  // both products of a panel and its cells at once
      for (int64_t j = j0; j < j1 && !by_panel && in.rows; ++j) input(m, r, in, b0, j, j + 1 < j1 ? j + 1 : -1);
      for (int64_t step = s0; step < s1; ++step) {
        S* pre = m.pre + (w.direction > 0 ? step - s0 : s1 - 1 - step) * p.B * row;
        if (ST > 1 && f.every && step % f.every == 0) {
          checkpoint(m, r, step, part(p.B, s.me, s.size), part(p.B, s.me + 1, s.size));
          if (split_units) barrier.wait(s.me);  // states of all units are read there, before this step changes them
        }
        const bool skip = !recurrent || (step == p.start && f.h_is_zero), from_end = (step + turn) & 1;
        const int64_t end = live_end(p, time(w, step), b0, chunk_end);
        const A* h = h_in + b0 * h_stride;
        int64_t h_row = h_stride;
        if constexpr (kByBytes<Kind>) {
          h = m.h_bytes, h_row = byte_stride(p.P);
          for (int64_t b = b0; b < end && !skip; ++b) row_to_bytes(h_in + b * h_stride, p.P, m.h_bytes + (b - b0) * h_row);
        }
        for (int64_t i = 0; i < blocks && end > b0; ++i) {
          const int64_t ja = j0 + (from_end ? blocks - 1 - i : i) * at_once, jb = ja + at_once < j1 ? ja + at_once : j1;
          const int64_t after = from_end ? ja - 1 : jb, next = after >= j0 && after < j1 ? after : -1;
          S* c = pre + b0 * row;
          for (int64_t j = ja; j < jb; ++j) {
            if (by_panel) input(m, r, in, b0, j, next);
            if (!skip) product(m, w, h, h_row, end - b0, false, j, next, c, row, c);
          }
          if (!staged()) cell(m, r, step, pre, h_in, h_out, ja * units(), last_vector(jb), b0, end);
        }
        if constexpr (kInterpreted<Cell>)
          if (staged() && end > b0)
            OfStages(*this, m, r, s, j0 * units(), last_vector(j1), b0, b1).step(barrier, step, pre, h_in, h_out, b0, end);
        if (project_h) {
          if (split_units) barrier.wait(s.me);
          if (end > b0) project(m, r, step, h_in, h_out, v0, v1, b0, end);
        }
        if (end < b1) rest(r, step, h_in, h_out, Rows(s, end, b1));
        if (every_step) barrier.wait(s.me);
        A* next = const_cast<A*>(h_in);
        h_in = h_out;
        h_out = next;
      }
    }
    if (split_units && !every_step) barrier.wait(s.me);
    for (int64_t b = part(p.B, s.me, s.size); b < part(p.B, s.me + 1, s.size); ++b) {
      convert_row((S*)f.states[0] + (r * p.B + b) * p.P, h_in + b * h_stride, p.P, p.P);
      for (int i = 1; i < ST; ++i) memcpy((S*)f.states[i] + (r * p.B + b) * p.H, m.states[i] + b * state_stride, size_t(p.H) * sizeof(S));
    }
    barrier.wait(s.me);
  }

  static void run(const Forward& forward) { Team<ForwardLoop>::run(ForwardLoop(forward)); }
};

}  // namespace FUSED_RNN_ISA
