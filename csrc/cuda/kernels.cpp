#include "kernels.h"

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace fused_rnn::cuda {
namespace {

template <class Formula>
Kernels find(Precision precision) {
  switch (precision) {
    case Precision::bf16: return kernels_of<Formula, Precision::bf16>();
    case Precision::f16: return kernels_of<Formula, Precision::f16>();
    case Precision::tf32: return kernels_of<Formula, Precision::tf32>();
    case Precision::ieee: return kernels_of<Formula, Precision::ieee>();
    case Precision::f64: return kernels_of<Formula, Precision::f64>();
  }
  return {};
}

}  // namespace

Kernels find_kernels(Cell cell, Precision precision) {
  switch (cell) {
    case Cell::lstm: return find<Lstm>(precision);
    case Cell::gru: return find<Gru>(precision);
    case Cell::rnn_tanh: return find<RnnTanh>(precision);
    case Cell::rnn_relu: return find<RnnRelu>(precision);
  }
  return {};
}

}  // namespace fused_rnn::cuda
