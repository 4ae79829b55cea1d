// What fused_rnn._C calls of fused_rnn._cuda, by address: it has torch's products and memory, and nothing of CUDA.
// loop: a Bound<ForwardLoop> or <BackwardLoop>. Each returns null, or what went wrong, in words that hold until this thread's next call.
#pragma once

namespace fused_rnn::cuda {

using RunStep = const char* (*)(const void* loop, int step, void* stream);

// By the plan, the kernels and the sizes of `loop`, but over the arrays and the T of this ForwardLoop or BackwardLoop.
using RunOver = const char* (*)(const void* loop, const void* arrays, void* workspace, void* stream);

// Those of rows.h: a Rows.
using CopyRows = const char* (*)(const void* rows, void* stream);

}  // namespace fused_rnn::cuda
