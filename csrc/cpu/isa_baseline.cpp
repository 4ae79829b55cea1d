#define FUSED_RNN_ISA fused_rnn_baseline
#define FUSED_RNN_VECTOR_BYTES 16
#include "kernels.h"

FUSED_RNN_TABLE(baseline)
