// The backward loop of a cell that is linear in its states, and so in the gradients of them.
#pragma once
#include "scan.h"

namespace FUSED_RNN_ISA {

template <class Loop, class T>
struct BackwardScan {
  using S = Acc<T>;
  using V = Vec<S>;
  static constexpr int L = kLanes<S>;

  const Loop& loop;
  const typename Loop::Memory& m;
  const int r;
  const Share& share;
  const Problem& p;
  const Backward& f;
  const Weights& w;
  const ScanWork<S>& work;
  const Scan& scan;
  const int PA, SV, ST, NP, gradients;  // gradients: the first input that is one

  BackwardScan(const Loop& of, const typename Loop::Memory& memory, int recurrence, const Share& s)
      : loop(of),
        m(memory),
        r(recurrence),
        share(s),
        p(of.p),
        f(of.f),
        w(p.weights[r]),
        work(m.scan),
        scan(*work.scan),
        PA(of.PA),
        SV(of.SV),
        ST(of.ST),
        NP(of.NP),
        gradients(SV + 2 * ST + NP) {}

  // Behind the fields of the graph: the whole gradient of each state after a step, and what a step gives to each param.
  int gradient(int state) const { return scan.fields + state; }
  int of_param(int param) const { return scan.fields + ST + param; }

  void run(Barrier& barrier) const {
    work.prepare();
    const int64_t u0 = part(work.unit_vectors, share.me, share.size), u1 = part(work.unit_vectors, share.me + 1, share.size);
    Window before{};  // the one that ran before this one
    work.for_windows(p, r, share, true, barrier, [&](const Window& window, int64_t q0, int64_t q1) {
      before_gradients(window, q0 * p.B, q1 * p.B);
      barrier.wait(share.me);
      sum_params(before, u0, u1);
      states(window, u0, u1);
      barrier.wait(share.me);
      after_gradients(window, q0 * p.B, q1 * p.B);
      before = window;
    });
    barrier.wait(share.me);
    sum_params(before, u0, u1);
    for (int64_t b = part(p.B, share.me, share.size); b < part(p.B, share.me + 1, share.size); ++b)  // no step hands that of h on
      if (!scan.handed_on[0] && loop.active(loop.time(w, w.direction > 0 ? p.start : p.stop - 1), b))
        memset((void*)(m.dh + b * loop.dh_stride), 0, size_t(loop.dh_stride) * sizeof(S));
  }

  // A strip of rows, each with its time and its row of the batch.
  struct Rows {
    int64_t t[kStrip], b[kStrip];
    bool on[kStrip], cut[kStrip], plain;  // plain: of all, what entered the step is what the step before it left
  };
  Rows rows_of(const Window& window, int64_t i, int n) const {
    Rows rows;
    const bool masked = p.lengths || p.reset;
    rows.plain = !masked;
    int64_t t = window.time + i / p.B, b = i % p.B;
    for (int e = 0; e < n; ++e) {
      rows.t[e] = t, rows.b[e] = b;
      rows.on[e] = !masked || loop.active(t, b), rows.cut[e] = masked && loop.cut(t, b);
      rows.plain = rows.plain && has_before(t);
      if (++b == p.B) b = 0, ++t;
    }
    return rows;
  }
  bool has_before(int64_t t) const {
    const int64_t step = loop.time(w, t);
    return step > p.start || (f.whole && step > 0);
  }

  // The inputs of a part of the graph on a strip of rows.
  void place(const Workspace<S>& part, const Window& window, const Rows& rows, int64_t u, int64_t i, int n) const {
    const int64_t B = p.B, R = p.R, H = p.H, first = u * L, row = (window.row + i) * R + r;
    const int64_t kept_row = row - (f.whole ? 0 : first_time(p, r) * B * R);
    const int lanes = lanes_left(H, first, L);
    const Bytecode& code = *part.code;
    Place<S>* const in = part.operands;
    const auto lies = [&](int k, const auto* base, int64_t stride) __attribute__((always_inline)) {
      if (!code.reads[k]) return;
      if constexpr (sizeof(*base) == sizeof(S)) {
        if (lanes == L) {
          in[k] = {(const S*)base, stride};
          return;
        }
      }
      for (int e = 0; e < n; ++e) store(part.copy(k) + e * L, load(base + e * stride, lanes));
      in[k] = {part.copy(k), L};
    };
    for (int k = 0; k < SV; ++k) lies(k, (const T*)f.saved + (kept_row * SV + k) * H + first, R * SV * H);
    for (int j = 0; j < ST; ++j) {
      const T* const kept = (j == 0 ? (const T*)f.hidden + row * H : (const T*)f.histories[j] + kept_row * H) + first;
      const int64_t back = w.direction * B * R * H;
      const int before = SV + j;
      lies(before + ST, kept, R * H);
      if (rows.plain) {
        lies(before, kept - back, R * H);
      } else if (code.reads[before]) {
        for (int e = 0; e < n; ++e) {
          const int64_t t = rows.t[e], b = rows.b[e];
          const bool kept_one = has_before(t) && loop.active(t - w.direction, b);
          store(part.copy(before) + e * L, rows.cut[e] ? V{}
                                           : kept_one  ? load(kept + e * R * H - back, lanes)
                                                       : load((const S*)f.first[j] + (r * B + b) * H + first, lanes));
        }
        in[before] = {part.copy(before), L};
      }
    }
    for (int k = 0; k < NP; ++k) in[SV + 2 * ST + k] = {m.params + k * loop.unit_stride + first, 0};
    for (int j = 0; j < ST; ++j)
      if (scan.handed_on[j]) in[gradients + j] = {work.at(gradient(j), u, i), L};
    if (!scan.handed_on[0] && code.reads[gradients]) {
      const T* const dy = at<const T>(f.dy, row * H + first);
      for (int e = 0; e < n; ++e) {
        const int64_t t = rows.t[e], b = rows.b[e];
        V d = dy && rows.on[e] ? load(dy + e * R * H, lanes) : V{};
        const bool last = loop.time(w, t) + 1 == p.stop || (w.direction > 0 && !loop.active(t + 1, b));
        if (last && rows.on[e]) d += load(m.dh + b * loop.dh_stride + first);
        store(part.copy(gradients) + e * L, d);
      }
      in[gradients] = {part.copy(gradients), L};
    }
    for (int k = 0; k < scan.fields; ++k) in[gradients + ST + k] = {work.at(k, u, i), L};
  }

  void before_gradients(const Window& window, int64_t i0, int64_t i1) const {
    work.for_rows(work.before, i0, i1, [&](int64_t u, int64_t i, int n) {
      place(work.before, window, rows_of(window, i, n), u, i, n);
      interpret(scan.before, work.before.operands, n);
    });
  }

  void states(const Window& window, int64_t u0, int64_t u1) const {
    for (int j = 0; j < ST; ++j) {
      if (!scan.handed_on[j]) continue;
      for_packs<kPack>(u0, u1, 0, p.B, [&](auto size, const int64_t (&units)[kPack], const int64_t (&rows)[kPack]) {
        constexpr int N = decltype(size)::value;
        if (p.lengths || p.reset) state<N, true>(window, j, units, rows);
        else state<N, false>(window, j, units, rows);
      });
    }
  }
  template <int N, bool masked>
  void state(const Window& window, int j, const int64_t (&units)[kPack], const int64_t (&rows)[kPack]) const {
    const T* const given = (const T*)(j == 0 ? f.dy : f.dsequences[j]);
    V d[N];
    typename ScanWork<S>::Step step_of[N];
    S *all[N], *at[N];
    int lanes[N];
    for (int e = 0; e < N; ++e) {
      const int64_t u = units[e], b = rows[e];
      at[e] = j == 0 ? m.dh + b * loop.dh_stride + u * L : m.dstates[j] + b * loop.unit_stride + u * L;
      d[e] = load(at[e]);
      step_of[e] = work.step(j, u);
      all[e] = work.at(gradient(j), u, 0);
      lanes[e] = lanes_left(p.H, u * L, L);
    }
    const int64_t steps = window.steps, B = p.B, R = p.R, H = p.H, way = w.direction;
    int64_t t = way > 0 ? window.time + steps - 1 : window.time;
    for (int64_t k = 0; k < steps; ++k, t -= way) {
#pragma GCC unroll 4
      for (int e = 0; e < N; ++e) {
        const int64_t b = rows[e], row = (t - window.time) * B + b;
        if constexpr (masked)
          if (!loop.active(t, b)) continue;
        if (given) d[e] += load(given + ((t * B + b) * R + r) * H + units[e] * L, lanes[e]);
        store(all[e] + row * L, d[e]);
        const V next = step_of[e](row, d[e]);
        d[e] = masked && loop.cut(t, b) ? V{} : next;
      }
    }
    for (int e = 0; e < N; ++e) store(at[e], d[e]);
  }

  void after_gradients(const Window& window, int64_t i0, int64_t i1) const {
    const int64_t H = p.H, R = p.R, first_kept = window.row - first_time(p, r) * p.B;
    work.for_rows(work.after, i0, i1, [&](int64_t u, int64_t i, int n) {
      const Rows rows = rows_of(window, i, n);
      place(work.after, window, rows, u, i, n);
      interpret(scan.after, work.after.operands, n);
      const int lanes = lanes_left(H, u * L, L);
      for (int k = 0; k < PA; ++k) {
        const Place<S> value = work.after.output(k);
        T* to = (T*)f.dgates + (((first_kept + i) * R + r) * PA + k) * H + u * L;
        for (int e = 0; e < n; ++e, to += R * PA * H) store(to, rows.on[e] ? value[e] : V{}, lanes);
      }
      for (int k = 0; k < NP && f.dparams; ++k) {
        const Place<S> value = work.after.output(PA + k);
        for (int e = 0; e < n; ++e) store(work.at(of_param(k), u, i + e), rows.on[e] ? value[e] : V{});
      }
    });
  }

  // What the steps of a window give to the params, in their order.
  void sum_params(const Window& window, int64_t u0, int64_t u1) const {
    for (int k = 0; k < NP && f.dparams; ++k)
      for (int64_t u = u0; u < u1; ++u)
        for (int64_t b = 0; b < p.B; ++b) {
          S* const to = (S*)f.dparams + ((r * p.B + b) * NP + k) * p.H + u * L;
          const int lanes = lanes_left(p.H, u * L, L);
          V sum = load(to, lanes);
          for (int64_t i = 0; i < window.steps; ++i)
            sum += load(work.at(of_param(k), u, (w.direction > 0 ? window.steps - 1 - i : i) * p.B + b));
          store(to, sum, lanes);
        }
  }
};

}  // namespace FUSED_RNN_ISA
