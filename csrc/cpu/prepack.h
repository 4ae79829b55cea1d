// Weights packed once for many calls (a stream of steps): what ForwardLoop would pack in every call, and narrower, if asked.
#pragma once
#include "forward_weights.h"

namespace FUSED_RNN_ISA {

using fused_rnn::Packing;

// A panel that is packed as float, k rows of `columns`, in bf16, to nearest, ties to even, in pairs of rows.
[[maybe_unused]] static void narrow_panel(const float* from, bf16* to, float* /*scale*/, int64_t k, int64_t columns) {
  constexpr int L = kLanes<float>;
  for (int64_t i = 0; i < k; i += 2, from += 2 * columns, to += 2 * columns) {
    for (int64_t c = 0; c < columns; c += L) {
      bf16 first[L], second[L] = {};
      store(first, load(from + c));
      if (i + 1 < k) store(second, load(from + columns + c));
      store((float*)(to + 2 * c), pairs(first, second, L));
    }
  }
}
// The same as 127ths of the largest magnitude in each column.
[[maybe_unused]] static void narrow_panel(const float* from, int8_t* to, float* scale, int64_t k, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    float most = 0;
    for (int64_t i = c; i < k * columns; i += columns) most = __builtin_fabsf(from[i]) > most ? __builtin_fabsf(from[i]) : most;
    const float unit = scale[c] = most / 127;
    for (int64_t i = c; i < k * columns; i += columns) to[i] = int8_t(unit > 0 ? __builtin_rintf(from[i] / unit) : 0);
  }
}

// The same for Bytes: each 128 more, in groups of four rows.
[[maybe_unused]] static void narrow_panel(const float* from, uint8_t* to, float* scale, int64_t k, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    float most = 0;
    for (int64_t i = c; i < k * columns; i += columns) most = __builtin_fabsf(from[i]) > most ? __builtin_fabsf(from[i]) : most;
    const float unit = scale[c] = most / 127;
    for (int64_t i = 0; i < round_up(k, 4); ++i) {
      const float value = unit > 0 && i < k ? __builtin_rintf(from[i * columns + c] / unit) : 0;
      to[(i / 4 * columns + c) * 4 + i % 4] = uint8_t(int(value) + 128);
    }
  }
}

template <class Kind, class T, class Cell>
struct PackLoop {
  using Loop = ForwardWeights<Kind, T, Cell>;

  static void run(const Packing& pack) {
    const Loop loop(pack.p);
    Arena arena{(char*)pack.packed};
    PackedWeights<Kind> m{};
    loop.layout(arena, m);
    *pack.bytes = int64_t(arena.used);
    if (!pack.packed) return;
    const Weights& w = pack.p.weights[0];
    if constexpr (!kNarrow<Kind>) {
      loop.pack(m, w, 0, loop.panels);
      if (loop.projects()) loop.pack_projection(m, w, 0, loop.out_vectors);
      if constexpr (kInterpreted<Cell>) loop.pack_blocks(m, w, 0, pack.p.cell->blocks * loop.block_panels());
    } else {
      narrowed(loop, w, m);
    }
    loop.fill_vectors(m, w);
  }

  // Packed as float first: the order is the same.
  static void narrowed(const Loop& loop, const Weights& w, const PackedWeights<Kind>& m) {
    const ForwardWeights<F32, T, Cell> wide(loop.p);
    Arena measure{nullptr};
    PackedWeights<F32> from{};
    wide.layout(measure, from);
    Arena arena{(char*)fused_rnn::cpu::scratch(measure.used)};
    wide.layout(arena, from);
    wide.pack(from, w, 0, wide.panels);
    if (wide.projects()) wide.pack_projection(from, w, 0, wide.out_vectors);
    const Problem& p = loop.p;
    constexpr int L = Loop::L;
    // A panel of several vectors of units has them side by side in every k, the last panel as many as are left.
    const auto side = [&](bool input, const float* source, auto* to, float* scale, int64_t k) {
      for (int64_t j = 0; j < loop.panels; ++j)
        loop.for_pieces(j, input, [&](const Piece& piece) {
          loop.for_parts(piece.vectors * (input ? loop.G : loop.GH), [&](int v0, int nv) {
            const int64_t before = piece.slot * loop.G + v0;
            narrow_panel(source + before * panel_size<F32>(k, 1), to + before * panel_size<Kind>(k, 1), at<float>(scale, before * L), k,
                         nv * L);
          });
        });
    };
    side(true, from.w_ih, m.w_ih, m.scale_ih, p.D);
    if (loop.recurrent) side(false, from.w_hh, m.w_hh, m.scale_hh, loop.columns);
    if constexpr (kInterpreted<Cell>) {
      const int64_t all = p.cell->blocks * loop.block_panels();
      wide.pack_blocks(from, w, 0, all);
      loop.for_block_panels(0, all, [&](int block, int64_t u, int nv) {
        const int64_t before = block * loop.unit_vectors + u;
        narrow_panel(from.blocks + before * panel_size<F32>(p.H, 1), m.blocks + before * panel_size<Kind>(p.H, 1),
                     at<float>(m.scale_blocks, before * L), p.H, nv * L);
      });
    }
    for (int64_t v = 0; loop.projects() && v < loop.out_vectors; ++v)
      narrow_panel(from.w_hr + v * panel_size<F32>(p.H, 1), m.w_hr + v * panel_size<Kind>(p.H, 1), at<float>(m.scale_hr, v * L), p.H, L);
  }
};

}  // namespace FUSED_RNN_ISA
