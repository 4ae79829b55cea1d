// Storage types (bf16, f16, float, double) and the type their sums are taken in.
#pragma once
#include <cstring>

#include "primitives/types.h"

#if defined(FUSED_RNN_EMULATE)
#define FUSED_RNN_UNROLL_BY(times)
#else
#define FUSED_RNN_PRAGMA(text) _Pragma(#text)
#define FUSED_RNN_UNROLL_BY(times) FUSED_RNN_PRAGMA(unroll times)
#endif

namespace fused_rnn::cuda {

template <class Storage> struct AccumulatorOf {
  using type = float;
};
template <> struct AccumulatorOf<double> {
  using type = double;
};
template <class Storage> using Accumulator = typename AccumulatorOf<Storage>::type;

template <int kBytes> struct UnsignedOfBytes;
template <> struct UnsignedOfBytes<2> {
  using type = uint16_t;
};
template <> struct UnsignedOfBytes<4> {
  using type = uint32_t;
};
template <> struct UnsignedOfBytes<8> {
  using type = uint64_t;
};
template <int kBytes> using UnsignedOf = typename UnsignedOfBytes<kBytes>::type;

template <class Storage> FUSED_RNN_DEVICE float widen(Storage v) { return to_float(v); }
FUSED_RNN_DEVICE double widen(double v) { return v; }

template <class Storage> FUSED_RNN_DEVICE Storage narrow(float v) { return from_float<Storage>(v); }
template <class Storage> FUSED_RNN_DEVICE Storage narrow(double v) { return v; }

FUSED_RNN_DEVICE float as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
FUSED_RNN_DEVICE uint32_t as_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

// Has come from memory: what is only on its way when a loop begins would be waited for in each of its steps, behind loads of that step.
template <class Storage>
FUSED_RNN_DEVICE Storage arrived(Storage value) {
  UnsignedOf<sizeof(Storage)> bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = decltype(bits)(kept(int(bits)));
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

}  // namespace fused_rnn::cuda
