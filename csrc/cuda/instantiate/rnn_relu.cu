#include "../../cells/rnn.h"
#include "../instantiate.h"

namespace fused_rnn::cuda {
FUSED_RNN_INSTANTIATE(RnnRelu)
}  // namespace fused_rnn::cuda
