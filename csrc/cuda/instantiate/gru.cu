#include "../../cells/gru.h"
#include "../instantiate.h"

namespace fused_rnn::cuda {
FUSED_RNN_INSTANTIATE(Gru)
}  // namespace fused_rnn::cuda
