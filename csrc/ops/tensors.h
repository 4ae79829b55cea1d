// Small helpers between LibTorch's stable ABI and the kernels' plain structs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../params.h"

namespace fused_rnn::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "fused_rnn: dtype must be float32, float64, bfloat16 or float16");
  }
  return Dtype::f32;
}
inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, const Sizes& sizes) { return torch::stable::new_empty(like, sizes); }
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) { return torch::stable::new_empty(like, sizes, type); }
inline Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType type) { return torch::stable::new_zeros(like, sizes, type); }
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor converted(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

inline std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}
inline Sizes sizes_of(const Tensor& t) {
  Sizes s(size_t(t.dim()));
  for (int64_t i = 0; i < t.dim(); ++i) s[size_t(i)] = t.size(i);
  return s;
}
inline void check_sizes(const char* name, const Tensor& t, const Sizes& expected) {
  bool same = t.dim() == int64_t(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(int64_t(i)) == expected[i];
  STD_TORCH_CHECK(same, "fused_rnn: ", name, " has shape ", text(sizes_of(t)), ", expected ", text(expected));
}

inline Cell cell_of(const std::string& name) {
  if (name == "lstm") return Cell::lstm;
  if (name == "gru") return Cell::gru;
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  STD_TORCH_CHECK(false, "fused_rnn: cell is '", name, "', expected lstm, gru, rnn_tanh or rnn_relu");
  return Cell::lstm;
}
inline int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
inline int saved_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 0; }      // gate vectors kept per step
inline int gradients_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }  // and gradients made
inline bool has_cell(Cell cell) { return cell == Cell::lstm; }

}  // namespace fused_rnn::ops
