// What forward and backward share: how a cell's vectors lie in a row of pre-activations, how a team divides the work, scratch.
#pragma once
#include "../cells/all.h"
#include "../params.h"
#include "interpreter.h"
#include "pack.h"
#include "team.h"
#include "vmath.h"

namespace FUSED_RNN_ISA {

using fused_rnn::Backward;
using fused_rnn::first_time;
using fused_rnn::Forward;
using fused_rnn::kGradients;
using fused_rnn::Problem;
using fused_rnn::Weights;
using fused_rnn::cpu::Barrier;
using fused_rnn::cpu::kRowsEach;

// A cell that is a program. Its counts are the problem's: here is what arrays must hold.
struct Interpreted {
  static constexpr int gates = fused_rnn::kMostGates, apart = gates, states = fused_rnn::kMostStates;
};
template <class Cell>
constexpr bool kInterpreted = false;
template <>
constexpr bool kInterpreted<Interpreted> = true;

// The counts of a cell, by the letters that the loops use: constants, or a program's own numbers.
template <class Cell>
struct Numbers {
  static constexpr int G = Cell::gates, PA = kGradients<Cell>, SV = Cell::saved, ST = Cell::states, NP = Cell::params;
  static constexpr int apart = Cell::apart;
  static constexpr int DG = PA, GH = G, diagonal = 1;
  static constexpr bool recurrent = Cell::recurrent;
  Numbers(const Problem&) {}
};
template <>
struct Numbers<Interpreted> {
  int G, PA, SV, ST, NP, apart, DG,
      GH;  // DG: vectors of gradients of a step, those of the matrices' products behind the others. GH: read_gates
  int diagonal;
  bool recurrent;
  Numbers(const Problem& p)
      : G(p.cell->gates),
        PA(p.cell->gates + p.cell->apart),
        SV(p.cell->saved),
        ST(p.cell->states),
        NP(p.cell->params),
        apart(p.cell->apart),
        DG(PA + p.cell->blocks),
        GH(p.cell->read_gates),
        diagonal(p.cell->diagonal),
        recurrent(p.cell->recurrent) {}
};

// A row of pre-activations is cut into vectors of hidden units; each brings its PA vectors side by side, in the order of the
// gradients: the input product writes G of them from the first on, the recurrent product adds to the last G.
template <class Cell>
struct Counts : Numbers<Cell> {
  using Numbers<Cell>::G;
  using Numbers<Cell>::apart;
  const Problem& p;
  Counts(const Problem& problem) : Numbers<Cell>(problem), p(problem) {}
  ALWAYS_INLINE int units() const { return apart || G > kPanelVectors ? 1 : kPanelVectors / G; }  // vectors of units a panel holds
  ALWAYS_INLINE int x_gate(int v) const { return (v + G - apart) % G; }
  ALWAYS_INLINE int x_column(int gate) const { return (gate + apart) % G; }
  ALWAYS_INLINE int h_column(int gate) const { return gate + apart; }
  // Where pre-activation i of the cell's formula is.
  ALWAYS_INLINE int column(int i) const { return i < G ? x_column(i) : h_column(i - apart); }

  // function(first vector, how many) for the parts of a product of so many: of more gates than a panel of weights has vectors they take
  // several.
  template <class F>
  ALWAYS_INLINE void for_parts(int vectors, F function) const {
    if constexpr (kInterpreted<Cell>) {
      const int parts = (vectors + kPanelVectors - 1) / kPanelVectors;
      for (int i = 0; i < parts; ++i) function(vectors * i / parts, vectors * (i + 1) / parts - vectors * i / parts);
    } else {
      function(0, vectors);
    }
  }

  int64_t time(const Weights& w, int64_t step) const { return w.direction > 0 ? step : p.T - 1 - step; }
  bool active(int64_t t, int64_t b) const { return !p.lengths || t < p.lengths[b]; }
  // Does the state that enters time t of sequence b count as zero?
  bool cut(int64_t t, int64_t b) const { return p.reset && p.reset[t * p.B + b] && active(t, b); }
};

static ALWAYS_INLINE int lanes_left(int64_t n, int64_t from, int lanes) { return n - from >= lanes ? lanes : n > from ? int(n - from) : 0; }

// function(Count<N>, units, rows) for every vector of units in [u0, u1) and row in [b0, b1), `most` of them at a time while there are
// as many, then one by one.
template <int most, class F>
static ALWAYS_INLINE void for_packs(int64_t u0, int64_t u1, int64_t b0, int64_t b1, F function) {
  int64_t u = u0, b = b0, units[most], rows[most];
  const auto next = [&](int i) __attribute__((always_inline)) {
    units[i] = u, rows[i] = b;
    if (++b == b1) b = b0, ++u;
  };
  int64_t left = (u1 - u0) * (b1 - b0);
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    for (; left >= n; left -= n) {
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) next(i);
      function(count, units, rows);
    }
  };
  run(Count<most>{});
  if constexpr (most > 1) run(Count<1>{});
}

constexpr int64_t kNearestBytes = 32 * 1024;  // weights up to this stay in L1
constexpr int64_t kNearBytes = 512 * 1024;  // weights above this may have to come from L3 in every step, and are fetched ahead

// Row strides: rows a power of two apart fight for the same cache sets, and a load from one waits for a store to the other whose
// address has the same low bits.
template <class S>
static ALWAYS_INLINE int64_t off_pages(int64_t n) {
  constexpr int64_t line = 64 / int64_t(sizeof(S));
  return n % (8 * line) ? n : n + line;
}
template <class Kind>
static ALWAYS_INLINE int64_t row_stride(int64_t n) {  // of operands: padded to the kind's k, and to whole lines
  constexpr int line = 64 / int(sizeof(typename Kind::Operand));
  return off_pages<typename Kind::Operand>(round_up(round_up(n, kKindLanes<Kind>), line > Kind::k_multiple ? line : Kind::k_multiple));
}

// Lays arrays out one after the other, 64-byte aligned; with a null base it only measures.
struct Arena {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* p = base ? (X*)(base + used) : nullptr;
    used += (size_t(count) * sizeof(X) + 127) / 64 * 64;
    return p;
  }
};

// How a team divides R recurrences of B rows: groups of threads take recurrences in turn; within a group by rows of the batch
// where each thread gets enough of them (no barrier in the loop at all), by hidden units otherwise (one barrier a step).
struct Share {
  int group, groups;  // which recurrences: group, group + groups, ..
  int me, size;       // within the group
  bool by_rows;
  bool idle;
};
static inline Share share(int me, int team, int64_t R, int64_t B, int64_t panels) {
  Share s;
  int groups = int(R < team ? R : team);
  while (team % groups) --groups;
  s.groups = groups;
  s.size = team / groups;
  s.group = me / s.size;
  s.me = me % s.size;
  s.by_rows = s.size == 1 || B >= kRowsEach * s.size;
  if (!s.by_rows && s.size > panels) s.size = int(panels);
  s.idle = s.me >= s.size;
  return s;
}
// The threads of a team that have anything to do.
static inline int useful(int threads, int64_t R, int64_t B, int64_t panels) {
  const Share s = share(0, threads, R, B, panels);
  return s.groups * s.size;
}
// base + n elements; null where there is no array.
template <class T, class Base>
static ALWAYS_INLINE T* at(Base* base, int64_t n) {
  return base ? (T*)base + n : nullptr;
}
static inline int64_t part(int64_t n, int64_t i, int64_t parts) { return n * i / parts; }

// Of rows [b0, b1) those up to the last that runs at time t: what lies behind can be left out, which is most of it where the longest
// sequences come first. Never more at a later time.
static ALWAYS_INLINE int64_t live_end(const Problem& p, int64_t t, int64_t b0, int64_t b1) {
  while (p.lengths && b1 > b0 && t >= p.lengths[b1 - 1]) --b1;
  return b1;
}
// Rows [from, to), as one of a group's threads has them to do where these divide the units; else all of them.
struct Rows {
  int64_t from, to;
  Rows(const Share& s, int64_t first, int64_t end)
      : from(s.by_rows ? first : first + part(end - first, s.me, s.size)),
        to(s.by_rows ? end : first + part(end - first, s.me + 1, s.size)) {}
};

// Small numbers cost x86 a hundred cycles each when they turn denormal: flushed to zero inside the loops, restored after. On Arm too, where
// they cost nothing, for a sigmoid to be 0 at -inf: what stood in its place, times an infinity, would be one.
struct [[maybe_unused]] FlushDenormals {
#if defined(__x86_64__)
  unsigned saved;
  ALWAYS_INLINE FlushDenormals() : saved(_mm_getcsr()) {
    _mm_setcsr(saved | 0x8040u);
#if defined(FUSED_RNN_AMX)
    amx_configured = 0;
#endif
  }
  ALWAYS_INLINE ~FlushDenormals() {
    _mm_setcsr(saved);
#if defined(FUSED_RNN_AMX)
    if (amx_configured) _tile_release();
    amx_configured = 0;
#endif
  }
#elif defined(__aarch64__)
  uint64_t saved;
  ALWAYS_INLINE FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" ::"r"(saved | uint64_t(1) << 24));
  }
  ALWAYS_INLINE ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

// Runs all recurrences of a loop.
template <class Loop>
struct Team {
  const Loop& loop;
  char* base;
  size_t group_bytes;

  static void body(void* context, int me, int team) {
    auto& [loop, base, group_bytes] = *(Team*)context;
    const Share s = share(me, team, loop.p.R, loop.p.B, loop.parts());
    if (s.idle) return;
    FlushDenormals region;
    Arena arena{base + s.group * group_bytes};
    const auto memory = loop.layout(arena, team, s.me);
    for (int r = s.group; r < loop.p.R; r += s.groups) loop.recurrence(memory, r, s);
  }
  static void run(const Loop& loop) {
    const int threads = useful(loop.p.threads, loop.p.R, loop.p.B, loop.parts());
    const int groups = int(loop.p.R < threads ? loop.p.R : threads);
    Arena measure{nullptr};
    loop.layout(measure, threads);
    Team team{loop, (char*)fused_rnn::cpu::scratch(measure.used * groups), measure.used};
    for (int g = 0; g < groups; ++g) memset(team.base + g * measure.used, 0, Barrier::words(threads) * sizeof(int64_t));
    fused_rnn::cpu::run_team(threads, body, &team, loop.any_team());
  }
};

}  // namespace FUSED_RNN_ISA
