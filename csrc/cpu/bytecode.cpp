#include "bytecode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>

namespace fused_rnn::cpu {
namespace {

using Kind = Line::Kind;
constexpr int kNever = -1, kAlways = 1 << 30;
// A sum or difference, what alone reads it, and both in one.
constexpr struct {
  Function inner, then, made;
} kSums[] = {{Function::add_, Function::add_, Function::add_add},
             {Function::add_, Function::mul_, Function::add_mul},
             {Function::sub_, Function::mul_, Function::less_mul}};

// How often each value is read, by the lines that are alive.
std::vector<int> uses(const Graph& graph, const std::vector<bool>& alive) {
  std::vector<int> count(size_t(graph.inputs) + graph.code.size());
  for (size_t k = 0; k < graph.code.size(); ++k)
    for (int i = 0; alive[size_t(graph.inputs) + k] && i < graph.code[k].arity; ++i) ++count[size_t(graph.code[k].args[i])];
  for (const auto& group : graph.outputs)
    for (const int i : group) ++count[size_t(i)];
  return count;
}

}  // namespace

// What a graph leaves out later does not count, nor who else reads a product: the results are the same. Nor are two of different stages
// joined.
//
// Of two products that may cancel neither: a a - b b is 0 where a = b only if both are rounded.
void join_products(Graph& graph) {
  const std::vector<Line> text = graph.code;
  const std::vector<int> read = uses(graph, std::vector<bool>(size_t(graph.inputs) + text.size(), true));
  const auto line_of = [&](int value) { return value < graph.inputs ? nullptr : &text[size_t(value - graph.inputs)]; };
  const auto is = [](const Line* line, Function function, int arity) {
    return line && line->kind == Kind::pointwise && line->arity == arity && line->function == function;
  };
  const auto may_cancel = [&](int value) {
    const Line* line = line_of(value);
    while (is(line, Function::neg_, 1)) line = line_of(line->args[0]);
    return is(line, Function::mul_, 2) || is(line, Function::sigmoid_backward_, 2) || is(line, Function::tanh_backward_, 2);
  };
  std::vector<bool> turned(size_t(graph.inputs));  // whether a minus stands in a value
  for (const Line& line : text) {
    const bool factor = is(&line, Function::mul_, 2) && (turned[size_t(line.args[0])] || turned[size_t(line.args[1])]);
    turned.push_back(factor || is(&line, Function::neg_, 1) || (line.kind == Kind::constant && std::signbit(line.value)));
  }
  std::vector<bool> summed(turned.size());  // products that become part of a sum: what they are made of is read there, too
  for (const Line& line : text)
    for (int i = 0; i < 2 && (is(&line, Function::add_, 2) || is(&line, Function::sub_, 2)); ++i) summed[size_t(line.args[i])] = true;
  for (size_t k = 0; k < graph.code.size(); ++k) {
    Line& line = graph.code[k];
    if (line.kind != Kind::pointwise || line.arity != 2) continue;
    const auto near = [&](int value, Function function) {
      const Line* const made = line_of(value);
      const bool joins =
          is(made, function, 2) && made->stage == line.stage && graph.of_row[size_t(value)] == graph.of_row[size_t(graph.inputs) + k];
      return joins ? made : nullptr;
    };
    const auto alone = [&](int value, Function function) {
      const Line* const made = read[size_t(value)] == 1 ? near(value, function) : nullptr;
      return made && (function == Function::mul_ || graph.line(value)->arity == 2) ? made : nullptr;
    };
    const auto product = [&](int value) { return near(value, Function::mul_); };
    const int a = line.args[0], b = line.args[1];
    const Line *first = product(a), *second = product(b);
    Function joined{};
    if (line.function == Function::mul_) {
      first = alone(a, Function::mul_), second = alone(b, Function::mul_);
      joined = Function::mul_mul;
    } else if (line.function == Function::add_) {
      if (may_cancel(a) && may_cancel(b) && (turned[size_t(a)] || turned[size_t(b)])) continue;
      joined = Function::fma_;
    } else if (line.function == Function::sub_) {
      if (may_cancel(a) && may_cancel(b)) continue;
      joined = second ? Function::sub_mul : Function::mul_sub;
    } else {
      continue;
    }
    for (const auto& [inner, then, made] : kSums) {
      if (first || second || line.function != then || (then == Function::mul_ && summed[size_t(graph.inputs) + k])) continue;
      first = alone(a, inner), second = alone(b, inner);
      joined = made;
    }
    if (a == b || !(first || second)) continue;
    const Line& own = second ? *second : *first;
    line.function = joined;
    line.arity = 3;
    line.args[2] = second ? a : b;
    line.args[0] = own.args[0], line.args[1] = own.args[1];
  }
}

Bytecode Compiled::make(const Graph& graph, size_t groups, const std::function<bool(size_t, int, int)>& moved) {
  std::vector<bool> alive(size_t(graph.inputs) + graph.code.size());
  std::vector<Output> all;
  for (size_t g = 0; g < groups; ++g)
    for (size_t i = 0; i < graph.outputs[g].size(); ++i) {
      const int value = graph.outputs[g][i];
      all.push_back({value, moved(g, int(i), value)});
      alive[size_t(value)] = true;
    }
  std::vector<int> lines, inputs;
  for (size_t k = graph.code.size(); k-- > 0;) {
    if (!alive[size_t(graph.inputs) + k]) continue;
    const Line& line = graph.code[k];
    if (line.arity > 0) lines.push_back(int(k));
    for (int i = 0; i < line.arity; ++i) alive[size_t(line.args[i])] = true;
  }
  std::reverse(lines.begin(), lines.end());
  for (int i = 0; i < graph.inputs; ++i) inputs.push_back(i);
  return make(graph, lines, inputs, {}, all);
}

Bytecode Compiled::make(const Graph& graph, const std::vector<int>& lines, const std::vector<int>& inputs, const std::vector<int>& targets,
                        const std::vector<Output>& wanted) {
  const size_t values = size_t(graph.inputs) + graph.code.size();
  std::vector<int> last(values, kNever);  // the line that reads a value last
  for (const int k : lines) {
    const Line& line = graph.code[size_t(k)];
    for (int i = 0; i < line.arity; ++i) last[size_t(line.args[i])] = k;
  }
  for (const int value : targets) last[size_t(value)] = kAlways;
  for (const Output& output : wanted) last[size_t(output.value)] = kAlways;
  std::vector<int> place(values, kNever);
  const size_t arguments = inputs.size() + targets.size();
  reads.reset(new bool[arguments + 1]());
  for (size_t i = 0; i < inputs.size(); ++i) reads[i] = last[size_t(inputs[i])] != kNever, place[size_t(inputs[i])] = int(i);
  for (size_t k = 0; k < graph.code.size(); ++k) {
    const Line& line = graph.code[k];
    const size_t value = size_t(graph.inputs) + k;
    if (line.kind != Kind::constant || last[value] == kNever) continue;
    const auto same = [&](double known) { return memcmp(&known, &line.value, sizeof(known)) == 0; };
    const auto found = std::find_if(constants.begin(), constants.end(), same);
    place[value] = int(arguments) + int(found - constants.begin());
    if (found == constants.end()) constants.push_back(line.value);
  }
  const auto target_of = [&](int value) {
    const auto found = std::find(targets.begin(), targets.end(), value);
    return found == targets.end() ? kNever : int(inputs.size()) + int(found - targets.begin());
  };
  const int first_register = int(arguments + constants.size());
  int registers = 0;
  std::vector<int> free;
  const auto take = [&] {
    if (free.empty()) return first_register + registers++;
    const int taken = free.back();
    free.pop_back();
    return taken;
  };
  for (const int k : lines) {
    const Line& line = graph.code[size_t(k)];
    Instruction made{line.function, 0, 0, 0, 0};
    uint16_t* const operands[] = {&made.a, &made.b, &made.c};
    for (int i = 0; i < line.arity; ++i) {
      *operands[i] = uint16_t(place[size_t(line.args[i])]);
      if (last[size_t(line.args[i])] == k && place[size_t(line.args[i])] >= first_register) {
        free.push_back(place[size_t(line.args[i])]);
        last[size_t(line.args[i])] = kNever;  // freed once, however often it is read here
      }
    }
    const int value = graph.inputs + k, target = target_of(value);
    made.out = uint16_t(place[size_t(value)] = target != kNever ? target : take());
    code.push_back(made);
  }
  const auto copied = [&](int from, int to) {
    code.push_back({Function::copy, uint16_t(to), uint16_t(from), 0, 0});
    return uint16_t(to);
  };
  for (const int value : targets)
    if (place[size_t(value)] != target_of(value)) copied(place[size_t(value)], target_of(value));
  for (const Output& output : wanted) {
    const int from = place[size_t(output.value)];
    outputs.push_back(output.moved ? copied(from, first_register + registers++) : uint16_t(from));
    numbers.push_back(uint16_t(output.number));
  }
  return {int(arguments), int(constants.size()), registers, int(code.size()), int(outputs.size()), code.data(), constants.data(),
          outputs.data(), reads.get(),           nullptr,   nullptr};
}

Bytecode Compiled::make(const Graph& graph, const std::vector<int>& lines, const std::vector<int>& targets,
                        const std::vector<Output>& wanted, const std::vector<int>& array_of) {
  std::vector<int> inputs;
  const auto reads_one = [&](int value) {
    const Line* const line = graph.line(value);
    const bool own = line && (line->kind == Kind::constant || std::count(lines.begin(), lines.end(), value - graph.inputs));
    if (!own && !std::count(inputs.begin(), inputs.end(), value)) inputs.push_back(value);
  };
  for (const int k : lines)
    for (int i = 0; i < graph.code[size_t(k)].arity; ++i) reads_one(graph.code[size_t(k)].args[i]);
  for (const int value : targets) reads_one(value);
  for (const Output& output : wanted) reads_one(output.value);
  // A target that is an input as well is copied: it has an array of its own beside the one that it is read from.
  for (const int value : inputs)
    arrays.push_back(uint16_t(value < graph.inputs && !graph.of_row[size_t(value)] ? value : array_of[size_t(value)]));
  for (const int value : targets) arrays.push_back(uint16_t(array_of[size_t(value)]));
  Bytecode made = make(graph, lines, inputs, targets, wanted);
  made.array = arrays.data();
  made.number = numbers.data();
  return made;
}

int Staged::length() const {
  int sum = 0;
  for (const Stage& stage : stages) sum += stage.rows.length + stage.units.length + stage.published;
  return sum;
}

void Staged::make(const Graph& graph, size_t groups, const std::function<bool(int)>& changes, const std::function<bool(size_t, int)>& waits,
                  const std::function<bool(size_t, int, int)>& moved) {
  const size_t inputs = size_t(graph.inputs), values = inputs + graph.code.size();
  std::vector<bool> alive(values);
  for (size_t g = 0; g < groups; ++g)
    for (const int value : graph.outputs[g]) alive[size_t(value)] = true;
  for (size_t k = graph.code.size(); k-- > 0;)
    for (int i = 0; alive[inputs + k] && i < graph.code[k].arity; ++i) alive[size_t(graph.code[k].args[i])] = true;

  // Stages that publish nothing any more are one with the next.
  std::vector<int> number(graph.code.size() + 2);
  for (size_t k = 0; k < graph.code.size(); ++k)
    if (alive[inputs + k] && graph.code[k].kind == Kind::publishing) number[size_t(graph.code[k].stage) + 1] = 1;
  for (size_t s = 1; s < number.size(); ++s) number[s] += number[s - 1];
  const int last = number.back();
  std::vector<int> from(values);  // the first stage that can read a value
  for (size_t k = 0; k < graph.code.size(); ++k) {
    const Line& line = graph.code[k];
    if (line.kind == Kind::pointwise) from[inputs + k] = number[size_t(line.stage)];
    if (line.kind == Kind::publishing) from[inputs + k] = number[size_t(line.stage)] + 1;
  }
  const auto pointwise = [&](int value) { return graph.line(value) && graph.line(value)->kind == Kind::pointwise; };
  const auto of_row = [&](int value) { return bool(graph.of_row[size_t(value)]); };

  // What is left in arrays: the last stage that reads it; and whether all of a team do, of others' units too.
  std::vector<int> until(values, kNever);
  std::vector<bool> shared(values);
  const auto reads = [&](int value, int stage, bool row_code) {
    if (!pointwise(value)) return;
    if (of_row(value) ? !(row_code && stage == from[size_t(value)]) : stage > from[size_t(value)])
      until[size_t(value)] = std::max(until[size_t(value)], stage);
  };
  std::vector<std::vector<Output>> outputs(size_t(last) + 1), later(size_t(last) + 1);
  int wanted = 0;
  for (size_t g = 0; g < groups; ++g)
    for (size_t i = 0; i < graph.outputs[g].size(); ++i) {
      const int value = graph.outputs[g][i], stage = waits(g, int(i)) ? last : from[size_t(value)];
      (waits(g, int(i)) ? later : outputs)[size_t(stage)].push_back({value, moved(g, int(i), value), wanted++});
      reads(value, stage, false);
    }
  std::map<int, int> operands;  // of products: value to number
  for (size_t k = 0; k < graph.code.size(); ++k) {
    const Line& line = graph.code[k];
    if (!alive[inputs + k]) continue;
    for (int i = 0; i < line.arity && line.kind == Kind::pointwise; ++i) reads(line.args[i], from[inputs + k], of_row(int(inputs + k)));
    if (line.kind != Kind::publishing) continue;
    const int value = line.args[0], stage = number[size_t(line.stage)];
    if (line.what == Publishing::What::product) {
      if (!operands.emplace(value, int(operands.size())).second) continue;
      outputs[size_t(from[size_t(value)])].push_back({value, false, wanted + operands[value]});
    } else if (graph.line(value) ? graph.line(value)->kind == Kind::constant || pointwise(value) : changes(value)) {
      until[size_t(value)] = std::max(until[size_t(value)], stage);
      shared[size_t(value)] = true;
    }
  }

  // What only a sum reads is taken apart into products and their sum, if that leaves fewer more in arrays than it saves instructions.
  const std::vector<int> read = uses(graph, alive);
  std::map<std::pair<int, int>, int> products;  // that lie in arrays anyway
  for (size_t k = 0; k < graph.code.size(); ++k)
    if (const Line& line = graph.code[k]; alive[inputs + k] && line.kind == Kind::pointwise && line.function == Function::mul_)
      if (read[inputs + k] > 1 && until[inputs + k] != kNever) products[{line.args[0], line.args[1]}] = int(inputs + k);
  std::map<size_t, std::vector<std::array<int, 3>>> parts;  // of a sum's line: what its terms are made of, values or -1
  for (size_t k = 0; k < graph.code.size(); ++k) {
    const Line& line = graph.code[k];
    if (!alive[inputs + k] || line.kind != Kind::publishing || line.what != Publishing::What::sum) continue;
    const int stage = number[size_t(line.stage)];
    std::vector<std::array<int, 3>> found;
    std::vector<int> left_out;
    const auto known = [&](int a, int b) {
      const auto made = products.find({a, b});
      return made == products.end() ? kNever : made->second;
    };
    const auto own = [&](int value, int readers) {  // the line of a value that nobody else reads
      return pointwise(value) && from[size_t(value)] == stage && read[size_t(value)] == readers ? graph.line(value) : nullptr;
    };
    const auto product = [&](int a, int b) {
      const Line* const far = a == b ? own(a, 2) : nullptr;  // the square of a difference, the second part of which is in an array
      int less = kNever;
      if (far && far->function == Function::sub_) less = far->args[1];
      if (far && far->function == Function::sub_mul) less = known(far->args[0], far->args[1]);
      if (less != kNever && of_row(less)) less = kNever;
      if (less != kNever) {
        left_out.push_back(a);
        const int value = far->args[far->arity == 2 ? 0 : 2];
        found.push_back({value, value, less});
      } else if (known(a, b) != kNever) {
        found.push_back({known(a, b), kNever, kNever});
      } else {
        found.push_back({a, b, kNever});
      }
    };
    const std::function<void(int)> take = [&](int value) {
      const Line* const made = own(value, 1);
      const auto is = [&](Function function) { return made && made->function == function; };
      const bool sum = is(Function::add_) || is(Function::add_add);
      if (!sum && !is(Function::fma_) && !is(Function::mul_)) return found.push_back({value, kNever, kNever});
      left_out.push_back(value);
      for (int i = 0; i < made->arity && sum; ++i) take(made->args[i]);
      if (sum) return;
      if (made->arity == 3) take(made->args[2]);
      product(made->args[0], made->args[1]);
    };
    take(line.args[0]);
    std::vector<int> more;
    bool vectors = !left_out.empty();
    for (const auto& part : found)
      for (const int value : part) {
        if (value < 0) continue;
        vectors = vectors && !of_row(value) && (graph.line(value) ? graph.line(value)->kind != Kind::constant : !changes(value));
        if (pointwise(value) && until[size_t(value)] == kNever && !std::count(more.begin(), more.end(), value)) more.push_back(value);
      }
    if (!vectors || more.size() > left_out.size()) continue;
    for (const auto& part : found)
      for (const int value : part) {
        if (value < 0 || !pointwise(value)) continue;
        until[size_t(value)] = std::max(until[size_t(value)], stage);
        shared[size_t(value)] = true;
      }
    for (const int value : left_out) until[size_t(value)] = kNever, alive[size_t(value)] = false;
    parts[k] = found;
  }

  // Arrays, and who fills them: rows and crossing values of each stage.
  std::vector<int> array_of(values, kNever);
  for (size_t i = 0; i < inputs; ++i) array_of[i] = int(i);
  std::vector<std::vector<int>> row_targets(size_t(last) + 1), targets(size_t(last) + 1);
  const auto one_a_row = [&](int value) { return graph.line(value) && of_row(value); };
  std::vector<int> row_values, product_values, ends;  // ends: of the slots of crossing values
  for (size_t i = 0; i < inputs; ++i)
    if (alive[i] && graph.of_row[i]) row_values.push_back(int(i)), known_inputs.push_back(uint16_t(i));
  for (int s = 0; s <= last; ++s)
    for (size_t v = 0; v < values; ++v) {
      const int value = int(v);
      if (until[v] == kNever || from[v] != s) continue;
      if (one_a_row(value)) {
        row_values.push_back(value);
        row_targets[size_t(s)].push_back(value);
        continue;
      }
      size_t slot = 0;
      while (slot < ends.size() && ends[slot] >= s) ++slot;
      if (slot == ends.size()) ends.push_back(0);
      ends[slot] = shared[v] ? kAlways : until[v];
      array_of[v] = graph.inputs + 1 + int(slot);
      targets[size_t(s)].push_back(value);
    }
  for (size_t k = 0; k < graph.code.size(); ++k) {
    const Line& line = graph.code[k];
    if (line.kind == Kind::units) array_of[inputs + k] = graph.inputs;
    if (line.kind != Kind::publishing || !alive[inputs + k]) continue;
    (line.what == Publishing::What::product ? product_values : row_values).push_back(int(inputs + k));
  }
  made.inputs = graph.inputs;
  made.crossing = int(ends.size());
  made.rows = int(row_values.size());
  made.products = int(product_values.size());
  made.outputs = wanted;
  made.operands = int(operands.size());
  made.stages = last + 1;
  for (size_t i = 0; i < row_values.size(); ++i) array_of[size_t(row_values[i])] = made.first_row() + int(i);
  for (size_t i = 0; i < product_values.size(); ++i) array_of[size_t(product_values[i])] = made.first_product() + int(i);

  for (const uint16_t i : known_inputs) known_arrays.push_back(uint16_t(array_of[i]));
  made.known = int(known_inputs.size());
  made.known_input = known_inputs.data();
  made.known_array = known_arrays.data();
  std::vector<bool> spread_before(size_t(made.arrays()));
  for (int s = 0; s <= last; ++s) {
    std::vector<int> lines[2];
    std::vector<Publishing>& published = publishing.emplace_back();
    std::map<int, int> sums;
    const auto publish = [&](Publishing::What what) {
      for (size_t k = 0; k < graph.code.size(); ++k) {
        const Line& line = graph.code[k];
        if (!alive[inputs + k] || line.kind != Kind::publishing || number[size_t(line.stage)] != s || line.what != what) continue;
        const int value = line.args[0], to = array_of[inputs + k];
        std::vector<Term>& made_of = terms.emplace_back();
        if (what != Publishing::What::product && !parts.count(k)) made_of.push_back({uint16_t(array_of[size_t(value)]), -1, -1});
        if (parts.count(k))
          for (const auto& [a, b, less] : parts[k])
            made_of.push_back({uint16_t(array_of[size_t(a)]), b < 0 ? -1 : array_of[size_t(b)], less < 0 ? -1 : array_of[size_t(less)]});
        const auto sum = what == Publishing::What::variance ? sums.find(value) : sums.end();
        published.push_back({what, uint16_t(what == Publishing::What::product ? operands[value] : 0), made_of.data(), int(made_of.size()),
                             uint16_t(to), uint16_t(line.block), sum == sums.end() ? -1 : sum->second});
        if (what == Publishing::What::sum) sums.emplace(value, to);
      }
    };
    publish(Publishing::What::sum);
    publish(Publishing::What::variance);
    publish(Publishing::What::product);
    for (size_t k = 0; k < graph.code.size(); ++k) {
      const int value = int(inputs + k);
      if (alive[size_t(value)] && pointwise(value) && from[size_t(value)] == s) lines[of_row(value)].push_back(int(k));
    }
    std::vector<Output>& own = outputs[size_t(s)];
    own.insert(own.end(), later[size_t(s)].begin(), later[size_t(s)].end());
    Stage stage{};
    stage.rows = codes.emplace_back().make(graph, lines[1], row_targets[size_t(s)], {}, array_of);
    stage.units = codes.emplace_back().make(graph, lines[0], targets[size_t(s)], own, array_of);
    std::vector<uint16_t>& spread_here = spread.emplace_back();
    const auto whole = [&](int array) {
      const bool spread_already = array < made.first_row() || array >= made.first_product() || spread_before[size_t(array)];
      if (!spread_already) spread_here.push_back(uint16_t(array)), spread_before[size_t(array)] = true;
    };
    for (int i = 0; i < stage.units.inputs; ++i) whole(stage.units.array[i]);
    for (const Publishing& p : published)
      for (int i = 0; i < p.terms; ++i) whole(p.term[i].from);
    stage.spread = spread_here.data();
    stage.spreads = int(spread_here.size());
    stage.publishing = published.data();
    stage.published = int(published.size());
    stage.multiplies = !published.empty() && published.back().what == Publishing::What::product;
    stages.push_back(stage);
  }
  made.stage = stages.data();
}

}  // namespace fused_rnn::cpu
