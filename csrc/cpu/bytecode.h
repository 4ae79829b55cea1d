// From a graph as its text has it to bytecode: products joined, registers allocated, cut into stages.
#pragma once
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "program.h"

namespace fused_rnn::cpu {

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void require(bool good, const std::string& reason) {
  if (!good) throw Refused(reason);
}

// An operation of a graph.
struct Line {
  enum class Kind { constant, units, pointwise, publishing } kind = Kind::constant;
  Function function{};
  Publishing::What what{};
  int block = 0;  // of a product
  int stage = 0;
  int arity = 0;  // of a constant, and of units, 0
  int args[3] = {};
  double value = 0;
};
struct Graph {
  int inputs;
  std::vector<Line> code;
  std::vector<std::vector<int>> outputs;
  std::vector<bool> of_row{};  // which values are one number a row

  const Line* line(int value) const { return value < inputs ? nullptr : &code[size_t(value - inputs)]; }
};

// A product becomes part of the sum or difference that reads it, and of the product that alone does; a sum or difference of the sum or
// product that alone does.
void join_products(Graph& graph);

// An output of a bytecode. moved: it must not be an input itself.
struct Output {
  int value;
  bool moved = false;
  int number = 0;
};

// A bytecode, and what it points to.
class Compiled {
 public:
  // What the first `groups` of a graph's outputs take.
  Bytecode make(const Graph& graph, size_t groups, const std::function<bool(size_t group, int place, int value)>& moved);
  // Some of a graph's lines. inputs, targets: the values that they read of others, and that they leave in arrays.
  Bytecode make(const Graph& graph, const std::vector<int>& lines, const std::vector<int>& inputs, const std::vector<int>& targets,
                const std::vector<Output>& outputs);
  // The same as part of a stage. array_of: of values.
  Bytecode make(const Graph& graph, const std::vector<int>& lines, const std::vector<int>& targets, const std::vector<Output>& outputs,
                const std::vector<int>& array_of);

 private:
  std::vector<Instruction> code;
  std::vector<double> constants;
  std::vector<uint16_t> outputs, arrays, numbers;
  std::unique_ptr<bool[]> reads;
};

// A graph in stages, and what they point to.
class Staged {
 public:
  // changes: whether a loop overwrites an input with the output of the same name, which therefore waits for the last stage.
  void make(const Graph& graph, size_t groups, const std::function<bool(int input)>& changes,
            const std::function<bool(size_t group, int place)>& waits,
            const std::function<bool(size_t group, int place, int value)>& moved);
  const Stages* get() const { return &made; }
  int length() const;

 private:
  Stages made{};
  std::vector<Stage> stages;
  std::vector<uint16_t> known_inputs, known_arrays;
  std::list<Compiled> codes;
  std::list<std::vector<Publishing>> publishing;
  std::list<std::vector<Term>> terms;
  std::list<std::vector<uint16_t>> spread;
};

// A graph that is linear in what a step hands on to the next, each in itself alone: it becomes a factor times what it was, plus a rest.
// Written so, and every line that such an input goes into is of stage 1.
struct LinearGraph {
  Graph graph;
  std::vector<int> handed_on;     // of each state the input that is handed on, or -1
  std::vector<int> factor, rest;  // of each the values, or kNoField: zero
  size_t group;                   // of the outputs that those inputs become
};
std::optional<LinearGraph> linear(const Graph& graph, const std::vector<int>& handed_on, size_t group);

// Its two parts, and what they point to.
class Scanned {
 public:
  // wanted: outputs of the second part.  known: what a step hands on is an input of it.
  void make(const LinearGraph& of, const std::vector<int>& wanted, bool known);
  const Scan* get() const { return ready ? &made : nullptr; }

 private:
  Scan made{};
  Compiled before, after;
  bool ready = false;
};

}  // namespace fused_rnn::cpu
