// Barriers of a warp, a CTA and a cluster; a warp's shuffles; mbarriers; stores to the shared memory of another CTA of the cluster.
// A device without clusters traps where it meets one of these.
#pragma once
#include "spin_timeout.h"

namespace fused_rnn::cuda {

FUSED_RNN_DEVICE void sync_threads() {
#if defined(FUSED_RNN_EMULATE)
  emulator::sync_threads();
#else
  __syncthreads();
#endif
}

FUSED_RNN_DEVICE void sync_warp() {
#if defined(FUSED_RNN_EMULATE)
  emulator::sync_warp();
#else
  __syncwarp();
#endif
}

// The number of the lane whose place differs in the mask's bits.
FUSED_RNN_DEVICE float shuffle_xor(float value, int mask) {
#if defined(FUSED_RNN_EMULATE)
  return emulator::shuffle_xor(value, mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

#if defined(FUSED_RNN_EMULATE)

using Remote = char*;

FUSED_RNN_DEVICE unsigned cluster_rank() { return emulator::cluster_rank(); }
FUSED_RNN_DEVICE void cluster_arrive() { emulator::cluster_arrive(); }
FUSED_RNN_DEVICE void cluster_wait() { emulator::cluster_wait(); }
FUSED_RNN_DEVICE Remote remote(const void* own_shared, unsigned rank) { return emulator::remote(own_shared, rank); }
FUSED_RNN_DEVICE void barrier_init(uint64_t* b, int arrivals) { emulator::barrier_init(b, arrivals); }
FUSED_RNN_DEVICE void barrier_fence() {}
FUSED_RNN_DEVICE void barrier_expect(uint64_t* b, int bytes) { emulator::barrier_expect(b, bytes); }
FUSED_RNN_DEVICE void barrier_wait(uint64_t* b, unsigned parity) { emulator::barrier_wait(b, parity); }
FUSED_RNN_DEVICE void store_async(Remote destination, Remote barrier, uint2 value) {
  emulator::store_async(destination, barrier, &value, int(sizeof(value)));
}
FUSED_RNN_DEVICE void store_async(Remote destination, Remote barrier, uint4 value) {
  emulator::store_async(destination, barrier, &value, int(sizeof(value)));
}

#else

using Remote = uint32_t;  // an address of the cluster's shared memory; an offset in bytes may be added

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

FUSED_RNN_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Not the .aligned forms: threads may come here from a branch, and it is once a launch.
FUSED_RNN_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FUSED_RNN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where the CTA of that rank has what this CTA has at `own_shared`.
FUSED_RNN_DEVICE Remote remote(const void* own_shared, unsigned rank) {
  Remote address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own_shared)), "r"(rank));
  return address;
}

FUSED_RNN_DEVICE void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

// After barrier_init, before the barrier of the cluster that tells the peers.
FUSED_RNN_DEVICE void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and has the phase wait for so many bytes more.
FUSED_RNN_DEVICE void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}

// Acquires for the CTA, its default: exchange.h says why that is enough. At cluster scope it would drop the L1 cache, each step (CCTL.IVALL
// in machine code); a fence of shared memory alone would wait for all loads on their way.
FUSED_RNN_DEVICE bool barrier_complete(uint64_t* b, unsigned parity) {
  uint32_t complete;
  asm volatile("{\n.reg .pred complete;\nmbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\nselp.u32 %0, 1, 0, complete;\n}"
               : "=r"(complete)
               : "r"(shared_address(b)), "r"(parity)
               : "memory");
  return complete;
}

// Until the phase of that parity is complete; what was stored to its account is visible then.
FUSED_RNN_DEVICE void barrier_wait(uint64_t* b, unsigned parity) {
  for (const SpinTimeout timeout; !barrier_complete(b, parity);) timeout.spend("2 s for what the peers send");
}

// 16 or 8 bytes to another CTA of the cluster; `barrier`, in the same CTA as the destination, is told when they are there.
FUSED_RNN_DEVICE void store_async(Remote destination, Remote barrier, uint2 value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(destination), "r"(value.x),
               "r"(value.y), "r"(barrier)
               : "memory");
}
FUSED_RNN_DEVICE void store_async(Remote destination, Remote barrier, uint4 value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(destination),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
               : "memory");
}

#else

FUSED_RNN_DEVICE unsigned cluster_rank() { return 0; }
FUSED_RNN_DEVICE void cluster_arrive() { trap(); }
FUSED_RNN_DEVICE void cluster_wait() { trap(); }
FUSED_RNN_DEVICE Remote remote(const void*, unsigned) {
  trap();
  return 0;
}
FUSED_RNN_DEVICE void barrier_init(uint64_t*, int) { trap(); }
FUSED_RNN_DEVICE void barrier_fence() { trap(); }
FUSED_RNN_DEVICE void barrier_expect(uint64_t*, int) { trap(); }
FUSED_RNN_DEVICE void barrier_wait(uint64_t*, unsigned) { trap(); }
FUSED_RNN_DEVICE void store_async(Remote, Remote, uint2) { trap(); }
FUSED_RNN_DEVICE void store_async(Remote, Remote, uint4) { trap(); }

#endif
#endif

}  // namespace fused_rnn::cuda
