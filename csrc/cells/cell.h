// What describes a cell, and how it is found. A cell is a struct with these constants and its two formulas:
//
//   name, gates, states, state_names, saved   what Python's descriptor says too; state 0 is h, the output, which goes through W_hh
//   apart, params, recurrent, reads_h, projects, linear   as CellDefaults says, where it differs
//   backward_after, backward_before           bit i: backward reads state i after the step, or before it
//
//   forward<M>(a, before, p, after, s)        pre-activations, states and params in, states and what is saved out
//   backward<M>(s, before, p, after, dstate, d, dp)
//                                             dstate: the whole gradient of each state after in, what of it reaches the state before
//                                             past the matrix out; d: the gradients of the pre-activations; dp: this step's of the
//                                             params; after[0]: h_t, in where backward_after says so, out where the cell projects
// An array that has nothing to hold has one element.
//
// A cell that is `staged` is printed by fused_rnn/cuda/printer.py, of a program with masks, matrices of its own or sums over units. Its
// formulas come in stages, one after the other:
//
//   forward<M, stage>(a, before, p, masks, units, c, after, s)
//   backward<M, stage>(s, before, p, masks, units, c, after, dstate, d, dp)
//
// units: H. c: what crosses from stage to stage, with the operands and the results of what is published between them, which
// forward_published and backward_published list. d: last the gradients of the products with each block of its matrices.
//
// a holds the gates in their order, of the `apart` last ones the input side alone; then the recurrent side of those.
// d holds the input side of those first, then the recurrent side of all gates: either side's gradients are `gates` vectors in a row.
#pragma once
#include "math.h"

namespace fused_rnn {

constexpr int kMostCells = 16;   // numbers are less than this
constexpr int kMostStates = 12;
constexpr int kMostParams = 16;
constexpr int kMostMasks = 8;
constexpr int kMostBlocks = 4;  // of H rows, in all of a cell's matrices
constexpr int kMostGates = 16;
constexpr int kMostSaved = 48;
constexpr int kProgramNumber = kMostCells;  // of every cell that is a program
struct Program;                             // cpu/program.h

// What runs between two stages of a step, for all units of a row together.
enum class Publish { sum, variance, product, transposed };
struct Published {
  int stage;  // that it ends
  Publish what;
  int block;  // of a product: which H rows of the cell's matrices, one after the other
  int from, to;  // its operand and its result among what crosses
};

struct CellDefaults {
  static constexpr int params = 0;         // vectors of one number per unit
  static constexpr bool recurrent = true;  // there is a W_hh; without one no gate has a recurrent side
  static constexpr int apart = 0;          // how many of the last gates enter the formula with their input and recurrent side apart
  static constexpr bool reads_h = false;   // forward reads before[0] itself, not only W_hh h
  static constexpr bool projects = false;  // W_hr may stand behind it
  static constexpr bool linear = false;    // in its states, without W_hh: CUDA runs chunks of time side by side
  static constexpr bool sequences = false; // CUDA's persistent backward takes gradients of the other states over time
  static constexpr unsigned backward_after = 0, backward_before = 0;
  static constexpr bool staged = false;
  static constexpr int masks = 0;   // vectors of one number per row and unit
  static constexpr int blocks = 0;  // of H rows, of its matrices
  static constexpr int forward_stages = 1, backward_stages = 1, forward_crossing = 0, backward_crossing = 0;
};

// Pre-activations of a unit, and as many gradients.
template <class Cell>
constexpr int kGradients = Cell::gates + Cell::apart;

// Gradients that a step leaves behind: those, and those of its matrices' products.
template <class Cell>
constexpr int kGradientsLeft = kGradients<Cell> + Cell::blocks;

template <class Cell>
constexpr int kParams = Cell::params > 0 ? Cell::params : 1;  // elements of an array of them

// The same at run time.
struct CellDescriptor {
  const char* name;  // null where there is no cell of this number
  int number, gates, states, saved, apart, params;
  bool recurrent, reads_h, projects;
  const char* const* state_names;
  const Program* program;  // null in a cell that is compiled in
  int read_gates;               // the gates whose recurrent side is read: the first ones
  int masks, matrices, blocks;  // blocks of H rows in all matrices
  int blocks_of[kMostBlocks];   // each matrix
  int diagonal;  // N: W_hh has N blocks on its diagonal and is [G H, H / N]
};

struct NoCell {};
template <int number>
struct NumberedCell {
  using Type = NoCell;
  static constexpr CellDescriptor descriptor{};
};

// In the cell's header: its own number, by which tables of functions find it. Two cells of one number do not compile.
#define FUSED_RNN_CELL(number_, Cell) \
  static_assert(number_ >= 0 && number_ < kMostCells && Cell::states <= kMostStates && Cell::params <= kMostParams, #Cell); \
  static_assert(!Cell::projects || !(Cell::reads_h || ((Cell::backward_after | Cell::backward_before) & 1)), #Cell); \
  template <> \
  struct NumberedCell<number_> { \
    using Type = Cell; \
    static constexpr CellDescriptor descriptor{Cell::name, \
                                               number_, \
                                               Cell::gates, \
                                               Cell::states, \
                                               Cell::saved, \
                                               Cell::apart, \
                                               Cell::params, \
                                               Cell::recurrent, \
                                               Cell::reads_h, \
                                               Cell::projects, \
                                               Cell::state_names, \
                                               nullptr, \
                                               Cell::gates, \
                                               0, \
                                               0, \
                                               0, \
                                               {}, \
                                               1}; \
  };

}  // namespace fused_rnn
