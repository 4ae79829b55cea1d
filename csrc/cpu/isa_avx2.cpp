#define FUSED_RNN_ISA fused_rnn_avx2
#define FUSED_RNN_VECTOR_BYTES 32
#include "kernels.h"

FUSED_RNN_TABLE(avx2)
