// A step of a loop as a plain function, for who issues many of them: fused_rnn._C, which has torch's products and nothing of CUDA.
#pragma once

namespace fused_rnn::cuda {

// loop: a Bound<ForwardLoop> or <BackwardLoop>. Returns null, or what went wrong, in words that hold until this thread's next step.
using RunStep = const char* (*)(const void* loop, int step, void* stream);

}  // namespace fused_rnn::cuda
