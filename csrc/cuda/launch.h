// One launch of one kernel. Implemented by launch.cu on a GPU and by ../emulated/launch.cpp without one.
#pragma once
#include <cstdint>
#include <string>

#include "kernels.h"
#include "params.h"
#include "plan.h"

namespace fused_rnn::cuda {

struct Shape {
  int64_t ctas;
  int threads;
  int cluster;        // CTAs of a cluster, 1 for none
  int64_t shared;     // bytes of dynamic shared memory
  bool cooperative;   // all CTAs must be resident together, or the launch is refused
};

// Each returns what went wrong, or an empty text.
std::string launch(Kernel<ForwardLoop> kernel, const ForwardLoop& loop, const Shape& shape, void* stream);
std::string launch(Kernel<BackwardLoop> kernel, const BackwardLoop& loop, const Shape& shape, void* stream);
std::string launch(Kernel<Rows> kernel, const Rows& rows, const Shape& shape, void* stream);
std::string launch(Kernel<Join> kernel, const Join& chunks, const Shape& shape, void* stream);
// Those of rows.h.
std::string copy_rows(const Rows& rows, void* stream);
// That of join.h. is_double: of the accumulation type, else it is float.
std::string join(const Join& chunks, bool is_double, void* stream);
// arrived[0 .. count) = 0
std::string clear(uint32_t* arrived, int64_t count, void* stream);

// The kernel of this name in machine code that was compiled since, for the current device and for good; null and the reason in `error`.
void* load(const void* image, const char* name, std::string& error);

// What the device of this number offers; arch 0 and the reason in `error` where it cannot be asked.
Device device_at(int index, std::string& error);

}  // namespace fused_rnn::cuda
