// Every cell, one line each.
#pragma once
#include <utility>

#include "gru.h"
#include "lstm.h"
#include "rnn.h"
#ifdef FUSED_RNN_MORE_CELLS  // a header in quotes
#include FUSED_RNN_MORE_CELLS
#endif

namespace fused_rnn {

using CellNumbers = std::make_integer_sequence<int, kMostCells>;

struct CellTable {
  CellDescriptor of[kMostCells];
};
template <int... number>
constexpr CellTable make_cell_table(std::integer_sequence<int, number...>) {
  CellTable table{};
  ((table.of[number] = NumberedCell<number>::descriptor), ...);  // not a list in braces, which nvcc hands on to g++ as something else
  return table;
}
// By number, with gaps.
constexpr CellTable kCells = make_cell_table(CellNumbers{});

}  // namespace fused_rnn
