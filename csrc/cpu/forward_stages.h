// A step of a program with stages, forward: where its inputs lie, where its outputs go, and the products of its matrices.
#pragma once
#include "stages.h"

namespace FUSED_RNN_ISA {

// Block k of a recurrence's matrices, H rows of H.
template <class T>
static ALWAYS_INLINE const T* block_of(const Problem& p, const Weights& w, int k) {
  int matrix = 0;
  for (; k >= p.cell->blocks_of[matrix]; ++matrix) k -= p.cell->blocks_of[matrix];
  return (const T*)w.matrices[matrix] + k * p.H * p.H;
}

template <class Loop, class Kind, class T>
struct ForwardStages : LoopStages<Loop, Kind> {
  using Base = LoopStages<Loop, Kind>;
  using Base::Base, Base::L, Base::loop, Base::m, Base::r, Base::share, Base::way, Base::p, Base::w, Base::work;
  using typename Base::A, typename Base::S, typename Base::V;

  // Once a recurrence.
  void prepare() const {
    work.prepare(share, way, p.H, p.B);
    const int PA = loop.PA, ST = loop.ST;
    for (int i = 1; i < ST; ++i) work.lies(PA + i, m.states[i], L, loop.state_stride);
    for (int i = 0; i < loop.NP; ++i) work.lies(PA + ST + i, m.params + i * loop.state_stride, L, 0);
  }

  const T* mask(int i, int64_t t) const { return (const T*)w.masks[i] + t * w.mask_time[i]; }

  __attribute__((noinline)) void step(Barrier& barrier, int64_t step, const S* pre, const A* h_in, A* h_out, int64_t b0, int64_t b1) const {
    const int PA = loop.PA, ST = loop.ST, SV = loop.SV, first_mask = PA + ST + loop.NP;
    const int64_t t = loop.time(w, step), t_row = t - first_time(p, r), t_next = t + w.direction;
    const int64_t H = p.H, R = p.R;
    const bool last = step + 1 == p.T, masked = p.lengths || p.reset;
    constexpr bool wide = sizeof(T) == sizeof(S) && sizeof(A) == sizeof(S);
    const bool whole = wide && H % L == 0;  // what is stored is what was computed, in whole vectors
    T* const y = at<T>(loop.f.y, (t * p.B * R + r) * H);
    T* const hidden = at<T>(loop.f.hidden, (t * p.B * R + r) * H);
    T* const saved = at<T>(loop.f.saved, (t_row * p.B * R + r) * SV * H);
    for (int64_t b = b0; b < b1 && p.reset; ++b)
      for (int i = 1; i < ST && loop.cut(t, b); ++i)
        for (int64_t u = way.u0; u < way.u1; ++u) store(m.states[i] + b * loop.state_stride + u * L, V{});
    for (int i = 0; i < PA; ++i) work.lies(i, pre + loop.column(i) * L, loop.PA * L, loop.row);
    if constexpr (sizeof(A) == sizeof(S)) work.lies(PA, h_in, L, loop.h_stride);
    else work.to_copy(way, share.me, p.B, PA, b0);
    for (int i = 0; i < p.cell->masks; ++i) {
      if constexpr (sizeof(T) == sizeof(S)) {
        if (H % L == 0) {
          work.lies(first_mask + i, mask(i, t), L, H);
          continue;
        }
      }
      work.to_copy(way, share.me, p.B, first_mask + i, b0);
    }
    const auto copy = [&](int i, int64_t u, int64_t b) __attribute__((always_inline)) -> V {
      return i == PA ? load(h_in + b * loop.h_stride + u * L) : load(mask(i - first_mask, t) + b * H + u * L, lanes_left(H, u * L, L));
    };
    const auto output = [&](int number, const Strip& strip, const Place<S>& value) {
      const auto each = [&](auto function) __attribute__((always_inline)) {
        for (int e = 0; e < strip.n; ++e) function(value[e], strip.row_of(e), strip.unit_of(e) * L);
      };
      const auto on = [&](int64_t b) __attribute__((always_inline)) { return !masked || loop.active(t, b); };
      if constexpr (wide) {
        if (whole && number >= ST && number < work.graph->outputs) return put<S>(strip, value, saved + (number - ST) * H, R * SV * H);
        if (whole && !masked && number < ST) {
          if (number > 0) {
            put<S>(strip, value, at<T>(loop.f.histories[number], (t_row * p.B * R + r) * H), R * H);
            return put<S>(strip, value, m.states[number], loop.state_stride);
          }
          put<S>(strip, value, y, R * H);
          put<S>(strip, value, hidden, R * H);
          return put<S>(strip, value, h_out, loop.h_stride);
        }
      }
      if (number == 0) {
        each([&](V v, int64_t b, int64_t first) __attribute__((always_inline)) {
          const int lanes = lanes_left(H, first, L);
          V now = rounded<T>(v), keep = now;
          if (!on(b)) keep = load(h_in + b * loop.h_stride + first), now = V{};
          if (y) store(y + b * R * H + first, now, lanes);
          if (hidden) store(hidden + b * R * H + first, now, lanes);
          if (masked && !last && loop.cut(t_next, b)) keep = V{};
          store(h_out + b * loop.h_stride + first, zero_padded<Kind>(keep, lanes));
        });
      } else if (number < ST) {
        T* const history = at<T>(loop.f.histories[number], (t_row * p.B * R + r) * H);
        S* const state = m.states[number];
        each([&](V v, int64_t b, int64_t first) __attribute__((always_inline)) {
          if (history) store(history + b * R * H + first, on(b) ? v : V{}, lanes_left(H, first, L));
          if (on(b)) store(state + b * loop.state_stride + first, v);
        });
      } else if (number < work.graph->outputs) {
        T* const to = saved + (number - ST) * H;
        each([&](V v, int64_t b, int64_t first)
                 __attribute__((always_inline)) { store(to + b * R * SV * H + first, v, lanes_left(H, first, L)); });
      } else {
        A* const to = work.operand(number - work.graph->outputs, p.B);
        each([&](V v, int64_t b, int64_t first) __attribute__((always_inline)) {
          store(to + b * work.operand_stride + first, zero_padded<Kind>(rounded<T>(v), lanes_left(H, first, L)));
        });
      }
    };
    work.run(way, share, barrier, H, b0, b1, copy, output, [&](const Publishing& made) { multiply(made, b0, b1); });
  }

  void multiply(const Publishing& made, int64_t b0, int64_t b1) const {
    const A* a = work.operand(made.from, p.B) + b0 * work.operand_stride;
    const int64_t row = work.product_row();
    S* const c = work.fields[made.to].at + b0 * row;
    if constexpr (Loop::kUnpackable) {
      if (loop.unpacked) {
        const T* const matrix = block_of<T>(p, w, made.block);
        for (int64_t u = way.u0; u < way.u1; ++u)
          multiply_rows<Kind, T>(b1 - b0, a, work.operand_stride, matrix + u * L * p.H, p.H, lanes_left(p.H, u * L, L), p.H, work.zero, 0,
                                 c + u * L, row);
        return;
      }
    }
    for (int64_t u = way.u0; u < way.u1; u += kPanelVectors) {
      const int nv = int(way.u1 - u < kPanelVectors ? way.u1 - u : kPanelVectors);
      const int64_t panel = made.block * loop.unit_vectors + u;
      TileArgs<Kind> tile{a, work.operand_stride, m.blocks + panel * panel_size<Kind>(p.H, 1), p.H, work.zero, 0, c + u * L, row};
      if constexpr (kScaled<Kind>) tile.scale = m.scale_blocks + panel * L;
      tile.lone = p.B == 1;
      multiply_panel<Kind>(b1 - b0, nv, tile);
    }
  }
};

}  // namespace FUSED_RNN_ISA
