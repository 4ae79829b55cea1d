#include "program_text.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "bytecode.h"

namespace fused_rnn::cpu {
namespace {

constexpr std::string_view kPrefix = "fused_rnn.cell 1|";
constexpr size_t kMostInstructions = 1024;  // of a graph
constexpr size_t kMostText = 1 << 16;
constexpr int kMostDiagonal = 1 << 16;

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

// A graph that makes `product` of its values; the other one makes `transposed`.
enum class Side { forward, backward };

// of_row: of its first inputs.
Graph read(std::string_view text, int inputs, size_t groups, Side side, int blocks, std::vector<bool> of_row_first = {}) {
  of_row_first.resize(size_t(inputs));
  Graph graph{inputs, {}, {}, std::move(of_row_first)};
  const std::vector<std::string_view> halves = split(text, '>');
  require(halves.size() == 2, "a graph has " + std::to_string(halves.size() - 1) + " '>', expected one");
  const auto value = [&](std::string_view word) {
    const int known = inputs + int(graph.code.size()), i = number<int>(word);
    require(i >= 0 && i < known, "it reads value " + std::to_string(i) + " of " + std::to_string(known));
    return i;
  };
  const std::string_view product = side == Side::forward ? "product" : "transposed";
  int stage = 0, run = inputs;  // run: where one of operations that publish begins, which cannot read each other
  bool publishes = false, multiplied[kMostBlocks] = {};
  for (const std::string_view part : split(halves[0], ',')) {
    const std::vector<std::string_view> line = words(part);
    if (line.empty()) continue;
    require(graph.code.size() < kMostInstructions, "it has more than " + std::to_string(kMostInstructions) + " operations");
    const auto arguments = [&](size_t expected) {
      require(line.size() == expected + 1, "'" + std::string(part) + "' has another number of arguments");
    };
    Line made;
    bool of_row = true;
    if (line[0] == "const") {
      require(line.size() == 2, "a const has one number");
      made.value = number<double>(line[1]);
    } else if (line[0] == "units") {
      arguments(0);
      made.kind = Line::Kind::units;
    } else if (line[0] == "sum" || line[0] == "variance" || line[0] == product) {
      const bool multiplies = line[0] == product;
      arguments(multiplies ? 2 : 1);
      made.kind = Line::Kind::publishing;
      made.what = multiplies ? Publishing::What::product : line[0] == "sum" ? Publishing::What::sum : Publishing::What::variance;
      made.args[made.arity++] = value(line.back());
      const Line* const read = graph.line(made.args[0]);
      require(made.args[0] < run, "'" + std::string(part) + "' reads what is published together with it");
      if (read && read->kind == Line::Kind::publishing && read->stage == stage) ++stage;
      if (multiplies) {
        made.block = number<int>(line[1]);
        require(made.block >= 0 && made.block < blocks,
                "'" + std::string(part) + "' takes block " + std::to_string(made.block) + " of " + std::to_string(blocks));
        require(!multiplied[made.block], "it takes block " + std::to_string(made.block) + " twice");
        require(!graph.of_row[size_t(made.args[0])], "'" + std::string(part) + "' reads one number a row, expected a vector");
        multiplied[made.block] = true;
        of_row = false;
      }
    } else {
      const Named& one = named(line[0]);
      arguments(size_t(one.arity));
      made.kind = Line::Kind::pointwise;
      made.function = one.function;
      made.arity = one.arity;
      for (int i = 0; i < one.arity; ++i) {
        made.args[i] = value(line[size_t(i) + 1]);
        of_row = of_row && graph.of_row[size_t(made.args[i])];
      }
    }
    if (made.kind == Line::Kind::pointwise && publishes) ++stage, publishes = false;
    if (made.kind == Line::Kind::publishing) publishes = true;
    made.stage = stage;
    graph.code.push_back(made);
    graph.of_row.push_back(of_row);
    if (made.kind != Line::Kind::publishing) run = inputs + int(graph.code.size());
  }
  for (const std::string_view group : split(halves[1], ';')) {
    graph.outputs.emplace_back();
    for (const std::string_view word : words(group)) graph.outputs.back().push_back(value(word));
  }
  require(graph.outputs.size() == groups, "a graph has " + std::to_string(graph.outputs.size()) + " groups of outputs");
  return graph;
}
bool has_stages(const Graph& graph) {
  return std::any_of(graph.code.begin(), graph.code.end(),
                     [](const Line& line) { return line.kind == Line::Kind::units || line.kind == Line::Kind::publishing; });
}

bool reads(const Graph& graph, int value) {
  bool found = false;
  for (const auto& group : graph.outputs) found |= std::count(group.begin(), group.end(), value) > 0;
  for (const Line& line : graph.code) found |= std::count(line.args, line.args + line.arity, value) > 0;
  return found;
}

bool is_zero(const Graph& graph, int value) {
  const Line* const line = graph.line(value);
  return line && line->kind == Line::Kind::constant && line->value == 0;
}

using Names = std::vector<std::string>;
Names names_of(std::string_view text, size_t least, size_t most, const char* what) {
  Names names;
  for (const std::string_view name : words(text)) names.emplace_back(name);
  count(std::to_string(names.size()), int(least), int(most), what);
  return names;
}
std::vector<const char*> pointers(const Names& names) {
  std::vector<const char*> all;
  for (const std::string& name : names) all.push_back(name.c_str());
  return all;
}

struct Kept {
  std::string text;
  Names states, params, matrices;
  std::vector<const char*> state_names, param_names, matrix_names;
  Compiled forward, infer, backward;
  Staged staged_forward, staged_infer, staged_backward;
  Scanned scan_forward, scan_infer, scan_backward;
  Program program{};

  explicit Kept(std::string_view source) : text(source) {
    require(text.size() <= kMostText, "its text has more than " + std::to_string(kMostText) + " characters");
    const std::vector<std::string_view> parts = split(std::string_view(text).substr(kPrefix.size()), '|');
    require(parts.size() == 6, "its text has " + std::to_string(parts.size()) + " parts, expected 6");
    std::vector<std::string_view> counts = words(parts[1]);
    CellDescriptor& cell = program.cell;
    cell.diagonal = 1;
    for (; !counts.empty() && counts.back().find('=') != std::string_view::npos; counts.pop_back()) {
      const std::string_view flag = counts.back().substr(0, counts.back().find('='));
      require(flag == "diagonal", "its text has a flag '" + std::string(flag) + "', expected diagonal");
      cell.diagonal = count(counts.back().substr(flag.size() + 1), 1, kMostDiagonal, "blocks of W_hh");
    }
    require(counts.size() >= 3, "its text has no three counts");
    const bool further = counts.size() > 3;  // masks, and blocks of matrices
    const int gates = count(counts[0], 1, kMostGates, "gates"), apart = count(counts[1], 0, gates, "gates apart");
    const bool recurrent = count(counts[2], 0, 1, "matrices W_hh");
    require(recurrent || apart == 0, "it has gates apart, but no recurrent side");
    require(recurrent || cell.diagonal == 1, "it has blocks of W_hh, but no recurrent side");
    cell.masks = further ? count(counts[3], 0, kMostMasks, "masks") : 0;
    for (size_t i = 4; i < counts.size(); ++i) {
      const int blocks = count(counts[i], 1, kMostBlocks - cell.blocks, "blocks of a matrix");
      cell.blocks_of[cell.matrices++] = blocks;
      cell.blocks += blocks;
    }
    const std::vector<std::string_view> vectors = split(parts[3], ';');
    require(vectors.size() == (further ? 3 : 1),
            "its text has " + std::to_string(vectors.size()) + " lists of names beside the states', expected " + (further ? "3" : "1"));
    states = names_of(parts[2], 1, kMostStates, "states");
    params = names_of(vectors[0], 0, kMostParams, "params");
    if (further) {
      const size_t of_matrices = size_t(cell.matrices), of_masks = size_t(cell.masks);
      matrices = names_of(vectors[1], of_matrices, of_matrices, "names of matrices");
      names_of(vectors[2], of_masks, of_masks, "names of masks");
    }
    state_names = pointers(states), param_names = pointers(params), matrix_names = pointers(matrices);
    const int pre = gates + apart, number_of_states = int(states.size()), vectors_of_numbers = int(params.size()) + cell.masks;
    Graph there = read(parts[4], pre + number_of_states + vectors_of_numbers, 2, Side::forward, cell.blocks);
    require(int(there.outputs[0].size()) == number_of_states, "its forward has another number of states");
    const int saved = int(there.outputs[1].size());
    require(saved <= kMostSaved, "it keeps " + std::to_string(saved) + " values of a step, expected at most " + std::to_string(kMostSaved));
    check_operands(there);
    std::vector<bool> of_row;  // what forward keeps one number a row of
    for (const int value : there.outputs[1]) of_row.push_back(has_stages(there) && there.of_row[size_t(value)]);
    Graph back =
        read(parts[5], saved + 3 * number_of_states + vectors_of_numbers, cell.matrices ? 4 : 3, Side::backward, cell.blocks, of_row);
    require(int(back.outputs[0].size()) == pre && int(back.outputs[1].size()) == number_of_states &&
                back.outputs[2].size() == params.size() && (!cell.matrices || int(back.outputs[3].size()) == cell.blocks),
            "its backward has another number of gradients");
    cell.read_gates = gates;
    for (int unread = pre - 1; unread >= gates && !reads(there, unread) && is_zero(back, back.outputs[0][size_t(unread)]); --unread)
      --cell.read_gates;
    const auto scan = !recurrent && !cell.masks && !has_stages(there) && !has_stages(back) ? linear_of(there, back, pre) : std::nullopt;
    if (scan) there = scan->first.graph, back = scan->second.graph;
    join_products(there);
    join_products(back);
    if (scan) make_scans(scan->first, scan->second, there, back);
    const auto state_moved = [&](size_t group, int place, int value) {
      return group == 0 && place > 0 && value != pre + place && value > pre && value < pre + number_of_states;
    };
    const int gradients = saved + 2 * number_of_states + vectors_of_numbers;
    const auto gradient_moved = [&](size_t group, int place, int value) {
      return group == 1 && value != gradients + place && value >= gradients && value < gradients + number_of_states;
    };
    cell.reads_h = reads(there, pre);
    if (has_stages(there) || has_stages(back)) {
      const auto is_state = [&](int value) { return value > pre && value < pre + number_of_states; };
      const auto is_gradient = [&](int value) { return value >= gradients; };
      const auto state_waits = [](size_t group, int place) { return group == 0 && place > 0; };
      const auto gradient_waits = [](size_t group, int) { return group == 1; };
      staged_forward.make(there, 2, is_state, state_waits, state_moved);
      staged_infer.make(there, 1, is_state, state_waits, state_moved);
      staged_backward.make(back, back.outputs.size(), is_gradient, gradient_waits, gradient_moved);
      program.staged_forward = staged_forward.get();
      program.staged_infer = staged_infer.get();
      program.staged_backward = staged_backward.get();
      program.length = staged_forward.length();
    } else {
      program.forward = forward.make(there, 2, state_moved);
      program.infer = infer.make(there, 1, state_moved);
      program.backward = backward.make(back, 3, gradient_moved);
      program.length = program.forward.length;
      cell.reads_h = program.forward.reads[pre];
    }
    program.param_names = param_names.data();
    program.matrix_names = matrix_names.data();
    cell.name = text.c_str();
    cell.number = kProgramNumber;
    cell.gates = gates;
    cell.states = number_of_states;
    cell.saved = saved;
    cell.apart = apart;
    cell.params = int(params.size());
    cell.recurrent = recurrent;
    cell.state_names = state_names.data();
    cell.program = &program;
  }

  // Both graphs, if they are linear in the states: h is among them if a step reads it.
  static std::optional<std::pair<LinearGraph, LinearGraph>> linear_of(const Graph& there, const Graph& back, int pre) {
    std::vector<int> states, gradients;
    const int count = int(there.outputs[0].size());
    for (int j = 0; j < count; ++j) {
      const bool read_out = j == 0 && !reads(there, pre) && is_zero(back, back.outputs[1][0]);
      states.push_back(read_out ? -1 : pre + j);
      gradients.push_back(read_out ? -1 : back.inputs - count + j);
    }
    if (count == 1 && states[0] < 0) return {};
    auto first = linear(there, states, 0), second = linear(back, gradients, 1);
    if (!first || !second) return {};
    return std::pair(std::move(*first), std::move(*second));
  }
  // there, back: the same with their products joined.
  void make_scans(LinearGraph first, LinearGraph second, const Graph& there, const Graph& back) {
    first.graph = there, second.graph = back;
    std::vector<int> kept, left = back.outputs[0];
    if (first.handed_on[0] < 0) kept.push_back(there.outputs[0][0]);
    scan_infer.make(first, kept, true);
    kept.insert(kept.end(), there.outputs[1].begin(), there.outputs[1].end());
    scan_forward.make(first, kept, true);
    left.insert(left.end(), back.outputs[2].begin(), back.outputs[2].end());
    scan_backward.make(second, left, false);
    program.scan_forward = scan_forward.get();
    program.scan_infer = scan_infer.get();
    program.scan_backward = scan_backward.get();
  }

  // What a matrix multiplies is the value saved in its place, of which its gradient is made.
  void check_operands(const Graph& graph) const {
    const CellDescriptor& cell = program.cell;
    require(int(graph.outputs[1].size()) >= cell.matrices, "it keeps fewer values than it has matrices");
    for (const Line& line : graph.code) {
      if (line.kind != Line::Kind::publishing || line.what != Publishing::What::product) continue;
      int matrix = 0;
      for (int block = line.block; block >= cell.blocks_of[matrix]; ++matrix) block -= cell.blocks_of[matrix];
      require(graph.outputs[1][size_t(matrix)] == line.args[0],
              "value " + std::to_string(matrix) + " that it keeps is not what its matrix multiplies");
    }
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
