// The backward time loop, for every cell, dtype and ISA: from the gradients of the outputs to those of the pre-activations,
// step by step from the end:   dh_t = dy_t + carry + dgates_{t+1} W_hh;   cell backward -> dgates_t, dc, carry.
// The gradients of weights and inputs are products over all steps at once and come after the loop (ops/cpu_backward.cpp).
#pragma once
#include "backward_scan.h"
#include "backward_stages.h"
#include "diagonal.h"

namespace FUSED_RNN_ISA {

template <class Kind, class T, class Cell>
struct BackwardLoop : Counts<Cell> {
  using A = typename Kind::Operand;
  using S = typename Kind::Accumulator;
  using V = Vec<S>;
  using C = Counts<Cell>;
  using C::G, C::GH, C::PA, C::DG, C::SV, C::ST, C::NP, C::apart, C::recurrent;
  using C::p, C::time, C::active, C::cut;
  static constexpr int L = kLanes<S>;

  const Backward& f;
  const Diagonal<Cell, L> diagonal;  // of W_hh's columns
  int64_t segments, depth;  // a product with W_hh in as many parts, of so many k each: with blocks one for each gate
  int64_t unit_vectors, out_vectors, panels;  // panels of kPanelVectors vectors of units
  int64_t gate_stride, out_stride, dh_stride, unit_stride;
  bool project;
  bool far;  // W_hh does not fit L2 together with the rest

  struct Memory {
    int64_t* barrier;
    A *w_hh, *w_hr, *blocks;
    S *dh, *dm, *zero;
    S* dstates[Cell::states];  // but dh
    A *gates[2], *out;
    S* params;  // [NP, unit_stride]
    Workspace<S> work;  // a program's, of this thread
    StageWork<Kind> stages;  // the same, of one with stages
    PieceWork<Kind> pieces;
    ScanWork<S> scan;        // the same, of one that is linear in its states
  };

  BackwardLoop(const Backward& backward)
      : C(backward.p),
        f(backward),
        diagonal(p, p.P),
        segments(diagonal.whole() ? 1 : GH),
        depth(diagonal.whole() ? GH * p.H : diagonal.size) {
    unit_vectors = (p.H + L - 1) / L;
    out_vectors = (p.P + L - 1) / L;
    panels = (unit_vectors + kPanelVectors - 1) / kPanelVectors;
    gate_stride = row_stride<Kind>(GH * p.H);
    out_stride = row_stride<Kind>(p.P);
    dh_stride = off_pages<S>(out_vectors * L);
    unit_stride = off_pages<S>(unit_vectors * L);
    project = !kInterpreted<Cell> && p.weights[0].w_hr != nullptr;
    far = recurrent && packed_size(out_vectors) * int64_t(sizeof(A)) > kNearBytes;
  }

  // Elements of the packed W_hh before vector u.
  int64_t packed_size(int64_t u) const { return diagonal.slots(u) * segments * panel_size<Kind>(depth, 1); }

  Memory layout(Arena& arena, int threads_in_group, int me = 0) const {
    Memory m{};
    m.barrier = arena.take<int64_t>(Barrier::words(threads_in_group));
    if (recurrent) {
      m.w_hh = arena.take<A>(packed_size(out_vectors));
      m.pieces = diagonal.template take<Kind>(arena, p.B, depth, threads_in_group, me);
    }
    m.dh = arena.take<S>(p.B * dh_stride);
    for (int i = 1; i < ST; ++i) m.dstates[i] = arena.take<S>(p.B * unit_stride);
    for (auto& g : m.gates) g = arena.take<A>(p.B * gate_stride);
    if (project) {
      m.w_hr = arena.take<A>(unit_vectors * panel_size<Kind>(p.P, 1));
      m.dm = arena.take<S>(p.B * unit_stride);
      m.out = arena.take<A>(p.B * out_stride);
    }
    if (project || diagonal.cuts_vectors()) m.zero = arena.take<S>(kPanelVectors * L);
    if (NP > 0) m.params = arena.take<S>(NP * unit_stride);
    if (staged()) {
      m.blocks = arena.take<A>(p.cell->blocks * unit_vectors * panel_size<Kind>(p.H, 1));
      m.stages = StageWork<Kind>::take(arena, *staged(), p.H, p.B, threads_in_group, me);
    } else if (scan()) {
      m.scan = ScanWork<S>::take(arena, *scan(), p, unit_vectors, ST + NP, threads_in_group, me);
    } else if constexpr (kInterpreted<Cell>)
      for (int i = 0; i < threads_in_group; ++i) {
        const auto work = Workspace<S>::take(arena, p.cell->program->backward);
        if (i == me) m.work = work;
      }
    return m;
  }

  // Of a program with stages; else null.
  const fused_rnn::Stages* staged() const {
    if constexpr (!kInterpreted<Cell>) return nullptr;
    else return p.cell->program->staged_backward;
  }
  const Scan* scan() const {  // as in forward.h
    if constexpr (!kInterpreted<Cell>) return nullptr;
    else return scanned(p, unit_vectors, p.cell->program->scan_backward);
  }
  bool any_team() const { return !staged(); }  // with the same bits: in stages, gradients of params are summed over the rows of a strip
  int64_t parts() const { return scan() ? p.T : panels; }
  static int vectors_of(int64_t j, int64_t total) {
    return int(total - j * kPanelVectors < kPanelVectors ? total - j * kPanelVectors : kPanelVectors);
  }

  // Panels [j0, j1) of W [k, n] as it stands, to multiply from the right.
  void pack(A* packed, const void* w, int64_t k, int64_t n, int64_t vectors, int64_t j0, int64_t j1) const {
    for (int64_t j = j0; j < j1; ++j)
      for (int v = 0; v < vectors_of(j, vectors); ++v) {
        const int64_t column = (j * kPanelVectors + v) * L;
        pack_columns<Kind, T>(packed + j * kPanelVectors * panel_size<Kind>(k, 1), vectors_of(j, vectors), v, (const T*)w + column, n,
                              lanes_left(n, column, L), k);
      }
  }

  // The same of W_hh, by pieces: of each, its vectors for one segment after the other.
  void pack_recurrent(A* packed, const T* w, int64_t j0, int64_t j1) const {
    const int64_t ld = diagonal.size;
    for (int64_t j = j0; j < j1; ++j)
      diagonal.for_pieces(j * kPanelVectors, j * kPanelVectors + vectors_of(j, out_vectors), [&](const Piece& piece) {
        for (int64_t s = 0; s < segments; ++s)
          for (int v = 0; v < piece.vectors; ++v) {
            const int64_t u = piece.u + v;
            pack_columns<Kind, T>(packed + panel_size<Kind>(depth, 1) * (piece.slot * segments + s * piece.vectors), piece.vectors, v,
                                  w + (s * p.H + piece.block * depth) * ld + (u * L - piece.block * ld), ld, diagonal.end_lane(piece, u),
                                  depth, 0, diagonal.first_lane(piece, u));
          }
      });
  }

  void load_state(const Memory& m, int r, int64_t b0, int64_t b1) const {
    for (int64_t b = b0; b < b1; ++b) {
      convert_row(m.dh + b * dh_stride, (const S*)f.dstates[0] + (r * p.B + b) * p.P, p.P, dh_stride);
      for (int i = 1; i < ST; ++i)
        convert_row(m.dstates[i] + b * unit_stride, (const S*)f.dstates[i] + (r * p.B + b) * p.H, p.H, unit_stride);
      for (auto* g : m.gates) memset((void*)(g + b * gate_stride), 0, size_t(gate_stride) * sizeof(A));
      if (project) memset((void*)(m.out + b * out_stride), 0, size_t(out_stride) * sizeof(A));
    }
  }

  // dh of panel j, rows [b0, b1): what came past the matrix, plus dgates W_hh, plus dy (t < 0: none). Panel `next` follows.
  void hidden_gradient(const Memory& m, int r, int64_t t, const A* gates, int64_t j, int64_t next, int64_t b0, int64_t b1) const {
    if (b0 == b1) return;
    const int nv = vectors_of(j, out_vectors);
    S* dh = m.dh + b0 * dh_stride + j * kPanelVectors * L;
    if (f.dy && t >= 0 && (project || kInterpreted<Cell>))  // else the cell adds it
      for (int64_t b = b0; b < b1; ++b) {
        if (!active(t, b)) continue;
        const T* dy = (const T*)f.dy + ((t * p.B + b) * p.R + r) * p.P + j * kPanelVectors * L;
        S* out = dh + (b - b0) * dh_stride;
        for (int v = 0; v < nv; ++v)
          store(out + v * L, load(out + v * L) + load(dy + v * L, lanes_left(p.P, (j * kPanelVectors + v) * L, L)));
      }
    if (!gates || !recurrent) return;
    const int64_t u0 = j * kPanelVectors;
    if (diagonal.whole()) multiply<false>(m, gates + b0 * gate_stride, {0, u0, nv, u0}, next, dh, b1 - b0);
    else if constexpr (kInterpreted<Cell>) by_pieces(m, gates + b0 * gate_stride, u0, u0 + nv, next, dh, b1 - b0);
  }
  __attribute__((noinline)) void by_pieces(const Memory& m, const A* gates, int64_t u0, int64_t u1, int64_t next, S* dh,
                                           int64_t rows) const {
    diagonal.for_pieces(u0, u1, [&](const Piece& piece) __attribute__((always_inline)) {
      multiply<true>(m, gates, piece, next, dh + (piece.u - u0) * L, rows);
    });
  }
  // dh += dgates W_hh of a piece. next: the panel that follows.
  template <bool of_block>
  ALWAYS_INLINE void multiply(const Memory& m, const A* gates, const Piece& piece, int64_t next, S* dh, int64_t rows) const {
    const bool shares = of_block && segments > 0 && diagonal.shares(piece);  // no segments: no formula reads a gate's recurrent side
    for (int64_t s = 0; s < (of_block ? segments : 1); ++s) {
      const int64_t before = s * panel_size<Kind>(depth, piece.vectors);
      int64_t stride = gate_stride;
      const A* const a = diagonal.template operand<Kind>(m.pieces, gates + s * p.H + piece.block * depth, stride, rows, depth);
      TileArgs<Kind> tile{a,  stride,   m.w_hh + piece.slot * segments * panel_size<Kind>(depth, 1) + before, depth, dh, dh_stride,
                          dh, dh_stride};
      if (shares) {
        tile.c = m.pieces.tile, tile.ldc = PieceWork<Kind>::kLd;
        tile.init = s == 0 ? m.zero : tile.c, tile.ldi = s == 0 ? 0 : tile.ldc;
      }
      tile.lone = p.B == 1;
      if (far && next >= 0) tile.ahead = (const char*)(m.w_hh + packed_size(next * kPanelVectors) + before);
      multiply_panel<Kind>(rows, piece.vectors, tile, panel_size<Kind>(depth, piece.vectors) * int64_t(sizeof(A)));
    }
    if (shares) diagonal.add(m.pieces, piece, 1, 0, piece.vectors, rows, dh, dh_stride);
  }

  // With a projection: hands the finished dh_t on, as operand of dm = dh W_hr and for W_hr's own gradient.
  void release_projected(const Memory& m, int r, int64_t t, int64_t t_row, int64_t j, int64_t b0, int64_t b1) const {
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t v = j * kPanelVectors; v < j * kPanelVectors + vectors_of(j, out_vectors); ++v) {
        const bool on = active(t, b);
        S* dh = m.dh + b * dh_stride + v * L;
        const V d = on ? load(dh) : V{};
        if (on) store(dh, V{});
        const int n = lanes_left(p.P, v * L, L);
        store(m.out + b * out_stride + v * L, zero_padded<Kind>(d, n));
        store((T*)f.dprojected + ((t_row * p.B + b) * p.R + r) * p.P + v * L, d, n);
      }
  }

  // The cell's backward for rows [b0, b1) of panel j; `gates` takes the operand of the next (earlier) step. Copies as in forward.h.
  __attribute__((noinline)) void cell(const Memory& m, int r, int64_t step, A* gates, int64_t j, int64_t b0, int64_t b1) const {
    if constexpr (kInterpreted<Cell>) return interpreted(m, r, step, gates, j, b0, b1);
    else compiled(m, r, step, gates, j, b0, b1);
  }
  ALWAYS_INLINE void compiled(const Memory& m, int r, int64_t step, A* gates, int64_t j, int64_t b0, int64_t b1) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, step), t_prev = t - w.direction, t_row = t - first_time(p, r), shift = f.whole ? 0 : first_time(p, r);
    const int64_t B = p.B, R = p.R, H = p.H, width = p.P, gates_stride = gate_stride, state_stride = unit_stride;
    const int64_t dh_row = project ? unit_stride : dh_stride;
    const bool has_prev = step > p.start || (f.whole && step > 0), masked = p.lengths || p.reset, projects = project;
    const int64_t row = t * B * R + r, row_prev = (has_prev ? t_prev : t) * B * R + r, kept_shift = shift * B * R;
    const T* const saved = at<const T>(f.saved, (row - kept_shift) * SV * H);
    const T* const hidden = at<const T>(f.hidden, row * width);
    const T* const dy = projects ? nullptr : at<const T>(f.dy, row * width);
    const T* const hidden_prev = at<const T>(f.hidden, row_prev * width);
    const S* const h0 = at<const S>(f.first[0], r * B * width);
    T* const dgates = at<T>(f.dgates, (t_row * B * R + r) * DG * H);
    T* const unprojected = at<T>(f.unprojected, (t_row * B * R + r) * H);
    S* const dh_rows = projects ? m.dm : m.dh;
    const S* const own_params = m.params;
    S* const dparams_rows = at<S>(f.dparams, r * B * NP * H);
    const T* dsequences[ST];
    const T *histories[ST], *histories_prev[ST];
    const S* first_states[ST];
    S* dstates[ST];
    for (int i = 1; i < ST; ++i) {
      histories[i] = at<const T>(f.histories[i], (row - kept_shift) * H);
      histories_prev[i] = at<const T>(f.histories[i], (row_prev - kept_shift) * H);
      first_states[i] = at<const S>(f.first[i], r * B * H);
      dstates[i] = m.dstates[i];
      dsequences[i] = at<const T>(f.dsequences[i], row * H);
    }
    constexpr int most = ST > 1 ? 2 : 1;  // cells of one state have no activation here
    const auto body = [&](auto size, const int64_t (&units)[most], const int64_t (&rows)[most]) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      using P = Pack<S, N>;
      bool on[N], zero[N];
      P s[SV ? SV : 1] = {}, before[ST] = {}, after[ST] = {}, dstate[ST], d[PA];
      P params[fused_rnn::kParams<Cell>] = {}, dparams[fused_rnn::kParams<Cell>];
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        const int64_t b = rows[e], first = units[e] * L;
        const int n = lanes_left(H, first, L);
        bool from_memory = has_prev;
        on[e] = true, zero[e] = false;
        if (masked) on[e] = active(t, b), zero[e] = cut(t, b), from_memory = has_prev && active(t_prev, b);
#pragma GCC unroll 4
        for (int i = 0; i < SV; ++i) s[i].v[e] = load(saved + (b * R * SV + i) * H + first, n);
#pragma GCC unroll 4
        for (int i = 1; i < ST; ++i) {
          if (Cell::backward_after >> i & 1) after[i].v[e] = load(histories[i] + b * R * H + first, n);
          if ((Cell::backward_before >> i & 1) && !zero[e])
            before[i].v[e] = from_memory ? load(histories_prev[i] + b * R * H + first, n) : load(first_states[i] + b * H + first, n);
          dstate[i].v[e] = load(dstates[i] + b * state_stride + first);
          if (dsequences[i] && on[e]) dstate[i].v[e] += load(dsequences[i] + b * R * H + first, n);
        }
        if (Cell::backward_after & 1) after[0].v[e] = load(hidden + b * R * width + first, n);
        if ((Cell::backward_before & 1) && !zero[e])
          before[0].v[e] = from_memory ? load(hidden_prev + b * R * width + first, n) : load(h0 + b * width + first, n);
        dstate[0].v[e] = load(dh_rows + b * dh_row + first);
        if (dy && on[e]) dstate[0].v[e] += load(dy + b * R * width + first, n);
#pragma GCC unroll 4
        for (int i = 0; i < NP; ++i) params[i].v[e] = load(own_params + i * state_stride + first);
      }
      Cell::template backward<Polynomial<S, N>>(s, before, params, after, dstate, d, dparams);
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        const int64_t b = rows[e], first = units[e] * L;
        const int n = lanes_left(H, first, L);
        if (on[e]) {
#pragma GCC unroll 4
          for (int i = 1; i < ST; ++i) store(dstates[i] + b * state_stride + first, zero[e] ? V{} : dstate[i].v[e]);
          if (!projects) store(dh_rows + b * dh_row + first, zero[e] ? V{} : dstate[0].v[e]);
        }
        if (projects) store(unprojected + b * R * H + first, on[e] ? after[0].v[e] : V{}, n);
        T* const out = dgates + b * R * DG * H + first;
        A* const operand = gates + b * gates_stride + first;
#pragma GCC unroll 4
        for (int i = 0; i < PA; ++i) {
          const V gradient = on[e] ? d[i].v[e] : V{};
          store(out + i * H, gradient, n);
          if (recurrent && i >= apart) store(operand + (i - apart) * H, zero[e] ? V{} : gradient, n);
        }
        if (NP > 0 && dparams_rows && on[e])
#pragma GCC unroll 4
          for (int i = 0; i < NP; ++i) {
            S* const sum = dparams_rows + (b * NP + i) * H + first;
            store(sum, load(sum, n) + dparams[i].v[e], n);
          }
      }
    };
    for_packs<most>(j * kPanelVectors, j * kPanelVectors + vectors_of(j, unit_vectors), b0, b1, body);
  }

  // The same by a program.
  void interpreted(const Memory& m, int r, int64_t step, A* gates, int64_t j, int64_t b0, int64_t b1) const {
    const Weights& w = p.weights[r];
    const int64_t t = time(w, step), t_prev = t - w.direction, t_row = t - first_time(p, r), shift = f.whole ? 0 : first_time(p, r);
    const int64_t B = p.B, R = p.R, H = p.H;
    const bool has_prev = step > p.start || (f.whole && step > 0), masked = p.lengths || p.reset;
    const int64_t row = t * B * R + r, row_prev = (has_prev ? t_prev : t) * B * R + r, kept_shift = shift * B * R;
    T* const dgates = at<T>(f.dgates, (t_row * B * R + r) * PA * H);
    S* const dparams = at<S>(f.dparams, r * B * NP * H);
    const Workspace<S>& work = m.work;
    const Bytecode& code = *work.code;
    const auto strip_of = [&](const Strip& strip) {
      const int n = strip.n;
      bool on[kStrip], zero[kStrip];
      for (int e = 0; e < n; ++e) on[e] = true, zero[e] = false;
      if (masked)
        for (int e = 0; e < n; ++e) on[e] = active(t, strip.row_of(e)), zero[e] = cut(t, strip.row_of(e));
      Place<S>* const in = work.operands;
      const auto lies = [&](int i, const auto* base, int64_t stride)
                            __attribute__((always_inline)) { work.lies(strip, i, base, stride, H); };
      for (int i = 0; i < SV; ++i) lies(i, (const T*)f.saved + (row - kept_shift) * SV * H + i * H, R * SV * H);
      for (int i = 0; i < ST; ++i) {
        const T* const kept = i == 0 ? (const T*)f.hidden : (const T*)f.histories[i] - kept_shift * H;
        const S* const entered = (const S*)f.first[i] + r * B * H;
        const int before = SV + i, after = before + ST;
        lies(after, kept + row * H, R * H);
        if (!masked) {
          if (has_prev) lies(before, kept + row_prev * H, R * H);
          else lies(before, entered, H);
        } else if (code.reads[before]) {
          for (int e = 0; e < n; ++e) {
            const int64_t b = strip.row_of(e), first = strip.unit_of(e) * L;
            const int lanes = lanes_left(H, first, L);
            const bool kept_one = has_prev && active(t_prev, b);
            store(work.copy(before) + e * L, zero[e]    ? V{}
                                             : kept_one ? load(kept + (row_prev + b * R) * H + first, lanes)
                                                        : load(entered + b * H + first, lanes));
          }
          in[before] = {work.copy(before), L};
        }
      }
      for (int i = 0; i < NP; ++i) in[SV + 2 * ST + i] = {m.params + i * unit_stride + strip.unit * L, strip.step(L, 0)};
      const int first_mask = SV + 2 * ST + NP, gradients = first_mask + p.cell->masks;
      for (int i = 0; i < p.cell->masks; ++i) lies(first_mask + i, (const T*)w.masks[i] + t * w.mask_time[i], H);
      in[gradients] = {m.dh + strip.first(L, dh_stride), strip.step(L, dh_stride)};
      for (int i = 1; i < ST; ++i) {
        in[gradients + i] = {m.dstates[i] + strip.first(L, unit_stride), strip.step(L, unit_stride)};
        if (const T* const over_time = at<const T>(f.dsequences[i], row * H))
          for (int e = 0; e < n; ++e) {
            const int64_t b = strip.row_of(e), first = strip.unit_of(e) * L;
            S* const sum = m.dstates[i] + b * unit_stride + first;
            if (on[e]) store(sum, load(sum) + load(over_time + b * R * H + first, lanes_left(H, first, L)));
          }
      }
      interpret(code, in, n);
      const auto out = [&](int i, auto function) __attribute__((always_inline)) {
        const Place<S> value = work.output(i);
        for (int e = 0; e < n; ++e) function(e, value[e], strip.row_of(e), strip.unit_of(e) * L);
      };
      for (int i = 0; i < PA; ++i)
        out(i, [&](int e, V v, int64_t b, int64_t first) {
          const int lanes = lanes_left(H, first, L);
          if (!on[e]) v = V{};
          store(dgates + (b * R * PA + i) * H + first, v, lanes);
          if (recurrent && i >= apart && i < apart + GH) store(gates + b * gate_stride + (i - apart) * H + first, zero[e] ? V{} : v, lanes);
        });
      for (int i = 0; i < NP && dparams; ++i)
        out(PA + ST + i, [&](int e, V v, int64_t b, int64_t first) {
          const int lanes = lanes_left(H, first, L);
          S* const sum = dparams + (b * NP + i) * H + first;
          if (on[e]) store(sum, load(sum, lanes) + v, lanes);
        });
      for (int i = 0; i < ST; ++i) {
        S* const rows = i == 0 ? m.dh : m.dstates[i];
        const int64_t stride = i == 0 ? dh_stride : unit_stride;
        out(PA + i, [&](int e, V v, int64_t b, int64_t first) {
          if (on[e]) store(rows + b * stride + first, zero[e] ? V{} : v);
        });
      }
    };
    for_strips(j * kPanelVectors, j * kPanelVectors + vectors_of(j, unit_vectors), b0, b1, work.most, strip_of);
  }

  // Rows that were left out of a step: no gradient comes of them, nor goes on to the step before.
  void rest(int r, int64_t t_row, A* gates, Rows rows) const {
    for (int64_t b = rows.from; b < rows.to; ++b) {
      const int64_t row = (t_row * p.B + b) * p.R + r;
      memset((T*)f.dgates + row * DG * p.H, 0, size_t(DG * p.H) * sizeof(T));
      if (project) memset((T*)f.unprojected + row * p.H, 0, size_t(p.H) * sizeof(T));
      memset((void*)(gates + b * gate_stride), 0, size_t(gate_stride) * sizeof(A));
    }
  }

  void recurrence(const Memory& m, int r, const Share& s) const {
    const Weights& w = p.weights[r];
    Barrier barrier(m.barrier, s.size);
    const int64_t out_panels = (out_vectors + kPanelVectors - 1) / kPanelVectors;
    const int64_t b0 = s.by_rows ? part(p.B, s.me, s.size) : 0, b1 = s.by_rows ? part(p.B, s.me + 1, s.size) : p.B;
    const int64_t j0 = s.by_rows ? 0 : part(panels, s.me, s.size), j1 = s.by_rows ? panels : part(panels, s.me + 1, s.size);
    const int64_t o0 = s.by_rows ? 0 : part(out_panels, s.me, s.size), o1 = s.by_rows ? out_panels : part(out_panels, s.me + 1, s.size);
    const bool split_units = !s.by_rows && s.size > 1;
    const bool every_step = split_units && (recurrent || p.lengths || project || staged());  // as in forward.h

    if (recurrent && (f.need_dh || p.stop - p.start > 1))
      pack_recurrent(m.w_hh, (const T*)w.w_hh, part(out_panels, s.me, s.size), part(out_panels, s.me + 1, s.size));
    if (project) pack(m.w_hr, w.w_hr, p.P, p.H, unit_vectors, part(panels, s.me, s.size), part(panels, s.me + 1, s.size));
    for (int v = 0; v < kPanelVectors && m.zero && s.me == 0; ++v) store(m.zero + v * L, V{});
    if (s.me == 0)
      for (int i = 0; i < NP; ++i) convert_row(m.params + i * unit_stride, (const T*)w.params[i], p.H, unit_stride);
    using OfStages = BackwardStages<BackwardLoop, Kind, T>;
    const int64_t u0 = j0 * kPanelVectors, u1 = j1 * kPanelVectors < unit_vectors ? j1 * kPanelVectors : unit_vectors;
    if constexpr (kInterpreted<Cell>) {
      if (staged()) {
        OfStages(*this, m, r, s, u0, u1, b0, b1).prepare();
        for (int k = 0; k < p.cell->blocks; ++k)
          pack(m.blocks + k * unit_vectors * panel_size<Kind>(p.H, 1), block_of<T>(p, w, k), p.H, p.H, unit_vectors,
               part(panels, s.me, s.size), part(panels, s.me + 1, s.size));
      } else if (!scan()) {
        m.work.prepare();
      }
    }
    load_state(m, r, part(p.B, s.me, s.size), part(p.B, s.me + 1, s.size));
    barrier.wait(s.me);
    if (scan()) BackwardScan<BackwardLoop, T>(*this, m, r, s).run(barrier);

    const A* in = nullptr;  // dgates of the step after this one
    A* out = m.gates[0];
    int64_t after = b0;  // the rows that step had
    for (int64_t step = p.stop - 1; step >= p.start && !scan(); --step) {
      const int64_t t = time(w, step), end = live_end(p, t, b0, b1), reach = after > end ? after : end;
      const bool from_end = step & 1;  // every other step from the last panel: the caches still hold its weights
      if (project) {
        for (int64_t o = o0; o < o1; ++o) {
          hidden_gradient(m, r, t, in, o, -1, b0, reach);
          release_projected(m, r, t, t - first_time(p, r), o, b0, b1);
        }
        if (split_units) barrier.wait(s.me);
      }
      for (int64_t i = j0; i < j1 && reach > b0; ++i) {
        const int64_t j = from_end ? j0 + j1 - 1 - i : i;
        if (project && end > b0) {
          S* dm = m.dm + b0 * unit_stride + j * kPanelVectors * L;
          TileArgs<Kind> tile{
              m.out + b0 * out_stride, out_stride, m.w_hr + j * kPanelVectors * panel_size<Kind>(p.P, 1), p.P, m.zero, 0, dm, unit_stride};
          tile.lone = p.B == 1;
          multiply_panel<Kind>(end - b0, vectors_of(j, unit_vectors), tile);
        } else if (!project) {
          const int64_t next = from_end ? j - 1 : j + 1;
          hidden_gradient(m, r, t, in, j, next >= j0 && next < j1 ? next : -1, b0, reach);
        }
        if (end > b0 && !staged()) cell(m, r, step, out, j, b0, end);
      }
      if constexpr (kInterpreted<Cell>)
        if (end > b0 && staged()) OfStages(*this, m, r, s, u0, u1, b0, b1).step(barrier, step, out, b0, end);
      if (end < b1) rest(r, t - first_time(p, r), out, Rows(s, end, b1));
      after = end;
      if (every_step) barrier.wait(s.me);
      in = out;
      out = in == m.gates[0] ? m.gates[1] : m.gates[0];
    }
    for (int64_t o = o0; o < o1 && f.need_dh; ++o) hidden_gradient(m, r, -1, in, o, -1, b0, after);
    if (split_units) barrier.wait(s.me);
    for (int64_t b = part(p.B, s.me, s.size); b < part(p.B, s.me + 1, s.size); ++b) {
      memcpy((S*)f.dstates[0] + (r * p.B + b) * p.P, m.dh + b * dh_stride, size_t(p.P) * sizeof(S));
      for (int i = 1; i < ST; ++i) memcpy((S*)f.dstates[i] + (r * p.B + b) * p.H, m.dstates[i] + b * unit_stride, size_t(p.H) * sizeof(S));
    }
    barrier.wait(s.me);
  }

  static void run(const Backward& backward) { Team<BackwardLoop>::run(BackwardLoop(backward)); }
};

}  // namespace FUSED_RNN_ISA
