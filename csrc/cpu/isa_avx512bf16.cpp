#define FUSED_RNN_ISA fused_rnn_avx512bf16
#define FUSED_RNN_VECTOR_BYTES 64
#define FUSED_RNN_FOR_BF16 avx512
#include "kernels.h"

FUSED_RNN_TABLE(avx512bf16)
