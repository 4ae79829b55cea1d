#include "rows.h"

#include "launch.h"

namespace fused_rnn::cuda {
namespace {

// As elements of so many bytes.
template <class Element>
std::string copy_as(Rows rows, void* stream) {
  const int per = int(sizeof(Element)) / rows.size;
  rows.width /= per;
  rows.stride /= per;
  const int64_t elements = int64_t(rows.steps.T) * rows.steps.B * rows.width;
  const Kernel<Rows> kernel{&copy_rows_kernel<Element>};
  return launch(kernel, rows, {(elements + kRowThreads - 1) / kRowThreads, kRowThreads, 1, 0, false}, stream);
}

}  // namespace

std::string copy_rows(const Rows& rows, void* stream) {
  // The largest piece that all rows consist of, at addresses that it divides.
  uint64_t all = uint64_t(rows.width) * rows.size | uint64_t(rows.stride) * rows.size;
  for (const void* array : {rows.from, rows.first, static_cast<const void*>(rows.to)}) all |= reinterpret_cast<uintptr_t>(array);
  if (all % 16 == 0) return copy_as<uint4>(rows, stream);
  if (all % 8 == 0) return copy_as<uint64_t>(rows, stream);
  if (all % 4 == 0) return copy_as<uint32_t>(rows, stream);
  return copy_as<uint16_t>(rows, stream);
}

}  // namespace fused_rnn::cuda
