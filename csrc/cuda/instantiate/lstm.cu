#include "../../cells/lstm.h"
#include "../instantiate.h"

namespace fused_rnn::cuda {
FUSED_RNN_INSTANTIATE(Lstm)
}  // namespace fused_rnn::cuda
