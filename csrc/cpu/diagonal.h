// A block-diagonal W_hh, [G H, P / N] of N blocks, as panels of units meet it: a unit multiplies only what its block has of h.
#pragma once
#include "layout.h"

namespace FUSED_RNN_ISA {

// Of a panel's vectors of units those that have units of one block.
struct Piece {
  int64_t block, u;  // u: its first vector
  int vectors;
  int64_t slot;  // how many vectors are packed before it: one that blocks share is packed for each of them
};

// What a thread needs for products by pieces.
template <class Kind>
struct PieceWork {
  typename Kind::Operand* operand;  // [rows, stride]: a block's part of each row, zeros behind it; null where none are read there
  int64_t stride;
  typename Kind::Accumulator* tile;  // [rows, kLd]: of vectors that blocks share; null where there are none
  static constexpr int64_t kLd = (kPanelVectors + 1) * kKindLanes<Kind>;  // multiply_rows writes on into one vector more
};

// Units, or columns, cut into N blocks of `size`, and into vectors of L.
template <class Cell, int L>
struct Diagonal {
  int64_t all, count, size;
  int64_t common;  // of a block's size and L the least common multiple

  Diagonal(const Problem& p, int64_t n) : all(n), count(Numbers<Cell>(p).diagonal), size(n / count), common(size) {
    while (common % L) common *= 2;
  }
  ALWAYS_INLINE bool whole() const {  // one block
    if constexpr (kInterpreted<Cell>) return count == 1;
    else return true;
  }

  ALWAYS_INLINE bool cuts_vectors() const { return !whole() && size % L; }

  // The vectors that are packed before vector u.
  ALWAYS_INLINE int64_t slots(int64_t u) const {
    if (whole() || u <= 0) return u;
    const int64_t last = (u * L < all ? u * L : all) - 1;
    return u + last / size - last / common;
  }
  // function(piece) for the blocks that have units in vectors [u0, u1). in_one: as if there were one block.
  template <class F>
  ALWAYS_INLINE void for_pieces(int64_t u0, int64_t u1, F function, bool in_one = false) const {
    in_one = in_one || whole();
    const int64_t end = u1 * L < all ? u1 * L : all, last = in_one ? 0 : (end - 1) / size;
    int64_t slot = in_one ? u0 : slots(u0);
    for (int64_t block = in_one ? 0 : u0 * L / size; block <= last; ++block) {
      int64_t u = u0, to = u1;
      if (!in_one) {
        const int64_t first = block * size / L, behind = ((block + 1) * size + L - 1) / L;
        u = first > u0 ? first : u0, to = behind < u1 ? behind : u1;
      }
      function(Piece{block, u, int(to - u), slot});
      slot += to - u;
    }
  }
  // The lanes of vector u that are of the piece's block: from the first one to before the last.
  ALWAYS_INLINE int first_lane(const Piece& piece, int64_t u) const {
    return piece.block * size > u * L ? int(piece.block * size - u * L) : 0;
  }
  ALWAYS_INLINE int end_lane(const Piece& piece, int64_t u) const { return lanes_left((piece.block + 1) * size, u * L, L); }
  // Whether other blocks have units in the piece's vectors.
  ALWAYS_INLINE bool shares(const Piece& piece) const {
    if (whole()) return false;
    const int64_t end = (piece.block + 1) * size;
    return piece.block * size > piece.u * L || (end < all && end < (piece.u + piece.vectors) * L);
  }

  // k: how many columns are multiplied at a time.
  template <class Kind>
  PieceWork<Kind> take(Arena& arena, int64_t rows, int64_t k, int threads, int me) const {
    PieceWork<Kind> work{};
    if (whole()) return work;
    work.stride = row_stride<Kind>(k);
    for (int i = 0; i < threads; ++i) {
      auto* const operand = k % Kind::k_multiple ? arena.take<typename Kind::Operand>(rows * work.stride) : nullptr;
      auto* const tile = cuts_vectors() ? arena.take<typename Kind::Accumulator>(rows * PieceWork<Kind>::kLd) : nullptr;
      if (i == me) work.operand = operand, work.tile = tile;
    }
    return work;
  }
  // k columns of `a` as an operand: where they lie, or, where a product would read on into the next block, a copy.
  template <class Kind>
  ALWAYS_INLINE const typename Kind::Operand* operand(const PieceWork<Kind>& work, const typename Kind::Operand* a, int64_t& lda,
                                                      int64_t rows, int64_t k) const {
    if (whole() || k % Kind::k_multiple == 0) return a;
    for (int64_t i = 0; i < rows; ++i) convert_row(work.operand + i * work.stride, a + i * lda, k, work.stride);
    lda = work.stride;
    return work.operand;
  }
  // Adds the tile's vectors [v0, v0 + nv) of the piece, `gates` of each vector of units, to c: in the lanes of the block alone, for in the
  // others stands what zeros made of its part of h, which is NaN where that is not finite.
  template <class Kind, class S>
  __attribute__((noinline)) void add(const PieceWork<Kind>& work, const Piece& piece, int gates, int v0, int nv, int64_t rows, S* c,
                                     int64_t ldc) const {
    typename VectorOf<S>::I lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    for (int v = 0; v < nv; ++v) {
      const int64_t u = piece.u + (v0 + v) / gates;
      const auto own = (lane >= first_lane(piece, u)) & (lane < end_lane(piece, u));
      for (int64_t i = 0; i < rows; ++i) {
        S* const to = c + i * ldc + v * L;
        store(to, own ? load(to) + load(work.tile + i * PieceWork<Kind>::kLd + v * L) : load(to));
      }
    }
  }
};

}  // namespace FUSED_RNN_ISA
