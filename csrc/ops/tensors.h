// Small helpers between LibTorch's stable ABI and the kernels' plain structs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../cells/all.h"
#include "../cpu/isa.h"
#include "../cpu/program_text.h"
#include "../cpu/quota.h"
#include "../cpu/team.h"
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
inline int32_t torch_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    default: return aoti_torch_dtype_float32();
  }
}
// A new tensor, by the C shim: torch::stable::new_empty goes through the boxed dispatcher, half a microsecond more each time.
inline Tensor empty(const Sizes& sizes, ScalarType type) {
  std::array<int64_t, 8> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  AtenTensorHandle handle;
  const auto failed = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), torch_dtype(type),
                                               aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(!failed, "fused_rnn: not enough memory for a tensor ", text(sizes));
  return Tensor(handle);
}
inline Tensor empty(const Tensor& like, const Sizes& sizes) { return empty(sizes, like.scalar_type()); }
inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, "fused_rnn: no contiguous copy of a tensor ", text(sizes_of(t)), ", for want of memory: ", error.what());
  }
}

// A view: of so many elements from t's first, by strides of t's memory.
inline Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t first = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.data(), strides.data(), first, &handle));
  return Tensor(handle);
}
inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  return strides;
}
// A contiguous tensor's memory by other sizes.
inline Tensor reshaped(const Tensor& t, const Sizes& sizes, int64_t first = 0) { return view(t, sizes, contiguous_strides(sizes), first); }

// Zeros, and conversions between a 16-bit dtype and float, by loops of our own: torch's run on its OpenMP threads, for which a
// forked child waits forever.
inline Tensor zeros(const Sizes& sizes, ScalarType type) {
  Tensor t = empty(sizes, type);
  if (t.numel()) memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());
  return t;
}
// t, contiguous, in memory of its own, as `type`: t's own dtype, float for a 16-bit one, or back.
inline Tensor copied(const Tensor& t, ScalarType type) {
  const Tensor from = as_contiguous(t), to = empty(sizes_of(t), type);
  if (t.numel() == 0) return to;
  if (t.scalar_type() == type) memcpy(to.mutable_data_ptr(), from.const_data_ptr(), size_t(t.numel()) * t.element_size());
  else cpu::kernels().convert(dtype_of(from), dtype_of(to), from.const_data_ptr(), to.mutable_data_ptr(), t.numel());
  return to;
}
inline Tensor converted(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : copied(t, type); }

inline void check_sizes(const char* name, const Tensor& t, const Sizes& expected) {
  bool same = t.dim() == int64_t(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(int64_t(i)) == expected[i];
  STD_TORCH_CHECK(same, "fused_rnn: ", name, " has shape ", text(sizes_of(t)), ", expected ", text(expected));
}

// An op's argument of type str, which is given away with its handle: torch's own conversion leaks a string at every call (2.13).
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  const std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// Null where there is none of that name.
inline const CellDescriptor* find_cell(const char* name) {
  for (const CellDescriptor& cell : kCells.of)
    if (cell.name && !strcmp(cell.name, name)) return &cell;
  return nullptr;
}
// A cell's name for people: of a program its title. Of a long one the beginning, in whole characters of UTF-8.
inline std::string shown(std::string_view name) {
  if (cpu::is_program(name)) {
    const size_t from = name.find('|') + 1;
    name = name.substr(from, name.find('|', from) - from);
  }
  size_t end = name.size() < 80 ? name.size() : 80;
  while (end > 0 && end < name.size() && (static_cast<unsigned char>(name[end]) & 0xC0) == 0x80) --end;
  return std::string(name.substr(0, end));
}
inline const CellDescriptor* cell_of(const std::string& name) {
  if (cpu::is_program(name)) {
    std::string reason;
    const Program* const program = cpu::program_of(name, reason);
    STD_TORCH_CHECK(program, "fused_rnn: cell is '", shown(name), "', which the loops cannot run: ", reason);
    return &program->cell;
  }
  if (const CellDescriptor* const found = find_cell(name.c_str())) return found;
  std::string names;
  for (const CellDescriptor& cell : kCells.of)
    if (cell.name) names += (names.empty() ? "" : ", ") + std::string(cell.name);
  STD_TORCH_CHECK(false, "fused_rnn: cell is '", shown(name), "', expected one of ", names);
  return nullptr;
}

// What a forward takes on one thread, about.
inline double microseconds_of(const Problem& p) {
  const int64_t k = p.D + (p.cell->recurrent ? p.P / p.cell->diagonal : 0);
  const double of_cell = p.cell->program ? 8.0 * p.cell->program->length : 0;  // an operation of a program takes as long
  const double multiplied = 2.0 * (double(p.cell->gates) * double(k) + double(p.cell->blocks) * double(p.H));
  return double(p.T) * double(p.B) * double(p.R) * double(p.H) * (multiplied + of_cell) / 100e3;
}
// One thread for what takes less than about 200 us there: waking the others and their barriers would cost as much. Where threads divide
// the units, as many as have so many microseconds of a step each (a lone row takes longer than it is reckoned to). Never more than torch's
// number, nor than a container's quota, which torch does not ask for.
inline int threads_for(const Problem& p) {
  const double microseconds = microseconds_of(p), most = microseconds / 100;
  if (most < 2) return 1;
  static const int quota = cpu::quota();
  int threads = int(torch::stable::get_num_threads());
  if (threads > quota) threads = quota;
  if (threads > most) threads = int(most);
  const int64_t apart = p.R > 1 && p.B < cpu::kRowsEach ? p.R : p.B * p.R / cpu::kRowsEach;  // who never wait in the loop
  if (!p.cell->recurrent || threads <= apart) return threads;
  const int64_t together = int64_t(microseconds / double(p.T) / (p.B > 1 ? 5 : 2.5)), of_units = together > apart ? together : apart;
  return threads < of_units ? threads : of_units > 1 ? int(of_units) : 1;
}

}  // namespace fused_rnn::ops
