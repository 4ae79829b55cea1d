// Barriers within a CTA and a cluster, the warp's collectives, flags in global memory.
#pragma once
#include <cstring>

#include "races.h"

namespace fused_rnn::emulator {

// ---- barriers of a CTA and a cluster: `expected` counts the threads that have not ended

inline void arrive(Barrier& barrier) {
  Clock& clock = barrier.clock[barrier.phase % 2];
  if (barrier.arrived == 0) clock = Clock{};
  races::publish(clock);
  ++barrier.arrived;
}

inline void release_if_complete(Barrier& barrier, unsigned expected) {
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier.arrived = 0;
  ++barrier.phase;
  make_ready(barrier.waiting);
}

inline void wait_for_phase(Barrier& barrier, unsigned phase, const char* name) {
  while (barrier.phase == phase) {
    barrier.waiting.push_back(machine.current);
    block(name, phase);
  }
  races::observe(barrier.clock[phase % 2]);
}

inline void sync_threads() {
  Inside guard;
  Cta& cta = *machine.current->cta;
  const unsigned phase = cta.barrier.phase;
  arrive(cta.barrier);
  release_if_complete(cta.barrier, cta.live);
  wait_for_phase(cta.barrier, phase, "sync_threads, phase");
  maybe_yield(8);
}

inline unsigned cluster_rank() {
  Inside guard;
  return machine.current->cta->rank;
}

inline void cluster_arrive() {
  Inside guard;
  Thread& thread = *machine.current;
  if (thread.cluster_arrived) fail("cluster_arrive: twice without a cluster_wait");
  Cluster& cluster = *thread.cta->cluster;
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.barrier.phase;
  arrive(cluster.barrier);
  release_if_complete(cluster.barrier, cluster.live);
  maybe_yield(4);
}

inline void cluster_wait() {
  Inside guard;
  Thread& thread = *machine.current;
  if (!thread.cluster_arrived) fail("cluster_wait: without a cluster_arrive");
  wait_for_phase(thread.cta->cluster->barrier, thread.cluster_phase, "cluster_wait, phase");
  thread.cluster_arrived = false;
}

// ---- collectives of a warp: the lane that arrives last does the work of all

inline void check_converged(const Warp& warp, const char* operation) {
  if (std::strcmp(warp.operation, operation) != 0)
    fail(std::string("divergent warp: a lane is at ") + operation + " while others wait at " + warp.operation);
}

template <class Compute>
FUSED_RNN_EMULATOR_RAW inline void collective(const char* operation, void* argument, Compute compute) {
  Inside guard;
  Thread& thread = *machine.current;
  Warp& warp = *thread.warp;
  if (!warp.arrived) warp.operation = operation;
  if (warp.operation != operation) check_converged(warp, operation);
  warp.arguments[thread.lane] = argument;
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived != warp.mask) return block(operation);
  warp.arrived = 0;
  compute(warp);
  for (int lane = 0; lane < kWarp; ++lane)
    if (lane != thread.lane && warp.lanes[lane]) make_ready(warp.lanes[lane]);
}

inline void fail_partial_warp(const char* operation) { fail(std::string(operation) + ": a warp of fewer than 32 threads"); }
FUSED_RNN_EMULATOR_RAW inline void check_whole_warp(const char* operation) {
  if (machine.current->warp->mask != ~0u) fail_partial_warp(operation);
}

inline void sync_warp() {
  Inside guard;
  Warp& warp = *machine.current->warp;
  if (!warp.arrived) warp.clock = Clock{};
  races::publish(warp.clock);
  collective("sync_warp", nullptr, [](Warp& all) {
    for (Thread* lane : all.lanes)
      if (lane) races::observe(*lane, all.clock);
  });
}

// A lane's number and whose it wants; what it gets.
struct Shuffle {
  float value;
  int from;
  float found;
};

inline float shuffle_xor(float value, int mask) {
  check_whole_warp("shuffle_xor");
  Shuffle own{value, machine.current->lane ^ mask, 0};
  collective("shuffle_xor", &own, [](Warp& warp) FUSED_RNN_EMULATOR_RAW {
    for (void* argument : warp.arguments) {
      Shuffle& one = *static_cast<Shuffle*>(argument);
      one.found = static_cast<const Shuffle*>(warp.arguments[one.from])->value;
    }
  });
  return own.found;
}

// ---- flags

inline uint32_t load_acquire(const uint32_t* flag) {
  Inside guard;
  check_aligned("load_acquire", flag, sizeof(uint32_t));
  check_accessible("load_acquire", flag, sizeof(uint32_t));
  maybe_yield(4);
  races::observe(races::object(flag));
  machine.current->flag_events_seen = machine.flag_events;
  machine.current->detail = *flag;
  return *flag;
}

inline void add_release(uint32_t* flag, uint32_t value) {
  Inside guard;
  check_aligned("add_release", flag, sizeof(uint32_t));
  check_accessible("add_release", flag, sizeof(uint32_t));
  maybe_yield(4);
  races::publish(races::object(flag));
  *flag += value;
  ++machine.flag_events;
  make_ready(machine.flag_waiters);
}

// Sleeps until some flag changes: a spin that nobody will end must not keep the machine busy, or no deadlock would be seen.
inline void pause() {
  Inside guard;
  Thread& thread = *machine.current;
  if (thread.flag_events_seen != machine.flag_events) return yield();
  machine.flag_waiters.push_back(&thread);
  block("a flag in global memory, last read as", thread.detail);
}

}  // namespace fused_rnn::emulator
