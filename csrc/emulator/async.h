// Asynchronous copies and stores, which arrive as late as the program allows or in any order; mbarriers.
#pragma once
#include "sync.h"

namespace fused_rnn::emulator {

// ---- cp.async: the destination is NaN from the issue to the wait that completes the copy

inline void complete(const Thread& thread, Copy& copy) {
  check_shared("copy_async16", copy.destination, kCopyBytes, kCopyBytes);
  if (!copy.read_early) raw_copy(copy.data, copy.source);
  if (copy.source) races::copy_reads(copy.source, copy.clock, thread.id);
  races::copy_writes(copy.destination, copy.clock, thread.id);
  raw_copy(copy.destination, copy.data);
  races::observe(copy.clock);
}

inline void copy_async16(void* shared, const void* global, bool valid) {
  Inside guard;
  check_shared("copy_async16", shared, kCopyBytes, kCopyBytes);
  Thread& thread = *machine.current;
  Copy copy{static_cast<unsigned char*>(shared), nullptr, thread.open_group, true, {}, {}};
  races::start_copy(copy.clock);
  if (valid) {
    check_aligned("copy_async16", global, kCopyBytes);
    check_accessible("copy_async16", global, kCopyBytes);
    copy.source = static_cast<const unsigned char*>(global);
    copy.read_early = random_below(2);
    races::copy_reads(global, copy.clock, thread.id);
  }
  raw_copy(copy.data, copy.source);
  races::copy_writes(shared, copy.clock, thread.id);
  raw_fill(copy.destination);
  thread.copies.push_back(copy);
}

inline void copy_commit() {
  Inside guard;
  ++machine.current->open_group;
}

// Completes all groups but the `most` committed last.
inline void copy_wait(unsigned most) {
  Inside guard;
  Thread& thread = *machine.current;
  size_t done = 0;
  while (done < thread.copies.size() && thread.copies[done].group + most < thread.open_group) complete(thread, thread.copies[done++]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(done));
}

// ---- mbarrier: the eight bytes of shared memory that the kernel gives it

struct Mbarrier {
  int32_t bytes;  // expected less arrived; negative while data are ahead of the expectation
  uint16_t pending;
  uint8_t arrivals;
  uint8_t mark;  // kInitialized, and the parity of the phase under way in the lowest bit
};
constexpr uint8_t kInitialized = 0x5A;

FUSED_RNN_EMULATOR_RAW inline Mbarrier* checked(const char* instruction, void* barrier) {
  check_shared(instruction, barrier, sizeof(Mbarrier), sizeof(Mbarrier));
  Mbarrier* b = static_cast<Mbarrier*>(barrier);
  if ((b->mark & ~1) != kInitialized) fail(std::string(instruction) + ": the mbarrier is not initialised");
  races::read(barrier, sizeof(Mbarrier));
  return b;
}

inline std::vector<Thread*>& waiters_of(const Mbarrier* b) {
  Cta* cta = owner_of(b);
  for (Waiters& w : cta->waiters)
    if (w.object == b) return w.threads;
  cta->waiters.push_back({b, {}});
  return cta->waiters.back().threads;
}

FUSED_RNN_EMULATOR_RAW inline void complete_phase_if_due(Mbarrier* b) {
  if (b->pending || b->bytes) return;
  b->mark ^= 1;
  b->pending = b->arrivals;
  races::object(b, b->mark & 1) = Clock{};
  make_ready(waiters_of(b));
}

FUSED_RNN_EMULATOR_RAW inline void barrier_init(void* barrier, int arrivals) {
  Inside guard;
  check_shared("barrier_init", barrier, sizeof(Mbarrier), sizeof(Mbarrier));
  if (arrivals < 1 || arrivals > 255) fail("barrier_init: arrivals must be 1 to 255");
  races::write(barrier, sizeof(Mbarrier));
  *static_cast<Mbarrier*>(barrier) = {0, uint16_t(arrivals), uint8_t(arrivals), kInitialized};
}

FUSED_RNN_EMULATOR_RAW inline void barrier_expect(void* barrier, int bytes) {
  Inside guard;
  Mbarrier* b = checked("barrier_expect", barrier);
  if (owner_of(b) != machine.current->cta) fail("barrier_expect: the mbarrier of another CTA");
  if (!b->pending) fail("barrier_expect: more arrivals than the mbarrier's count");
  races::publish(races::object(b, b->mark & 1));
  b->bytes += bytes;
  --b->pending;
  complete_phase_if_due(b);
  maybe_yield(8);
}

FUSED_RNN_EMULATOR_RAW inline void barrier_wait(void* barrier, unsigned parity) {
  Inside guard;
  Mbarrier* b = checked("barrier_wait", barrier);
  if (parity > 1) fail("barrier_wait: the parity is 0 or 1");
  maybe_yield(4);
  while ((b->mark & 1) == int(parity)) {
    waiters_of(b).push_back(machine.current);
    block("barrier_wait, parity", parity);
  }
  races::observe(races::object(b, parity));
}

// ---- st.async, to any CTA of the cluster

inline char* remote(const void* own_shared, unsigned rank) {
  Inside guard;
  const Cta* own = owner_of(own_shared);
  if (own != machine.current->cta) fail("remote: the address is not in the CTA's own shared memory");
  if (rank >= machine.cluster_size) fail("remote: rank " + std::to_string(rank) + " outside the cluster");
  const Cta* peer = own->cluster->ctas[rank];
  return reinterpret_cast<char*>(peer->shared + (static_cast<const unsigned char*>(own_shared) - own->shared));
}

inline void store_async(char* destination, char* barrier, const void* value, int bytes) {
  Inside guard;
  // An H200 calls it an illegal instruction, even where a CTA stores to itself.
  if (!machine.in_clusters) fail("store_async: the launch is not one of clusters");
  check_shared("store_async", destination, size_t(bytes), size_t(bytes));
  checked("store_async", barrier);
  Cta* target = owner_of(destination);
  if (target != owner_of(barrier)) fail("store_async: data and mbarrier in different CTAs");
  if (target->cluster != machine.current->cta->cluster) fail("store_async: a CTA of another cluster");
  RemoteStore store{};
  __builtin_memcpy(store.data, value, size_t(bytes));
  store.bytes = bytes;
  store.destination = reinterpret_cast<unsigned char*>(destination);
  store.barrier = reinterpret_cast<unsigned char*>(barrier);
  store.target = target;
  store.sender = machine.current->id;
  races::start_copy(store.clock);
  races::copy_writes(destination, store.clock, store.sender, bytes);
  raw_fill(store.destination, bytes);
  machine.remote_stores.push_back(store);
  ++machine.stores_under_way;
  maybe_yield(16);
}

FUSED_RNN_EMULATOR_RAW inline void deliver_one() {
  std::vector<RemoteStore>& stores = machine.remote_stores;
  RemoteStore& chosen = stores[random_below(uint32_t(stores.size()))];
  RemoteStore store = std::move(chosen);
  if (&chosen != &stores.back()) chosen = std::move(stores.back());
  stores.pop_back();
  --machine.stores_under_way;
  Mbarrier* b = reinterpret_cast<Mbarrier*>(store.barrier);
  races::copy_writes(store.destination, store.clock, store.sender, store.bytes);
  raw_copy(store.destination, store.data, store.bytes);
#if defined(FUSED_RNN_EMULATE_RACES)
  races::join(races::object(b, b->mark & 1), store.clock);
#endif
  b->bytes -= store.bytes;
  complete_phase_if_due(b);
}

}  // namespace fused_rnn::emulator
