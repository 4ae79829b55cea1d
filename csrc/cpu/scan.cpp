// Which programs are linear in their states, as fused_rnn/flex/scan.py finds them; how they are cut in two.
#include <algorithm>
#include <map>
#include <numeric>

#include "bytecode.h"

namespace fused_rnn {

ScanLimits& scan_limits() {
  static ScanLimits limits{16, 8, 128};
  return limits;
}

}  // namespace fused_rnn

namespace fused_rnn::cpu {
namespace {

using Kind = Line::Kind;
constexpr int kZero = kNoField, kNever = -1;
constexpr int kMostFields = 128;  // each is memory for a whole window of steps

// A value as a sum: of inputs that vary, each times its factor, and the rest.
struct Linear {
  bool is = true;  // false: it is none
  std::map<int, int> factors{};
  int rest = kZero;
  bool fixed() const { return is && factors.empty(); }
};

// Appends to a graph what its values are as sums.
class Sums {
 public:
  Sums(Graph& of, const std::vector<int>& vary) : graph(of) {
    const size_t lines = graph.code.size();
    for (int i = 0; i < graph.inputs; ++i) values.push_back({true, {}, i});
    for (const int i : vary)
      if (i >= 0) values[size_t(i)] = {true, {{i, constant(1)}}, kZero};
    for (size_t k = 0; k < lines; ++k) values.push_back(of_line(Line(graph.code[k]), graph.inputs + int(k)));
  }
  const Linear& operator[](int value) const { return values[size_t(value)]; }

 private:
  int append(Line line) {
    graph.code.push_back(line);
    graph.of_row.push_back(false);
    return graph.inputs + int(graph.code.size()) - 1;
  }
  int constant(double value) {
    Line line;
    line.value = value;
    return append(line);
  }
  const double* number(int value) const {
    const Line* const line = graph.line(value);
    return line && line->kind == Kind::constant ? &line->value : nullptr;
  }
  int made(Function function, int a, int b = 0) {
    const double *const x = number(a), *const y = number(b);
    if (function == Function::neg_ && x) return constant(-*x);
    if (function == Function::add_ && x && y) return constant(*x + *y);
    if (function == Function::mul_ && x && *x == 1) return b;
    if (function == Function::mul_ && y && *y == 1) return a;
    Line line;
    line.kind = Kind::pointwise;
    line.function = function;
    line.arity = function == Function::neg_ ? 1 : 2;
    line.args[0] = a, line.args[1] = b;
    return append(line);
  }
  template <class F>
  static Linear each(const Linear& of, F function) {  // an operation that is linear in it
    Linear out;
    for (const auto& [input, factor] : of.factors) out.factors[input] = function(factor);
    if (of.rest != kZero) out.rest = function(of.rest);
    return out;
  }
  Linear sum(const Linear& a, const Linear& b) {
    if (!a.is || !b.is) return {false};
    Linear out = a;
    for (const auto& [input, factor] : b.factors) {
      const auto found = out.factors.find(input);
      if (found == out.factors.end()) out.factors[input] = factor;
      else found->second = made(Function::add_, found->second, factor);
    }
    if (a.rest == kZero) out.rest = b.rest;
    else if (b.rest != kZero) out.rest = made(Function::add_, a.rest, b.rest);
    return out;
  }
  Linear negated(const Linear& of) {
    return each(of, [&](int part) { return made(Function::neg_, part); });
  }
  Linear of_line(const Line& line, int value) {
    Linear args[3];
    bool fixed = true, is = true;
    for (int i = 0; i < line.arity; ++i) {
      args[i] = values[size_t(line.args[i])];
      fixed = fixed && args[i].fixed(), is = is && args[i].is;
    }
    if (fixed) return {true, {}, value};
    if (!is) return {false};
    const auto with = [&](const Linear& of, int other) { return each(of, [&](int part) { return made(line.function, part, other); }); };
    switch (line.function) {
      case Function::neg_: return negated(args[0]);
      case Function::add_: return sum(args[0], args[1]);
      case Function::sub_: return sum(args[0], negated(args[1]));
      case Function::mul_:
      case Function::fma_: {
        const int by = args[0].fixed() ? 0 : 1;
        if (!args[by].fixed()) return {false};
        const Linear product = each(args[1 - by], [&](int part) { return made(Function::mul_, line.args[by], part); });
        return line.function == Function::fma_ ? sum(product, args[2]) : product;
      }
      case Function::div_:
      case Function::sigmoid_backward_:
      case Function::tanh_backward_: return args[1].fixed() ? with(args[0], line.args[1]) : Linear{false};
      default: return {false};  // of a choice, too: what is not chosen may be infinite or NaN, which no factor 0 forgets
    }
  }

  Graph& graph;
  std::vector<Linear> values;
};

}  // namespace

std::optional<LinearGraph> linear(const Graph& graph, const std::vector<int>& handed_on, size_t group) {
  LinearGraph made{{graph.inputs, {}, {}, graph.of_row}, handed_on, {}, {}, group};
  Graph whole = graph;
  const Sums sums(whole, handed_on);
  std::map<int, int> instead;  // of the value that a state becomes: factor times state, plus the rest
  for (size_t j = 0; j < handed_on.size(); ++j) {
    made.factor.push_back(kNoField), made.rest.push_back(kNoField);
    if (handed_on[j] < 0) continue;
    const int result = graph.outputs[group][j];
    const Linear& value = sums[result];
    const auto factor = value.factors.find(handed_on[j]);
    if (!value.is || value.factors.size() > size_t(factor != value.factors.end())) return {};
    made.rest[j] = value.rest;
    if (factor == value.factors.end()) continue;
    made.factor[j] = factor->second;
    const Line* const by = whole.line(factor->second);
    if (value.rest == kZero && by && by->kind == Kind::constant && by->value == 1) {  // as it was
      instead[result] = handed_on[j];
      continue;
    }
    Line line;
    line.kind = Kind::pointwise;
    line.function = Function::fma_;
    line.arity = 3;
    line.args[0] = factor->second, line.args[1] = handed_on[j];
    line.args[2] = value.rest == kZero ? whole.inputs + int(whole.code.size()) : value.rest;
    if (value.rest == kZero) whole.code.push_back({});  // the constant 0
    whole.code.push_back(line);
    instead[result] = whole.inputs + int(whole.code.size()) - 1;
  }
  // Anew, for what reads a state must stand behind it.
  made.graph.of_row.resize(size_t(graph.inputs));
  std::map<int, int> places;
  const std::function<int(int)> place = [&](int value) {
    const auto other = instead.find(value);
    if (other != instead.end()) value = other->second;
    if (value < graph.inputs) return value;
    if (const auto found = places.find(value); found != places.end()) return found->second;
    Line line = whole.code[size_t(value - graph.inputs)];
    line.stage = 0;
    for (int i = 0; i < line.arity; ++i) {
      line.args[i] = place(line.args[i]);
      const Line* const read = made.graph.line(line.args[i]);
      line.stage |= read ? read->stage : int(std::count(handed_on.begin(), handed_on.end(), line.args[i]) > 0);
    }
    made.graph.code.push_back(line);
    made.graph.of_row.push_back(false);
    return places[value] = graph.inputs + int(made.graph.code.size()) - 1;
  };
  for (const auto& outputs : graph.outputs) {
    made.graph.outputs.emplace_back();
    for (const int value : outputs) made.graph.outputs.back().push_back(place(value));
  }
  for (size_t j = 0; j < handed_on.size(); ++j)
    for (int* const value : {&made.factor[j], &made.rest[j]})
      if (*value != kNoField) *value = place(*value);
  return made;
}

void Scanned::make(const LinearGraph& of, const std::vector<int>& wanted, bool known) {
  const Graph& graph = of.graph;
  std::vector<int> fields, lines[2];
  const auto field = [&](int value) {
    const auto found = std::find(fields.begin(), fields.end(), value);
    if (found != fields.end()) return int(found - fields.begin());
    fields.push_back(value);
    return int(fields.size()) - 1;
  };
  const size_t states = of.handed_on.size();
  for (size_t j = 0; j < states; ++j) {
    made.handed_on[j] = of.handed_on[j] >= 0;
    made.factor[j] = of.factor[j] == kNoField ? kNoField : field(of.factor[j]);
    made.rest[j] = of.rest[j] == kNoField ? kNoField : field(of.rest[j]);
    made.after_input[j] = kNoField;
  }
  std::vector<bool> seen(size_t(graph.inputs) + graph.code.size());
  const auto stage = [&](int value) {  // of what is computed
    const Line* const line = graph.line(value);
    return line && line->kind != Kind::constant ? line->stage : kNever;
  };
  const auto is_state = [&](size_t j, int value) { return known && of.factor[j] != kNoField && graph.outputs[of.group][j] == value; };
  const std::function<void(int)> take = [&](int value) {
    if (stage(value) == kNever || seen[size_t(value)]) return;
    for (size_t j = 0; j < states; ++j)
      if (is_state(j, value)) return;
    seen[size_t(value)] = true;
    const Line& line = *graph.line(value);
    lines[line.stage].push_back(value - graph.inputs);
    for (int i = 0; i < line.arity; ++i) {
      if (line.stage == 1 && stage(line.args[i]) == 0) field(line.args[i]);
      take(line.args[i]);
    }
  };
  for (const int value : wanted) {
    if (stage(value) == 0) field(value);
    take(value);
  }
  for (size_t i = 0; i < fields.size(); ++i) take(fields[i]);
  for (auto& own : lines) std::sort(own.begin(), own.end());

  std::vector<int> given(size_t(graph.inputs));
  std::iota(given.begin(), given.end(), 0);
  made.before = before.make(graph, lines[0], given, fields, {});
  made.fields = int(fields.size());
  given.insert(given.end(), fields.begin(), fields.end());
  for (size_t j = 0; j < states; ++j) {
    const int value = graph.outputs[of.group][j];
    if (!is_state(j, value) || value < graph.inputs) continue;
    made.after_input[j] = int(given.size());
    given.push_back(value);
  }
  std::vector<Output> outputs;
  for (const int value : wanted) outputs.push_back({value});
  made.after = after.make(graph, lines[1], given, {}, outputs);
  ready = made.fields <= kMostFields;
}

}  // namespace fused_rnn::cpu
