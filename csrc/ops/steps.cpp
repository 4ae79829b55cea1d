// The loops whose product is torch's, on a GPU or in its emulator: a product and a launch of fused_rnn._cuda for every step, with no Python
// in between. All is issued on one stream, and nothing waits for it.
#include "../cuda/calls.h"
#include "aten.h"

namespace fused_rnn::ops {
namespace {

// The matrices of a time, of a tensor [T, n, m, k].
Tensor at_time(const Tensor& t, int64_t time) {
  return view(t, {t.size(1), t.size(2), t.size(3)}, {t.stride(1), t.stride(2), t.stride(3)}, time * t.stride(0));
}

// Steps first, first + 1, … last, or downwards. Before each, product i: out[i] = a[i] b[i], of batched matrices. directions[i]: 0, a[i] is
// [n, m, k], what the step before has left there; +1 or -1, it is [T, n, m, k] over time, of which a step reads that of the step after it
// in this direction: none after the last.
void run_steps(std::vector<Tensor> a, std::vector<Tensor> b, std::vector<Tensor> out, std::vector<int64_t> directions, int64_t first,
               int64_t last, int64_t run, int64_t loop, int64_t stream) {
  STD_TORCH_CHECK(run && loop && a.size() == b.size() && a.size() == out.size() && a.size() == directions.size(),
                  "fused_rnn: run_steps got ", a.size(), ", ", b.size(), " and ", out.size(), " matrices of ", directions.size(),
                  " products");
  const auto run_step = reinterpret_cast<cuda::RunStep>(run);
  const int64_t way = last < first ? -1 : 1;
  for (int64_t step = first; step != last + way; step += way) {
    for (size_t i = 0; i < a.size(); ++i) {
      if (directions[i] == 0) {
        bmm_into(out[i], a[i], b[i]);
        continue;
      }
      const int64_t T = a[i].size(0), after = step + 1;
      if (after < T) bmm_into(out[i], at_time(a[i], directions[i] > 0 ? after : T - 1 - after), b[i]);
    }
    const char* const error = run_step(reinterpret_cast<const void*>(loop), int(step), reinterpret_cast<void*>(stream));
    STD_TORCH_CHECK(!error, "fused_rnn: ", error);
  }
}

}  // namespace
}  // namespace fused_rnn::ops

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CompositeExplicitAutograd, m) { m.impl("run_steps", TORCH_BOX(&fused_rnn::ops::run_steps)); }
