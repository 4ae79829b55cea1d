// What dlpack_view.cpp uses of DLPack 1.3 (github.com/dmlc/dlpack), a C interface whose layout is fixed within a major version. torch's
// copy refuses to be included beside the stable ABI.
#pragma once
#include <cstdint>

namespace fused_rnn::dlpack {

constexpr uint32_t kMajor = 1, kMinor = 3;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

struct Tensor {  // DLTensor
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Exchange {  // DLPackExchangeAPI
  uint32_t major, minor;
  const void* older;
  void (*allocate)();
  void (*managed_from_object)();
  void (*managed_to_object)();
  int (*tensor_from_object)(void* object, Tensor* out);  // a view; 0, or -1 with a Python exception set
  void (*stream)();
};

}  // namespace fused_rnn::dlpack
