#include "kernels.h"

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace fused_rnn::cuda {
namespace {

template <class Formula>
Kernels find(NumberKind number) {
  switch (number) {
    case NumberKind::bf16: return kernels_of<Formula, NumberKind::bf16>();
    case NumberKind::f16: return kernels_of<Formula, NumberKind::f16>();
    case NumberKind::tf32: return kernels_of<Formula, NumberKind::tf32>();
    case NumberKind::ieee: return kernels_of<Formula, NumberKind::ieee>();
    case NumberKind::f64: return kernels_of<Formula, NumberKind::f64>();
  }
  return {};
}

}  // namespace

Kernels find_kernels(Cell cell, NumberKind number) {
  switch (cell) {
    case Cell::lstm: return find<Lstm>(number);
    case Cell::gru: return find<Gru>(number);
    case Cell::rnn_tanh: return find<RnnTanh>(number);
    case Cell::rnn_relu: return find<RnnRelu>(number);
  }
  return {};
}

}  // namespace fused_rnn::cuda
