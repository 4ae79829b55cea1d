// torch's operators by its dispatcher, as the stable ABI has them: those that layers on a GPU are made of.
#pragma once
#include "tensors.h"

namespace fused_rnn::ops {

template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// [.., n, m] [.., m, k], into a tensor that there is, or a new one.
inline void bmm_into(const Tensor& out, const Tensor& a, const Tensor& b) { call("aten::bmm", "out", a, b, out); }
inline Tensor mm(const Tensor& a, const Tensor& b) { return call("aten::mm", "", a, b); }
// rows [N, K] times w [M, K] transposed, plus a bias [M], if there is one.
inline Tensor linear(const Tensor& rows, const Tensor& w, const MaybeTensor& bias) { return call("aten::linear", "", rows, w, bias); }
// Of an operator with alpha, a number, the stable ABI has this one alone.
inline Tensor added(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }
inline Tensor joined(const std::vector<Tensor>& parts) { return parts.size() == 1 ? parts[0] : call("aten::cat", "", parts, int64_t(0)); }
inline Tensor summed_rows(const Tensor& rows) {
  return call("aten::sum", "dim_IntList", rows, std::optional(std::vector<int64_t>{0}), false, std::optional<ScalarType>());
}
inline Tensor turned(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Rows first .. first + count - 1 of a matrix or of a vector.
inline Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  Sizes sizes = sizes_of(t), strides(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) strides[i] = t.stride(int64_t(i));
  sizes[0] = count;
  return view(t, sizes, strides, first * strides[0]);
}

// A new tensor beside another one, on its device.
inline Tensor empty_beside(const Tensor& like, const Sizes& sizes, ScalarType type) {
  const Sizes strides = contiguous_strides(sizes);
  int32_t kind = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &kind));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), torch_dtype(type), kind, index, &handle));
  return Tensor(handle);
}
inline Tensor empty_beside(const Tensor& like, const Sizes& sizes) { return empty_beside(like, sizes, like.scalar_type()); }

}  // namespace fused_rnn::ops
