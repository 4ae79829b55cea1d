// A step of a program with stages, backward: where its inputs lie, where its outputs go, and the products of its matrices.
#pragma once
#include "forward_stages.h"

namespace FUSED_RNN_ISA {

template <class Loop, class Kind, class T>
struct BackwardStages : LoopStages<Loop, Kind> {
  using Base = LoopStages<Loop, Kind>;
  using Base::Base, Base::L, Base::loop, Base::m, Base::r, Base::share, Base::way, Base::p, Base::w, Base::work;
  using typename Base::A, typename Base::S, typename Base::V;

  // Of the inputs.
  const int first_before = loop.SV, first_after = first_before + loop.ST, first_param = first_after + loop.ST,
            first_mask = first_param + loop.NP, first_gradient = first_mask + p.cell->masks;

  // Once a recurrence.
  void prepare() const {
    work.prepare(share, way, p.H, p.B);
    for (int i = 0; i < loop.NP; ++i) work.lies(first_param + i, m.params + i * loop.unit_stride, L, 0);
    work.lies(first_gradient, m.dh, L, loop.dh_stride);
    for (int i = 1; i < loop.ST; ++i) work.lies(first_gradient + i, m.dstates[i], L, loop.unit_stride);
  }

  __attribute__((noinline)) void step(Barrier& barrier, int64_t step, A* gates, int64_t b0, int64_t b1) const {
    const int PA = loop.PA, DG = loop.DG, ST = loop.ST, SV = loop.SV, NP = loop.NP, apart = loop.apart;
    const auto& f = loop.f;
    const int64_t t = loop.time(w, step), t_prev = t - w.direction, t_row = t - first_time(p, r), shift = f.whole ? 0 : first_time(p, r);
    const int64_t B = p.B, R = p.R, H = p.H;
    const bool has_prev = step > p.start || (f.whole && step > 0), masked = p.lengths || p.reset;
    const int64_t row = t * B * R + r, row_prev = (has_prev ? t_prev : t) * B * R + r, kept_shift = shift * B * R;
    T* const dgates = at<T>(f.dgates, (t_row * B * R + r) * DG * H);
    S* const dparams = at<S>(f.dparams, r * B * NP * H);
    const T* const saved = at<const T>(f.saved, (row - kept_shift) * SV * H);
    const auto kept = [&](int i) { return i == 0 ? (const T*)f.hidden : (const T*)f.histories[i] - kept_shift * H; };
    const auto mask = [&](int i) { return (const T*)w.masks[i] + t * w.mask_time[i]; };
    const auto entered = [&](int i) { return (const S*)f.first[i] + r * B * H; };
    const auto on = [&](int64_t b) __attribute__((always_inline)) { return !masked || loop.active(t, b); };
    const auto cut = [&](int64_t b) __attribute__((always_inline)) { return masked && loop.cut(t, b); };

    const auto lies = [&](int i, const auto* base, int64_t stride) {
      if constexpr (sizeof(*base) == sizeof(S)) {
        if (H % Base::L == 0) return this->work.lies(i, (const S*)base, Base::L, stride);
      }
      work.to_copy(way, share.me, B, i, b0);
    };
    for (int i = 0; i < SV; ++i) lies(i, saved + i * H, R * SV * H);
    for (int i = 0; i < ST; ++i) {
      lies(first_after + i, kept(i) + row * H, R * H);
      if (masked) work.to_copy(way, share.me, B, first_before + i, b0);
      else if (has_prev) lies(first_before + i, kept(i) + row_prev * H, R * H);
      else lies(first_before + i, entered(i), H);
    }
    for (int i = 0; i < p.cell->masks; ++i) lies(first_mask + i, mask(i), H);
    for (int i = 1; i < ST; ++i)
      if (const T* const over_time = at<const T>(f.dsequences[i], row * H))
        for (int64_t b = b0; b < b1; ++b)
          for (int64_t u = way.u0; u < way.u1 && on(b); ++u) {
            S* const sum = m.dstates[i] + b * loop.unit_stride + u * L;
            store(sum, load(sum) + load(over_time + b * R * H + u * L, lanes_left(H, u * L, L)));
          }

    const auto copy = [&](int i, int64_t u, int64_t b) -> V {
      const int64_t first = u * L;
      const int lanes = lanes_left(H, first, L);
      if (i < first_before) return load(saved + (b * R * SV + i) * H + first, lanes);
      if (i >= first_mask) return load(mask(i - first_mask) + b * H + first, lanes);
      if (i >= first_after) return load(kept(i - first_after) + (row + b * R) * H + first, lanes);
      i -= first_before;
      if (cut(b)) return V{};
      if (has_prev && (!masked || loop.active(t_prev, b))) return load(kept(i) + (row_prev + b * R) * H + first, lanes);
      return load(entered(i) + b * H + first, lanes);
    };
    constexpr bool wide = sizeof(T) == sizeof(S) && sizeof(A) == sizeof(S);
    const bool plain = wide && H % L == 0 && !masked;  // what is stored is what was computed, in whole vectors
    const auto output = [&](int number, const Strip& strip, const Place<S>& value) {
      const auto each = [&](auto function) __attribute__((always_inline)) {
        for (int e = 0; e < strip.n; ++e) {
          const int64_t first = strip.unit_of(e) * L;
          function(value[e], strip.row_of(e), first, lanes_left(H, first, L));
        }
      };
      const int product = number - (PA + ST + NP);
      if (number < PA || (product >= 0 && number < work.graph->outputs)) {
        const int i = number < PA ? number : PA + product;
        const bool recurs = number < PA && loop.recurrent && i >= apart && i < apart + loop.GH;
        if constexpr (wide)
          if (plain) {
            put<S>(strip, value, dgates + i * H, R * DG * H);
            return put<S>(strip, value, recurs ? gates + (i - apart) * H : nullptr, loop.gate_stride);
          }
        each([&](V v, int64_t b, int64_t first, int lanes) __attribute__((always_inline)) {
          if (!on(b)) v = V{};
          store(dgates + (b * R * DG + i) * H + first, v, lanes);
          if (recurs) store(gates + b * loop.gate_stride + (i - apart) * H + first, cut(b) ? V{} : v, lanes);
        });
      } else if (product >= 0) {
        A* const to = work.operand(number - work.graph->outputs, B);
        each([&](V v, int64_t b, int64_t first, int lanes)
                 __attribute__((always_inline)) { store(to + b * work.operand_stride + first, zero_padded<Kind>(v, lanes)); });
      } else if (number >= PA + ST) {
        const int i = number - PA - ST;
        if (!dparams) return;
        if (plain) {
          S* const sum = dparams + i * H + strip.first(L, NP * H);
          if (strip.along_units) {
            for (int e = 0; e < strip.n; ++e) store(sum + e * L, load(sum + e * L) + value[e]);
          } else {
            V made{};
            for (int e = 0; e < strip.n; ++e) made += value[e];
            store(sum, load(sum) + made);
          }
          return;
        }
        const int strips = strip.along_units ? strip.n : 1, rows = strip.along_units ? 1 : strip.n;
        for (int e = 0; e < strips; ++e) {  // the rows of a strip together
          V made{};
          for (int k = 0; k < rows; ++k) made += on(strip.row_of(e + k)) ? value[e + k] : V{};
          const int64_t first = strip.unit_of(e) * L;
          S* const sum = dparams + (strip.row * NP + i) * H + first;
          store(sum, load(sum, lanes_left(H, first, L)) + made, lanes_left(H, first, L));
        }
      } else {
        const int i = number - PA;
        S* const rows = i == 0 ? m.dh : m.dstates[i];
        const int64_t stride = i == 0 ? loop.dh_stride : loop.unit_stride;
        if (plain) return put<S>(strip, value, rows, stride);
        each([&](V v, int64_t b, int64_t first, int) __attribute__((always_inline)) {
          if (on(b)) store(rows + b * stride + first, cut(b) ? V{} : v);
        });
      }
    };
    work.run(way, share, barrier, H, b0, b1, copy, output, [&](const Publishing& made) {
      const int64_t product_row = work.product_row();
      const A* const a = work.operand(made.from, B) + b0 * work.operand_stride;
      for (int64_t u = way.u0; u < way.u1; u += kPanelVectors) {
        const int nv = int(way.u1 - u < kPanelVectors ? way.u1 - u : kPanelVectors);
        const A* const w = m.blocks + (made.block * loop.unit_vectors + u) * panel_size<Kind>(H, 1);
        S* const c = work.fields[made.to].at + b0 * product_row + u * L;
        TileArgs<Kind> tile{a, work.operand_stride, w, H, work.zero, 0, c, product_row};
        tile.lone = B == 1;
        multiply_panel<Kind>(b1 - b0, nv, tile);
      }
    });
  }
};

}  // namespace FUSED_RNN_ISA
