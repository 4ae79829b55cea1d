#include "kernels.h"

#include <type_traits>

#include "../cells/all.h"

namespace fused_rnn::cuda {
namespace {

template <class Formula>
Kernels find(Precision precision) {
  if constexpr (!std::is_same_v<Formula, NoCell>) {
    switch (precision) {
      case Precision::bf16: return kernels_of<Formula, Precision::bf16>();
      case Precision::f16: return kernels_of<Formula, Precision::f16>();
      case Precision::tf32: return kernels_of<Formula, Precision::tf32>();
      case Precision::ieee: return kernels_of<Formula, Precision::ieee>();
      case Precision::f64: return kernels_of<Formula, Precision::f64>();
    }
  }
  return {};
}

template <int... number>
Kernels find(std::string_view cell, Precision precision, std::integer_sequence<int, number...>) {
  Kernels found{};
  const auto named = [&](const char* name) { return name && cell == name; };
  ((named(NumberedCell<number>::descriptor.name) && (found = find<typename NumberedCell<number>::Type>(precision), true)) || ...);
  return found;
}

}  // namespace

Kernels find_kernels(std::string_view cell, Precision precision) { return find(cell, precision, CellNumbers{}); }

}  // namespace fused_rnn::cuda
