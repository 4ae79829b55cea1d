// The weights of a recurrence as the forward loop reads them: packed in panels of units, in each call, or once for many (prepack.h).
#pragma once
#include "diagonal.h"
#include "forward_stages.h"

namespace FUSED_RNN_ISA {

template <class Kind>
struct PackedWeights {
  using W = typename Kind::Weight;
  using S = typename Kind::Accumulator;
  W *w_ih, *w_hh, *w_hr, *blocks;
  S *scale_ih, *scale_hh, *scale_hr, *scale_blocks;
  S *bias, *params;  // params: [NP, state_stride]
};

template <class Kind, class T, class Cell>
struct ForwardWeights : Counts<Cell> {
  using W = typename Kind::Weight;
  using S = typename Kind::Accumulator;
  using V = Vec<S>;
  using Packed = PackedWeights<Kind>;
  using C = Counts<Cell>;
  using C::G, C::GH, C::PA, C::NP, C::recurrent, C::p, C::units, C::x_gate, C::x_column, C::h_column, C::for_parts;
  static constexpr int L = kLanes<S>;

  const Diagonal<Cell, L> diagonal;
  int64_t columns;  // of h that a unit reads by W_hh
  int64_t unit_vectors, panels, row;  // row: stride of the pre-activations, [rows, unit vectors, preactivations, lanes]
  int64_t out_vectors;                // of the projection
  int64_t state_stride;
  bool unpacked = false;
  bool uses_h = recurrent;  // false: a single step from a zero state, for which W_hh does nothing

  explicit ForwardWeights(const Problem& problem) : C(problem), diagonal(p, p.H), columns(p.P / diagonal.count) {
    unit_vectors = (p.H + L - 1) / L;
    panels = (unit_vectors + units() - 1) / units();
    row = off_pages<S>(unit_vectors * PA * L);
    out_vectors = (p.P + L - 1) / L;
    state_stride = off_pages<S>(unit_vectors * L);
  }
  // Elements of the packed W_hh.
  int64_t recurrent_size() const { return recurrent ? diagonal.slots(unit_vectors) * panel_size<Kind>(columns, G) : 0; }
  int64_t last_vector(int64_t j) const { return j * units() < unit_vectors ? j * units() : unit_vectors; }  // of panels before j
  bool projects() const { return !kInterpreted<Cell> && (p.P != p.H || p.weights[0].w_hr); }

  // What a `Packing` makes, and a call that packs for itself.
  void layout(Arena& arena, Packed& m) const {
    if (!unpacked) {
      m.w_ih = arena.take<W>(unit_vectors * panel_size<Kind>(p.D, G));
      if (recurrent) m.w_hh = arena.take<W>(recurrent_size());
      if (projects()) m.w_hr = arena.take<W>(out_vectors * panel_size<Kind>(p.H, 1));
      if (kInterpreted<Cell> && p.cell->blocks) m.blocks = arena.take<W>(p.cell->blocks * unit_vectors * panel_size<Kind>(p.H, 1));
    }
    if constexpr (kScaled<Kind>) {
      m.scale_ih = arena.take<S>(unit_vectors * G * L);
      m.scale_hh = arena.take<S>(diagonal.slots(unit_vectors) * G * L);
      if (projects()) m.scale_hr = arena.take<S>(out_vectors * L);
      if (kInterpreted<Cell> && p.cell->blocks) m.scale_blocks = arena.take<S>(p.cell->blocks * unit_vectors * L);
    }
    m.bias = arena.take<S>(row);
    if (NP > 0) m.params = arena.take<S>(NP * state_stride);
  }

  // function(piece) for the pieces of panel j: of the input's weights it is one.
  template <class F>
  ALWAYS_INLINE void for_pieces(int64_t j, bool input, F function) const {
    diagonal.for_pieces(j * units(), last_vector(j + 1), function, input);
  }
  // Of vector v of a piece's product the rows of the weights, of lanes `from` to before `to`. row: of lane 0.
  struct WeightRows {
    int64_t row;
    int from, to;
  };
  ALWAYS_INLINE WeightRows rows_of(const Piece& piece, bool input, int v) const {
    const int gates = input ? G : GH, gate = input ? x_gate(v % gates) : v % gates;
    const int64_t u = piece.u + v / gates, row = gate * p.H + u * L;
    if (input) return {row, 0, lanes_left(p.H, u * L, L)};
    return {row, diagonal.first_lane(piece, u), diagonal.end_lane(piece, u)};
  }

  // ---- each thread packs its panels, or its part of them ----
  void pack(const Packed& m, const Weights& w, int64_t j0, int64_t j1) const {
    for (int64_t j = j0; j < j1; ++j) {
      pack(m.w_ih, (const T*)w.w_ih, p.D, true, j);
      if (uses_h) pack(m.w_hh, (const T*)w.w_hh, columns, false, j);
    }
  }
  void pack(W* packed, const T* weights, int64_t k, bool input, int64_t j) const {
    for_pieces(j, input, [&](const Piece& piece) {
      for_parts(piece.vectors * (input ? G : GH), [&](int v0, int nv) {
        for (int v = 0; v < nv; ++v) {
          const auto [first, from, to] = rows_of(piece, input, v0 + v);
          pack_rows<Kind, T>(packed + panel_size<Kind>(k, 1) * (piece.slot * G + v0), nv, v, weights + first * k, k, to, k, from);
        }
      });
    });
  }
  void pack_projection(const Packed& m, const Weights& w, int64_t v0, int64_t v1) const {
    for (int64_t v = v0; v < v1; ++v)
      pack_rows<Kind, T>(m.w_hr + v * panel_size<Kind>(p.H, 1), 1, 0, (const T*)w.w_hr + v * L * p.H, p.H, lanes_left(p.P, v * L, L), p.H);
  }
  // Panels of the matrices, each of kPanelVectors vectors of a block.
  int64_t block_panels() const { return (unit_vectors + kPanelVectors - 1) / kPanelVectors; }
  template <class F>
  ALWAYS_INLINE void for_block_panels(int64_t q0, int64_t q1, F function) const {  // function(block, first vector, vectors)
    for (int64_t q = q0; q < q1; ++q) {
      const int64_t u = q % block_panels() * kPanelVectors;
      function(int(q / block_panels()), u, int(unit_vectors - u < kPanelVectors ? unit_vectors - u : kPanelVectors));
    }
  }
  void pack_blocks(const Packed& m, const Weights& w, int64_t q0, int64_t q1) const {
    for_block_panels(q0, q1, [&](int block, int64_t u, int nv) {
      W* const panel = m.blocks + (block * unit_vectors + u) * panel_size<Kind>(p.H, 1);
      for (int v = 0; v < nv; ++v) {
        const int64_t first = (u + v) * L;
        pack_rows<Kind, T>(panel, nv, v, block_of<T>(p, w, block) + first * p.H, p.H, lanes_left(p.H, first, L), p.H);
      }
    });
  }
  void fill_vectors(const Packed& m, const Weights& w) const {
    for (int i = 0; i < NP; ++i) convert_row(m.params + i * state_stride, (const T*)w.params[i], p.H, state_stride);
    for (int64_t u = 0; u < unit_vectors; ++u) {
      const int n = lanes_left(p.H, u * L, L);
      S* out = m.bias + u * PA * L;
      for (int a = 0; a < PA; ++a) store(out + a * L, V{});
      for (int g = 0; g < G && w.b_ih; ++g) {
        S *const x_side = out + x_column(g) * L, *const h_side = out + h_column(g) * L;
        store(x_side, load(x_side) + load((const T*)w.b_ih + g * p.H + u * L, n));
        if (recurrent) store(h_side, load(h_side) + load((const T*)w.b_hh + g * p.H + u * L, n));
      }
    }
  }
};

}  // namespace FUSED_RNN_ISA
