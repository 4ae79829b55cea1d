#include "program_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace fused_rnn::cpu {
namespace {

constexpr std::string_view kPrefix = "fused_rnn.cell 1|";
constexpr size_t kMostInstructions = 1024;  // of a graph
constexpr size_t kMostText = 1 << 16;

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void require(bool good, const std::string& reason) {
  if (!good) throw Refused(reason);
}

std::vector<std::string_view> split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  for (size_t from = 0;; ++from) {
    const size_t end = std::min(text.find(at, from), text.size());
    parts.push_back(text.substr(from, end - from));
    if ((from = end) == text.size()) return parts;
  }
}
std::vector<std::string_view> words(std::string_view text) {
  std::vector<std::string_view> found = split(text, ' ');
  found.erase(std::remove(found.begin(), found.end(), std::string_view()), found.end());
  return found;
}
template <class Number>
Number number(std::string_view word) {
  Number value{};
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  require(error == std::errc() && end == word.data() + word.size(), "'" + std::string(word) + "' is no number");
  return value;
}
int count(std::string_view word, int least, int most, const char* what) {
  const int value = number<int>(word);
  require(value >= least && value <= most,
          "it has " + std::to_string(value) + " " + what + ", expected " + std::to_string(least) + " to " + std::to_string(most));
  return value;
}

struct Named {
  std::string_view name;
  Function function;
  int arity;
};
constexpr Named kNamed[] = {
#define FUSED_RNN_FUNCTION(name, arity) {#name, Function::name##_, arity},
    FUSED_RNN_FUNCTIONS(FUSED_RNN_FUNCTION)
#undef FUSED_RNN_FUNCTION
};
const Named& named(std::string_view name) {
  for (const Named& one : kNamed)
    if (one.name == name) return one;
  throw Refused("there is no operation '" + std::string(name) + "'");
}

struct Line {
  Function function{};
  int arity = 0;  // of a constant 0
  int args[3] = {};
  double value = 0;
};
struct Graph {
  int inputs;
  std::vector<Line> code;
  std::vector<std::vector<int>> outputs;
};

Graph read(std::string_view text, int inputs, size_t groups) {
  Graph graph{inputs, {}, {}};
  const std::vector<std::string_view> halves = split(text, '>');
  require(halves.size() == 2, "a graph has " + std::to_string(halves.size() - 1) + " '>', expected one");
  const auto value = [&](std::string_view word) {
    const int known = inputs + int(graph.code.size()), i = number<int>(word);
    require(i >= 0 && i < known, "it reads value " + std::to_string(i) + " of " + std::to_string(known));
    return i;
  };
  for (const std::string_view part : split(halves[0], ',')) {
    const std::vector<std::string_view> line = words(part);
    if (line.empty()) continue;
    require(graph.code.size() < kMostInstructions, "it has more than " + std::to_string(kMostInstructions) + " operations");
    Line made;
    if (line[0] == "const") {
      require(line.size() == 2, "a const has one number");
      made.value = number<double>(line[1]);
    } else {
      const Named& one = named(line[0]);
      require(line.size() == size_t(one.arity) + 1, "'" + std::string(part) + "' has another number of arguments");
      made.function = one.function;
      made.arity = one.arity;
      for (int i = 0; i < one.arity; ++i) made.args[i] = value(line[size_t(i) + 1]);
    }
    graph.code.push_back(made);
  }
  for (const std::string_view group : split(halves[1], ';')) {
    graph.outputs.emplace_back();
    for (const std::string_view word : words(group)) graph.outputs.back().push_back(value(word));
  }
  require(graph.outputs.size() == groups, "a graph has " + std::to_string(graph.outputs.size()) + " groups of outputs");
  return graph;
}

// How often each value is read.
std::vector<int> uses(const Graph& graph) {
  std::vector<int> count(size_t(graph.inputs) + graph.code.size());
  for (const Line& line : graph.code)
    for (int i = 0; i < line.arity; ++i) ++count[size_t(line.args[i])];
  for (const auto& group : graph.outputs)
    for (const int i : group) ++count[size_t(i)];
  return count;
}

// A product becomes part of the sum or difference that reads it, and of the product that alone does. What a graph leaves out later does
// not count, nor who else reads a product: the results are the same.
//
// Of two products that may cancel neither: a a - b b is 0 where a = b only if both are rounded.
void join_products(Graph& graph) {
  const std::vector<Line> text = graph.code;
  const std::vector<int> read = uses(graph);
  const auto line_of = [&](int value) { return value < graph.inputs ? nullptr : &text[size_t(value - graph.inputs)]; };
  const auto is = [](const Line* line, Function function, int arity) { return line && line->arity == arity && line->function == function; };
  const auto product = [&](int value) { return is(line_of(value), Function::mul_, 2) ? line_of(value) : nullptr; };
  const auto may_cancel = [&](int value) {
    const Line* line = line_of(value);
    while (is(line, Function::neg_, 1)) line = line_of(line->args[0]);
    return is(line, Function::mul_, 2) || is(line, Function::sigmoid_backward_, 2) || is(line, Function::tanh_backward_, 2);
  };
  std::vector<bool> turned(size_t(graph.inputs));  // whether a minus stands in a value
  for (const Line& line : text) {
    const bool factor = is(&line, Function::mul_, 2) && (turned[size_t(line.args[0])] || turned[size_t(line.args[1])]);
    turned.push_back(factor || is(&line, Function::neg_, 1) || (line.arity == 0 && std::signbit(line.value)));
  }
  for (Line& line : graph.code) {
    if (line.arity != 2) continue;
    const int a = line.args[0], b = line.args[1];
    const Line *first = product(a), *second = product(b);
    Function joined;
    if (line.function == Function::mul_) {
      if (first && read[size_t(a)] != 1) first = nullptr;
      if (second && read[size_t(b)] != 1) second = nullptr;
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
    if (a == b || !(first || second)) continue;
    const Line& own = second ? *second : *first;
    line = {joined, 3, {own.args[0], own.args[1], second ? a : b}, 0};
  }
}

// A bytecode, and what it points to.
struct Compiled {
  std::vector<Instruction> code;
  std::vector<double> constants;
  std::vector<uint16_t> outputs;
  std::unique_ptr<bool[]> reads;

  // The first `groups` of a graph's outputs. moved(group, place, value): whether an output is an input that must not be it itself.
  template <class Moved>
  Bytecode make(const Graph& graph, size_t groups, Moved moved) {
    const size_t inputs = size_t(graph.inputs), values = inputs + graph.code.size();
    constexpr int kNever = -1, kAlways = 1 << 30;
    std::vector<int> last(values, kNever);  // the instruction that reads a value last
    for (size_t g = 0; g < groups; ++g)
      for (const int i : graph.outputs[g]) last[size_t(i)] = kAlways;
    for (size_t k = graph.code.size(); k-- > 0;) {
      if (last[inputs + k] == kNever) continue;
      const Line& line = graph.code[k];
      for (int i = 0; i < line.arity; ++i) last[size_t(line.args[i])] = std::max(last[size_t(line.args[i])], int(k));
    }
    reads.reset(new bool[inputs]);
    std::vector<int> place(values);
    for (size_t i = 0; i < inputs; ++i) reads[i] = last[i] != kNever, place[i] = int(i);
    for (size_t k = 0; k < graph.code.size(); ++k) {
      const Line& line = graph.code[k];
      if (line.arity > 0 || last[inputs + k] == kNever) continue;
      const auto same = [&](double known) { return memcmp(&known, &line.value, sizeof(known)) == 0; };
      const auto found = std::find_if(constants.begin(), constants.end(), same);
      place[inputs + k] = int(inputs) + int(found - constants.begin());
      if (found == constants.end()) constants.push_back(line.value);
    }
    const int first_register = int(inputs + constants.size());
    int registers = 0;
    std::vector<int> free;
    const auto take = [&] {
      if (free.empty()) return first_register + registers++;
      const int taken = free.back();
      free.pop_back();
      return taken;
    };
    for (size_t k = 0; k < graph.code.size(); ++k) {
      const Line& line = graph.code[k];
      if (line.arity == 0 || last[inputs + k] == kNever) continue;
      Instruction made{line.function, 0, 0, 0, 0};
      uint16_t* const operands[] = {&made.a, &made.b, &made.c};
      for (int i = 0; i < line.arity; ++i) {
        *operands[i] = uint16_t(place[size_t(line.args[i])]);
        if (last[size_t(line.args[i])] == int(k) && place[size_t(line.args[i])] >= first_register) {
          free.push_back(place[size_t(line.args[i])]);
          last[size_t(line.args[i])] = kNever;  // freed once, however often it is read here
        }
      }
      made.out = uint16_t(place[inputs + k] = take());
      code.push_back(made);
    }
    for (size_t g = 0; g < groups; ++g)
      for (size_t i = 0; i < graph.outputs[g].size(); ++i) {
        const int value = graph.outputs[g][i];
        outputs.push_back(uint16_t(place[size_t(value)]));
        if (!moved(g, int(i), value)) continue;
        const Instruction copy{Function::copy, uint16_t(first_register + registers++), outputs.back(), 0, 0};
        code.push_back(copy);
        outputs.back() = copy.out;
      }
    return {graph.inputs, int(constants.size()), registers,      int(code.size()), int(outputs.size()),
            code.data(),  constants.data(),      outputs.data(), reads.get()};
  }
};

struct Kept {
  std::string text;
  std::vector<std::string> states, params;
  std::vector<const char*> state_names, param_names;
  Compiled forward, infer, backward;
  Program program{};

  explicit Kept(std::string_view source) : text(source) {
    require(text.size() <= kMostText, "its text has more than " + std::to_string(kMostText) + " characters");
    const std::vector<std::string_view> parts = split(std::string_view(text).substr(kPrefix.size()), '|');
    require(parts.size() == 6, "its text has " + std::to_string(parts.size()) + " parts, expected 6");
    const std::vector<std::string_view> counts = words(parts[1]);
    require(counts.size() == 3, "its text has no three counts");
    const int gates = count(counts[0], 1, kMostGates, "gates"), apart = count(counts[1], 0, gates, "gates apart");
    const bool recurrent = count(counts[2], 0, 1, "matrices W_hh");
    require(recurrent || apart == 0, "it has gates apart, but no recurrent side");
    for (const std::string_view name : words(parts[2])) states.emplace_back(name);
    for (const std::string_view name : words(parts[3])) params.emplace_back(name);
    const int number_of_states = int(states.size()), number_of_params = int(params.size());
    require(number_of_states >= 1 && number_of_states <= kMostStates,
            "it has " + std::to_string(number_of_states) + " states, expected 1 to " + std::to_string(kMostStates));
    require(number_of_params <= kMostParams,
            "it has " + std::to_string(number_of_params) + " params, expected at most " + std::to_string(kMostParams));
    for (const std::string& name : states) state_names.push_back(name.c_str());
    for (const std::string& name : params) param_names.push_back(name.c_str());
    const int pre = gates + apart;
    Graph there = read(parts[4], pre + number_of_states + number_of_params, 2);
    require(int(there.outputs[0].size()) == number_of_states, "its forward has another number of states");
    const int saved = int(there.outputs[1].size());
    require(saved <= kMostSaved, "it keeps " + std::to_string(saved) + " values of a step, expected at most " + std::to_string(kMostSaved));
    Graph back = read(parts[5], saved + 3 * number_of_states + number_of_params, 3);
    require(int(back.outputs[0].size()) == pre && int(back.outputs[1].size()) == number_of_states &&
                int(back.outputs[2].size()) == number_of_params,
            "its backward has another number of gradients");
    join_products(there);
    join_products(back);
    const auto state_moved = [&](size_t group, int place, int value) {
      return group == 0 && place > 0 && value != pre + place && value > pre && value < pre + number_of_states;
    };
    const int gradients = saved + 2 * number_of_states + number_of_params;
    const auto gradient_moved = [&](size_t group, int place, int value) {
      return group == 1 && value != gradients + place && value >= gradients;
    };
    program.forward = forward.make(there, 2, state_moved);
    program.infer = infer.make(there, 1, state_moved);
    program.backward = backward.make(back, 3, gradient_moved);
    program.param_names = param_names.data();
    program.cell = {
        text.c_str(), kProgramNumber,     gates,   number_of_states, saved, apart, number_of_params, recurrent, program.forward.reads[pre],
        false,        state_names.data(), &program};
  }
};

}  // namespace

bool is_program(std::string_view name) { return name.substr(0, kPrefix.size()) == kPrefix; }

const Program* program_of(std::string_view text, std::string& reason) {
  static std::shared_mutex mutex;
  static auto& known = *new std::unordered_map<std::string_view, std::unique_ptr<Kept>>;  // never destroyed: calls may outlive statics
  {
    const std::shared_lock<std::shared_mutex> reading(mutex);
    const auto found = known.find(text);
    if (found != known.end()) return &found->second->program;
  }
  try {
    require(is_program(text), "its text does not begin with '" + std::string(kPrefix) + "'");
    auto made = std::make_unique<Kept>(text);
    const std::unique_lock<std::shared_mutex> writing(mutex);
    const std::string_view key = made->text;
    return &known.emplace(key, std::move(made)).first->second->program;
  } catch (const Refused& refused) {
    reason = refused.what();
    return nullptr;
  }
}

}  // namespace fused_rnn::cpu
