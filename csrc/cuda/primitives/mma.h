// Products by tensor cores, d += a b in float32. All 32 lanes of a warp take part. The fragment layouts are described in
// csrc/emulator/matrix.h.
#pragma once
#include "types.h"

namespace fused_rnn::cuda {

#if !defined(FUSED_RNN_EMULATE)
#define FUSED_RNN_MMA(shape_and_types) \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// d [16, 8] += a [16, 16] b [16, 8]; the last argument says how the halves of a register are to be read
FUSED_RNN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
#if defined(FUSED_RNN_EMULATE)
  emulator::mma16<emulator::Bf16>(d, a, b);
#else
  FUSED_RNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#endif
}

FUSED_RNN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
#if defined(FUSED_RNN_EMULATE)
  emulator::mma16<emulator::F16>(d, a, b);
#else
  FUSED_RNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#endif
}

// d [16, 8] += a [16, 8] b [8, 8]
FUSED_RNN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FUSED_RNN_EMULATE)
  emulator::mma_tf32(d, a, b);
#else
  FUSED_RNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#endif
}

#undef FUSED_RNN_MMA

}  // namespace fused_rnn::cuda
