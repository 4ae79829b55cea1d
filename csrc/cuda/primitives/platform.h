// What a kernel's source needs of its compiler. Two meanings: nvcc's, or (with -DFUSED_RNN_EMULATE) the emulator's, which stands in
// for CUDA's own headers.
#pragma once
#include <cstdint>

#if defined(FUSED_RNN_EMULATE)

#include "../../emulator/emulator.h"

#define FUSED_RNN_DEVICE inline
#define FUSED_RNN_KERNEL(...) inline void
#define FUSED_RNN_INSTANCE void
#define FUSED_RNN_GRID_CONSTANT
#define FUSED_RNN_UNROLL
#define threadIdx (::fused_rnn::emulator::thread_index())
#define blockIdx (::fused_rnn::emulator::block_index())
#define blockDim (::fused_rnn::emulator::block_size())
#define gridDim (::fused_rnn::emulator::grid_size())

#elif defined(__CUDACC__)

#define FUSED_RNN_DEVICE __device__ __forceinline__
#define FUSED_RNN_KERNEL(...) __global__ void __launch_bounds__((__VA_ARGS__), 1)
#define FUSED_RNN_INSTANCE __global__ void
#define FUSED_RNN_GRID_CONSTANT __grid_constant__
#define FUSED_RNN_UNROLL _Pragma("unroll")

#endif

namespace fused_rnn::cuda {

// Meaningful in device code alone.
#if defined(FUSED_RNN_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kHasCluster = true;
#else
constexpr bool kHasCluster = false;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kIsBlackwell = true;
#else
constexpr bool kIsBlackwell = false;
#endif
// CTAs of the largest cluster that there may be.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLargestHere = 8;
#else
constexpr int kLargestHere = kHasCluster ? 16 : 1;
#endif

// Bytes to leave between two arrays in shared memory: room for a redzone where there is a tool that watches it.
#if defined(FUSED_RNN_EMULATE)
constexpr int kSharedGap = 128;
#else
constexpr int kSharedGap = 0;
#endif

#if defined(FUSED_RNN_EMULATE) || defined(__CUDACC__)

// Ends the launch with an error.
FUSED_RNN_DEVICE void trap() {
#if defined(FUSED_RNN_EMULATE)
  __builtin_trap();
#else
  __trap();
#endif
}

// The CTA's dynamic shared memory, 128-byte aligned.
FUSED_RNN_DEVICE unsigned char* shared_memory() {
#if defined(FUSED_RNN_EMULATE)
  return emulator::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char fused_rnn_shared[];
  return fused_rnn_shared;
#endif
}

// One array in it. Unlike the whole, this tells the emulator where the array ends: what lies between arrays stays a trap.
template <class T>
FUSED_RNN_DEVICE T* shared_array(int byte_offset, int count) {
#if defined(FUSED_RNN_EMULATE)
  return reinterpret_cast<T*>(emulator::shared_array(size_t(byte_offset), size_t(count) * sizeof(T)));
#else
  (void)count;
  return reinterpret_cast<T*>(shared_memory() + byte_offset);
#endif
}

// The compiler makes anew what follows from the value, and keeps nothing of it from before.
FUSED_RNN_DEVICE void renew(int& value) {
#if defined(FUSED_RNN_EMULATE)
  (void)value;
#else
  asm volatile("" : "+r"(value));
#endif
}

FUSED_RNN_DEVICE int renewed(int value) {
  renew(value);
  return value;
}

// The value, of which ptxas does not know how it was made: it stays in a register, where else each step would make it anew.
FUSED_RNN_DEVICE int kept(int value) {
#if defined(FUSED_RNN_EMULATE)
  return value;
#else
  return __shfl_sync(__activemask(), value, int(threadIdx.x) % 32);
#endif
}

#if !defined(FUSED_RNN_EMULATE)
FUSED_RNN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

#endif

}  // namespace fused_rnn::cuda
