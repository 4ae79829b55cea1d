// Narrow weights of a register as wider numbers, all of them exact. A byte is put into the mantissa of a number whose last place is worth
// 1, and one subtraction makes it what it was. Where the mantissa has room for all of it, it is kept biased, 128 more than it is.
#pragma once
#include <cstring>

#include "types.h"

namespace fused_rnn::cuda {

// Of the bytes of two registers, `low` 0 to 3 and `high` 4 to 7, the four that the selector's hexadecimal digits name, the last one lowest.
FUSED_RNN_DEVICE uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(FUSED_RNN_EMULATE)
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return found;
#else
  return __byte_perm(low, high, selector);
#endif
}

// Two sums at once, of the numbers in the halves of two registers.
FUSED_RNN_DEVICE uint32_t add_halves(uint32_t a, uint32_t b, f16) {
#if defined(FUSED_RNN_EMULATE)
  const auto sum = [](uint32_t x, uint32_t y) { return to_float(f16{uint16_t(x)}) + to_float(f16{uint16_t(y)}); };
  return pack<f16>(sum(a, b), sum(a >> 16, b >> 16));
#else
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#endif
}
FUSED_RNN_DEVICE uint32_t add_halves(uint32_t a, uint32_t b, bf16) {
#if defined(FUSED_RNN_EMULATE)
  const auto sum = [](uint32_t x, uint32_t y) { return to_float(bf16{uint16_t(x)}) + to_float(bf16{uint16_t(y)}); };
  return pack<bf16>(sum(a, b), sum(a >> 16, b >> 16));
#else
  uint32_t sum;  // add.bf16x2 begins with sm_90
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
#endif
}

// Two bfloat16.
FUSED_RNN_DEVICE void widen_bf16(uint32_t word, uint32_t (&wide)[2]) {
  wide[0] = word << 16;
  wide[1] = word & 0xffff0000u;
}

// Four integers as they are kept.
template <class Operand>
FUSED_RNN_DEVICE uint32_t keep_int8(uint32_t word, Operand) {
  return word ^ 0x80808080u;
}
FUSED_RNN_DEVICE uint32_t keep_int8(uint32_t word, bf16) { return word; }

// The last place of a float of 2^23 is worth 1, that of an f16 of 2^10.
FUSED_RNN_DEVICE void widen_int8(uint32_t word, uint32_t (&wide)[4], float) {
  FUSED_RNN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = bytes_of(word, 0x4b000000u, 0x7540u + uint32_t(i));
    float v;
    memcpy(&v, &bits, 4);
    v -= 0x1p23f + 128;
    memcpy(&wide[i], &v, 4);
  }
}
FUSED_RNN_DEVICE void widen_int8(uint32_t word, uint32_t (&wide)[2], f16) {
  FUSED_RNN_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = bytes_of(word, 0x64646464u, i ? 0x4342u : 0x4140u);  // 1024 and the byte
    wide[i] = add_halves(bits, 0xe480e480u, f16{});                            // -1152
  }
}
// A bf16's mantissa has room for 7 bits: 128 and these, less 128, or 256 where the eighth is set.
FUSED_RNN_DEVICE void widen_int8(uint32_t word, uint32_t (&wide)[2], bf16) {
  const uint32_t low = word & 0x7f7f7f7fu, high = word & 0x80808080u;
  FUSED_RNN_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t pair = i ? 0x4342u : 0x4140u;
    wide[i] = add_halves(bytes_of(low, 0x43434343u, pair), bytes_of(high, 0xc3c3c3c3u, pair), bf16{});
  }
}

}  // namespace fused_rnn::cuda
