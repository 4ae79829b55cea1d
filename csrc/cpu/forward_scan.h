// The forward loop of a cell that is linear in its states.
#pragma once
#include "scan.h"

namespace FUSED_RNN_ISA {

template <class Loop, class Kind, class T>
struct ForwardScan {
  using S = typename Kind::Accumulator;
  using V = Vec<S>;
  static constexpr int L = kLanes<S>;

  const Loop& loop;
  const typename Loop::Memory& m;
  const int r;
  const Share& share;
  const Problem& p;
  const Weights& w;
  const ScanWork<S>& work;
  const Scan& scan;
  const int PA, ST;

  ForwardScan(const Loop& of, const typename Loop::Memory& memory, int recurrence, const Share& s)
      : loop(of), m(memory), r(recurrence), share(s), p(of.p), w(p.weights[r]), work(m.scan), scan(*work.scan), PA(of.PA), ST(of.ST) {}

  // Behind the fields of the graph: of each state what enters a step, and what comes out.
  int entering(int state) const { return scan.fields + state; }
  int leaving(int state) const { return scan.fields + ST + state; }

  void run(Barrier& barrier) const {
    work.prepare();
    work.for_windows(p, r, share, false, barrier, [&](const Window& window, int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; q += loop.chunk_steps) before_states(window, q, q1 - q < loop.chunk_steps ? q1 : q + loop.chunk_steps);
      barrier.wait(share.me);
      states(window, part(work.unit_vectors, share.me, share.size), part(work.unit_vectors, share.me + 1, share.size));
      barrier.wait(share.me);
      after_states(window, q0 * p.B, q1 * p.B);
    });
    barrier.wait(share.me);
  }

  // The inputs of a part of the graph on a strip of rows.
  void place(const Workspace<S>& part, int64_t u, int64_t i) const {
    Place<S>* const in = part.operands;
    for (int a = 0; a < PA; ++a) in[a] = {m.pre + i * loop.row + (u * PA + loop.column(a)) * L, loop.row};
    for (int k = 0; k < loop.NP; ++k) in[PA + ST + k] = {m.params + k * loop.state_stride + u * L, 0};
    for (int k = 0; k < scan.fields; ++k) in[PA + ST + loop.NP + k] = {work.at(k, u, i), L};
  }

  void before_states(const Window& window, int64_t q0, int64_t q1) const {
    const int64_t end = live_end(p, window.time + q0, 0, p.B);
    if (end == 0) return;
    const int64_t step = w.direction > 0 ? window.step + q0 : window.step + window.steps - q1;
    typename Loop::Memory own = m;
    own.pre += q0 * p.B * loop.row;
    const auto in = loop.stage_input(own, r, share.me, step, step + q1 - q0, 0, end);
    for (int64_t j = 0; j < loop.panels; ++j) loop.input(own, r, in, 0, j, j + 1 < loop.panels ? j + 1 : -1);
    work.for_rows(work.before, q0 * p.B, q1 * p.B, [&](int64_t u, int64_t i, int n) {
      place(work.before, u, i);
      interpret(scan.before, work.before.operands, n);
    });
  }

  void states(const Window& window, int64_t u0, int64_t u1) const {
    for (int j = 0; j < ST; ++j) {
      if (!scan.handed_on[j]) continue;
      for_packs<kPack>(u0, u1, 0, p.B, [&](auto size, const int64_t (&units)[kPack], const int64_t (&rows)[kPack]) {
        constexpr int N = decltype(size)::value;
        if (p.lengths || p.reset || (loop.f.every && j > 0)) state<N, true>(window, j, units, rows);
        else state<N, false>(window, j, units, rows);
      });
    }
  }
  template <int N, bool watched>
  void state(const Window& window, int j, const int64_t (&units)[kPack], const int64_t (&rows)[kPack]) const {
    V s[N];
    typename ScanWork<S>::Step step_of[N];
    S *in[N], *out[N];
    for (int e = 0; e < N; ++e) {
      const int64_t u = units[e], b = rows[e];
      s[e] = j == 0 ? load(m.h[0] + b * loop.h_stride + u * L) : load(m.states[j] + b * loop.state_stride + u * L);
      step_of[e] = work.step(j, u);
      in[e] = work.at(entering(j), u, 0), out[e] = work.at(leaving(j), u, 0);
    }
    const int64_t steps = window.steps, B = p.B, way = w.direction, every = loop.f.every;
    int64_t t = way > 0 ? window.time : window.time + steps - 1;
    for (int64_t step = window.step; step < window.step + steps; ++step, t += way) {
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        const int64_t b = rows[e], row = (t - window.time) * B + b;
        if constexpr (watched) {
          if (every && j > 0 && step % every == 0)
            store((S*)loop.f.checkpoints[j] + ((step / every * p.R + r) * B + b) * p.H + units[e] * L, s[e],
                  lanes_left(p.H, units[e] * L, L));
          if (!loop.active(t, b)) continue;
          if (loop.cut(t, b)) s[e] = V{};
        }
        store(in[e] + row * L, s[e]);
        const V next = step_of[e](row, s[e]);
        s[e] = j == 0 ? rounded<T>(next) : next;
        store(out[e] + row * L, next);
      }
    }
    for (int e = 0; e < N; ++e) {
      const int64_t u = units[e], b = rows[e];
      if (j == 0) store(m.h[0] + b * loop.h_stride + u * L, zero_padded<Kind>(s[e], lanes_left(p.H, u * L, L)));
      else store(m.states[j] + b * loop.state_stride + u * L, s[e]);
    }
  }

  void after_states(const Window& window, int64_t i0, int64_t i1) const {
    const int64_t H = p.H, first_kept = window.row - first_time(p, r) * p.B;
    const bool masked = p.lengths || p.reset;
    const int SV = loop.f.saved ? loop.SV : 0, kept = scan.handed_on[0] ? 0 : 1;  // h comes before what is saved
    work.for_rows(work.after, i0, i1, [&](int64_t u, int64_t i, int n) {
      bool on[kStrip];
      int64_t ends[kStrip];  // whose last step in this window it is
      int64_t t = window.time + i / p.B, b = i % p.B;
      for (int e = 0; e < n; ++e) {
        on[e] = !masked || loop.active(t, b);
        const bool last = w.direction > 0 ? t + 1 == window.time + window.steps || !loop.active(t + 1, b) : t == window.time;
        ends[e] = on[e] && last ? b : -1;
        if (++b == p.B) b = 0, ++t;
      }
      place(work.after, u, i);
      Place<S>* const in = work.after.operands;
      for (int j = 0; j < ST; ++j) {
        if (scan.handed_on[j]) in[PA + j] = {work.at(entering(j), u, i), L};
        if (scan.after_input[j] != kNoField) in[scan.after_input[j]] = {work.at(leaving(j), u, i), L};
      }
      interpret(scan.after, in, n);
      const int lanes = lanes_left(H, u * L, L);
      const auto write = [&](void* base, int64_t row, int64_t width, int64_t column, const Place<S>& value) __attribute__((always_inline)) {
        T* to = at<T>(base, ((row + i) * p.R + r) * width + column + u * L);
        for (int e = 0; e < n && base; ++e, to += p.R * width) store(to, on[e] ? value[e] : V{}, lanes);
      };
      const Place<S> h = kept ? work.after.output(0) : Place<S>{work.at(leaving(0), u, i), L};
      write(loop.f.y, window.row, H, 0, h);
      write(loop.f.hidden, window.row, H, 0, h);
      for (int e = 0; e < n && kept; ++e)
        if (ends[e] >= 0) store(m.h[0] + ends[e] * loop.h_stride + u * L, zero_padded<Kind>(rounded<T>(h[e]), lanes));
      for (int k = 0; k < SV; ++k) write(loop.f.saved, first_kept, SV * H, k * H, work.after.output(kept + k));
      for (int j = 1; j < ST; ++j) write(loop.f.histories[j], first_kept, H, 0, {work.at(leaving(j), u, i), L});
    });
  }
};

}  // namespace FUSED_RNN_ISA
