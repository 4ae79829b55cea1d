#define FUSED_RNN_ISA fused_rnn_amx
#define FUSED_RNN_VECTOR_BYTES 64
#include "kernels.h"

FUSED_RNN_TABLE(amx)
