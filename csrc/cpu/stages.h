// Runs a program's stages: strips of its bytecode, and between them what is published of whole rows. The two loops over time bring where
// the inputs lie, and take the outputs.
#pragma once
#include "layout.h"

namespace FUSED_RNN_ISA {

using fused_rnn::Publishing;
using fused_rnn::Stage;
using fused_rnn::Term;

// Where an array lies: vector of units u of row b begins at + u unit + b row.
template <class S>
struct Field {
  S* at;
  int64_t unit, row;
  ALWAYS_INLINE Place<S> place(const Strip& strip) const { return {at + strip.first(unit, row), strip.step(unit, row)}; }
  ALWAYS_INLINE Vec<S> load_of(int64_t u, int64_t b) const { return load(at + u * unit + b * row); }
};

// The parts of the sum of function(how many vectors, the first of them) over H units: in one order, however a team divides them.
template <class S, class F>
static ALWAYS_INLINE Vec<S> over_units(int64_t H, F function) {
  constexpr int L = kLanes<S>, parts = 4;
  const int64_t whole = H / L;
  Vec<S> sum[parts] = {};
  int64_t u = 0;
  for (; u + parts <= whole; u += parts) {
    const Pack<S, parts> made = function(Count<parts>{}, u);
#pragma GCC unroll 4
    for (int i = 0; i < parts; ++i) sum[i] += made.v[i];
  }
  for (int i = 0; u < whole; ++u, ++i) sum[i] += function(Count<1>{}, u).v[0];
  if (whole * L < H) sum[parts - 1] += first_lanes<S>(function(Count<1>{}, whole).v[0], int(H - whole * L));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
// A strip to an array of whole vectors, rows `row` apart, if there is one.
template <class S>
static ALWAYS_INLINE void put(const Strip& strip, const Place<S>& value, S* array, int64_t row) {
  if (!array) return;
  S* const to = array + strip.first(kLanes<S>, row);
  const int64_t step = strip.step(kLanes<S>, row);
  for (int e = 0; e < strip.n; ++e) store(to + e * step, value[e]);
}

// One thread's part in the stages of a graph.
template <class Kind>
struct StageWork {
  using S = typename Kind::Accumulator;
  using A = typename Kind::Operand;
  using V = Vec<S>;
  static constexpr int L = kLanes<S>;

  const fused_rnn::Stages* graph;
  Workspace<S>*rows, *units;  // of each stage
  Field<S>* fields;           // of every array
  Field<S>* numbers;          // of every array of one number a row: where the numbers stand side by side, if there are several
  int64_t* copied;            // of every input: the rows before this one are copied where its field is. Behind them: whether any is
  S *crossing, *one_a_row, *products, *how_many, *zero;
  A* operands;
  int64_t unit_vectors, operand_stride, capacity;  // capacity: rows in the arrays of all threads of a group

  // A stage by rows takes a strip of them, or one, through everything while it is in L1.
  static StageWork take(Arena& arena, const fused_rnn::Stages& graph, int64_t H, int64_t B, int threads, int me) {
    StageWork w{};
    w.graph = &graph;
    w.unit_vectors = (H + L - 1) / L;
    w.operand_stride = row_stride<Kind>(H);
    const int64_t strips = int64_t(threads) * kStrip;
    w.capacity = B > strips ? B : strips;
    w.crossing = arena.take<S>((graph.crossing + graph.inputs) * (w.slot(w.capacity) + threads * slot_pad));
    w.one_a_row = arena.take<S>(threads * graph.rows * row_slot(B > kStrip ? B : kStrip));
    w.products = arena.take<S>(graph.products * B * w.product_row());
    w.operands = arena.take<A>(graph.operands * B * w.operand_stride);
    w.zero = arena.take<S>(kPanelVectors * L);
    w.how_many = arena.take<S>(L);
    for (int i = 0; i < threads; ++i) {
      StageWork own = w;
      own.rows = arena.take<Workspace<S>>(graph.stages);
      own.units = arena.take<Workspace<S>>(graph.stages);
      own.fields = arena.take<Field<S>>(graph.arrays());
      own.numbers = arena.take<Field<S>>(graph.rows);
      own.copied = arena.take<int64_t>(graph.inputs + 1);
      for (int s = 0; s < graph.stages; ++s) {
        const auto rows_of = Workspace<S>::take(arena, graph.stage[s].rows, false);
        const auto units_of = Workspace<S>::take(arena, graph.stage[s].units, false);
        if (i == me && own.rows) own.rows[s] = rows_of, own.units[s] = units_of;
      }
      if (i == me) w.rows = own.rows, w.units = own.units, w.fields = own.fields, w.numbers = own.numbers, w.copied = own.copied;
    }
    return w;
  }
  static constexpr int64_t slot_pad = 64 / int64_t(sizeof(S));
  static int64_t row_slot(int64_t rows) { return (rows + 2) * L + rows / L * L; }  // rows of a whole vector, then side by side
  int64_t slot(int64_t rows) const { return off_pages<S>(rows * unit_vectors * L); }
  int64_t product_row() const { return off_pages<S>(unit_vectors * L); }

  // How a thread goes through its rows and vectors of units [u0, u1).
  struct Way {
    int64_t u0, u1, group, b0;       // group: rows that go from one stage to the next together.  b0: the first row
    bool along_units, split, alone;  // alone: a group goes through all stages by itself
  };
  Way way(const Share& s, int64_t B, int64_t u0, int64_t u1, int64_t b0, int64_t b1) const {
    const auto grouped = [](int64_t rows) { return rows < kStrip ? rows : kStrip; };
    Way way{u0, u1, grouped(b1 - b0), b0, false, !s.by_rows && s.size > 1, false};
    // The same of all threads, for they share arrays that lie by it: by the most rows that one of them has.
    way.along_units = unit_vectors >= (way.split ? grouped(B) * s.size : grouped((B + s.size - 1) / s.size));
    if (way.along_units) way.group = 1;
    way.alone = !way.split && graph->products == 0;
    return way;
  }

  // Where input i, or the crossing value behind the inputs, has its place: of a group alone it has no more than one group's rows.
  Field<S> scratch(const Way& way, int me, int64_t B, int64_t i) const {
    const int64_t rows = way.alone ? way.group : B;
    S* const values = crossing + (way.alone ? me * (graph->inputs + graph->crossing) * slot(kStrip) : 0) + i * slot(rows);
    if (way.along_units) return {values, L, way.alone ? 0 : unit_vectors * L};
    return {values - (way.alone ? way.b0 * L : 0), rows * L, L};
  }
  // Once a recurrence: everything but where the inputs lie.
  void prepare(const Share& s, const Way& way, int64_t H, int64_t B) const {
    for (int i = 0; i < graph->stages; ++i) rows[i].prepare(), units[i].prepare();
    if (s.me == 0) {
      store(how_many, splat(S(H)));
      for (int v = 0; v < kPanelVectors; ++v) store(zero + v * L, V{});
      if (operands) memset((void*)operands, 0, size_t(graph->operands * B * operand_stride) * sizeof(A));
    }
    copied[graph->inputs] = false;
    fields[graph->inputs] = {how_many, 0, 0};
    for (int i = 0; i < graph->crossing; ++i) fields[graph->first_crossing() + i] = scratch(way, s.me, B, graph->inputs + i);
    const int64_t row_cap = way.alone ? kStrip : B;
    for (int i = 0; i < graph->rows; ++i) {
      S* const at = one_a_row + (s.me * graph->rows + i) * row_slot(row_cap);
      const int64_t first = way.alone ? way.b0 : 0;
      if (way.group == 1) numbers[i] = fields[graph->first_row() + i] = {at, 0, way.alone ? 0 : L};
      else fields[graph->first_row() + i] = {at - first * L, 0, L}, numbers[i] = {at + row_cap * L - first, 0, 1};
    }
    for (int i = 0; i < graph->products; ++i) fields[graph->first_product() + i] = {products + i * B * product_row(), L, product_row()};
  }

  // Input i is read where it lies; or rows from b0 on are copied before a stage reads them.
  ALWAYS_INLINE void lies(int i, const S* at, int64_t unit, int64_t row) const {
    fields[i] = {const_cast<S*>(at), unit, row};
    copied[i] = kInPlace;
  }
  void to_copy(const Way& way, int me, int64_t B, int i, int64_t b0) const {
    fields[i] = scratch(way, me, B, i);
    copied[i] = b0;
    copied[graph->inputs] = true;
  }

  // All stages for rows [b0, b1).
  //   copy(i, u, b)            the vector u of input i's row b
  //   output(i, strip, place)  takes an output of the graph, or behind those an operand of the products
  //   multiply(publishing)     makes a product, of the same rows and units
  template <class Copy, class Output, class Multiply>
  ALWAYS_INLINE void run(const Way& way, const Share& s, Barrier& barrier, int64_t H, int64_t b0, int64_t b1, Copy copy, Output output,
                         Multiply multiply) const {
    const Stage* const stage = graph->stage;
    for (int first = 0, next; first < graph->stages; first = next) {
      next = first + 1;
      while (!way.split && next < graph->stages && !stage[next - 1].multiplies) ++next;
      for (int64_t g0 = b0; g0 < b1; g0 += way.group) {
        const int64_t g1 = g0 + way.group < b1 ? g0 + way.group : b1;
        if (way.alone && g0 > b0) move_on(way.group);
        for (int k = first; k < next; ++k) {
          if (way.split && k > 0) reduce(stage[k - 1], way, H, g0, g1);
          for (int i = 0; k == 0 && i < graph->known; ++i) {
            const Field<S>& to = numbers[graph->known_array[i] - graph->first_row()];
            for (int64_t b = g0; b < g1; ++b) {
              const V number = splat(S(copy(graph->known_input[i], 0, b)[0]));
              if (way.group == 1) store(to.at + b * to.row, number);
              else to.at[b] = number[0];
            }
          }
          work(stage[k], rows[k], units[k], way, g0, g1, copy, output);
          if (!way.split) reduce(stage[k], way, H, g0, g1);
        }
      }
      if (way.alone && way.group > 1) move_on(-((b1 - b0 - 1) / way.group * way.group));
      if (way.split && next < graph->stages) barrier.wait(s.me);
      for (int i = 0; i < stage[next - 1].published; ++i)
        if (const Publishing& p = stage[next - 1].publishing[i]; p.what == Publishing::What::product) multiply(p);
    }
  }

 private:
  static constexpr int64_t kInPlace = int64_t(1) << 62;

  // What has the rows of one group takes those of another.
  void move_on(int64_t rows_on) const {
    if (rows_on == 0) return;
    const auto move = [&](Field<S>& field) { field.at -= rows_on * field.row; };
    for (int i = 0; i < graph->inputs; ++i)
      if (copied[i] != kInPlace) move(fields[i]);
    for (int i = graph->first_crossing(); i < graph->first_product(); ++i) move(fields[i]);
    for (int i = 0; i < graph->rows; ++i) move(numbers[i]);
  }

  template <class Copy>
  ALWAYS_INLINE void copy_input(int i, const Way& way, int64_t g1, Copy copy) const {
    if (i >= graph->inputs || copied[i] >= g1) return;
    const Field<S>& field = fields[i];
    for (int64_t b = copied[i]; b < g1; ++b)
      for (int64_t u = way.u0; u < way.u1; ++u) store(field.at + u * field.unit + b * field.row, copy(i, u, b));
    copied[i] = g1;
  }

  ALWAYS_INLINE void set(const Bytecode& code, const Workspace<S>& work, const Strip& strip) const {
    for (int i = 0; i < code.inputs; ++i) work.operands[i] = fields[code.array[i]].place(strip);
  }

  template <class Copy, class Output>
  ALWAYS_INLINE void work(const Stage& stage, const Workspace<S>& of_rows, const Workspace<S>& of_units, const Way& way, int64_t g0,
                          int64_t g1, Copy copy, Output output) const {
    for (int i = 0; i < stage.units.inputs && copied[graph->inputs]; ++i) copy_input(stage.units.array[i], way, g1, copy);
    for (int i = 0; i < stage.published && copied[graph->inputs]; ++i) {
      const Publishing& p = stage.publishing[i];
      if (p.what == Publishing::What::product) break;
      for (int k = 0; k < p.terms; ++k) {
        copy_input(p.term[k].from, way, g1, copy);
        for (const int array : {p.term[k].by, p.term[k].less})
          if (array >= 0) copy_input(array, way, g1, copy);
      }
    }
    if (stage.rows.length) {
      const int first = graph->first_row();
      for (int i = 0; i < stage.rows.inputs; ++i) {
        const int array = stage.rows.array[i];
        of_rows.operands[i] =
            array < first ? Place<S>{how_many, 0} : Place<S>{numbers[array - first].at + g0 * numbers[array - first].row, L};
      }
      interpret(stage.rows, of_rows.operands, way.group == 1 ? 1 : int((g1 - g0 + L - 1) / L));
    }
    for (int i = 0; i < stage.spreads && way.group > 1; ++i) {
      const Field<S>&to = fields[stage.spread[i]], &from = numbers[stage.spread[i] - graph->first_row()];
      for (int64_t b = g0; b < g1; ++b) store(to.at + b * L, splat(from.at[b]));
    }
    if (stage.units.length + stage.units.outputs == 0) return;
    const auto body = [&](const Strip& strip) {
      set(stage.units, of_units, strip);
      interpret(stage.units, of_units.operands, strip.n);
      for (int i = 0; i < stage.units.outputs; ++i) output(stage.units.number[i], strip, of_units.output(i));
    };
    const int64_t most = of_units.most;
    if (way.along_units) {
      for (int64_t b = g0; b < g1; ++b)
        for (int64_t u = way.u0; u < way.u1; u += most) body(Strip{u, b, int(way.u1 - u < most ? way.u1 - u : most), true});
    } else {
      for (int64_t u = way.u0; u < way.u1; ++u)
        for (int64_t b = g0; b < g1; b += most) body(Strip{u, b, int(g1 - b < most ? g1 - b : most), false});
    }
  }

  void reduce(const Stage& stage, const Way& way, int64_t H, int64_t g0, int64_t g1) const {
    const V units_of_row = splat(S(H));
    for (int i = 0; i < stage.published; ++i) {
      const Publishing& p = stage.publishing[i];
      if (p.what == Publishing::What::product) return;  // behind the others
      const auto read = [&](auto count, int array, int64_t b, int64_t u) __attribute__((always_inline)) {
        const Field<S>& field = fields[array];
        const S* const at = field.at + b * field.row + u * field.unit;
        return each<S, decltype(count)::value>([&](int k) __attribute__((always_inline)) { return load(at + k * field.unit); });
      };
      const auto first_of = [&](auto count, const Term& t, int64_t b, int64_t u) __attribute__((always_inline)) {
        const auto from = read(count, t.from, b, u);
        return t.less < 0 ? from : from - read(count, t.less, b, u);
      };
      const auto summed = [&](int64_t b) __attribute__((always_inline)) {
        return over_units<S>(H, [&](auto count, int64_t u) __attribute__((always_inline)) {
          auto made = first_of(count, *p.term, b, u);
          if (p.term->by >= 0) made = rounded_product(made * (p.term->less < 0 ? read(count, p.term->by, b, u) : made));
          for (int k = 1; k < p.terms; ++k) {
            const Term& t = p.term[k];
            const auto factor = first_of(count, t, b, u);
            if (t.by < 0) made = made + factor;
            else made = factor * (t.less < 0 ? read(count, t.by, b, u) : factor) + made;
          }
          return made;
        });
      };
      const auto squared = [&](int64_t b, V mean) __attribute__((always_inline)) {
        return over_units<S>(H, [&](auto count, int64_t u) __attribute__((always_inline)) {
          const auto vectors = read(count, p.term[0].from, b, u);
          return each<S, decltype(count)::value>(
              [&](int k) __attribute__((always_inline)) { return (vectors.v[k] - mean) * (vectors.v[k] - mean); });
        });
      };
      const bool variance = p.what == Publishing::What::variance;
      const Field<S>&to = numbers[p.to - graph->first_row()], &sum = p.sum >= 0 ? numbers[p.sum - graph->first_row()] : to;
      if (way.group == 1) {
        for (int64_t b = g0; b < g1; ++b) {
          V made = p.sum >= 0 ? load(sum.at + b * sum.row) : sum_of<S>(summed(b));
          if (variance) made = sum_of<S>(squared(b, made / units_of_row)) / units_of_row;
          store(to.at + b * to.row, made);
        }
        continue;
      }
      for (int64_t b0 = g0; b0 < g1; b0 += L) {  // as many rows as a vector has lanes
        const int rows_here = int(g1 - b0 < L ? g1 - b0 : L);
        V row[L];
        for (int l = 0; l < L && p.sum < 0; ++l) row[l] = l < rows_here ? summed(b0 + l) : V{};
        const auto sums_of_rows = [&] { return rows_here <= L / 2 ? sums<S, L / 2>(row) : sums<S, L>(row); };
        V made = p.sum >= 0 ? load(sum.at + b0) : sums_of_rows();
        if (variance) {
          const V mean = made / units_of_row;
          for (int l = 0; l < L; ++l) row[l] = l < rows_here ? squared(b0 + l, splat(S(mean[l]))) : V{};
          made = sums_of_rows() / units_of_row;
        }
        store(to.at + b0, made);
      }
    }
  }

 public:
  A* operand(int i, int64_t B) const { return operands + i * B * operand_stride; }
};

// A thread's part in the stages of a recurrence, as one of the two loops over time has it: their common beginning.
template <class Loop, class Kind>
struct LoopStages {
  using A = typename Kind::Operand;
  using S = typename Kind::Accumulator;
  using V = Vec<S>;
  static constexpr int L = kLanes<S>;

  const Loop& loop;
  const typename Loop::Memory& m;
  const int r;
  const Share& share;
  const Problem& p;
  const Weights& w;
  const StageWork<Kind>& work;
  const typename StageWork<Kind>::Way way;

  LoopStages(const Loop& of, const typename Loop::Memory& memory, int recurrence, const Share& s, int64_t u0, int64_t u1, int64_t b0,
             int64_t b1)
      : loop(of), m(memory), r(recurrence), share(s), p(of.p), w(p.weights[r]), work(m.stages), way(work.way(s, p.B, u0, u1, b0, b1)) {}
};

}  // namespace FUSED_RNN_ISA
