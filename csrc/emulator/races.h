// The race detector: which accesses are ordered by a barrier, an mbarrier, a flag or a wait, whatever the schedule was.
//
// Vector clocks, one component for each thread of the grid and one for its asynchronous copies; a shadow of every two
// bytes that the kernel touches outside its stacks, in shared and in global memory. g++ -fsanitize=thread calls us at
// every access, instead of libtsan, which is not linked. Without FUSED_RNN_EMULATE_RACES every function here is empty.
#pragma once
#include "shared.h"
#if defined(FUSED_RNN_EMULATE_RACES)
#include <unordered_map>
#endif

namespace fused_rnn::emulator::races {

#if defined(FUSED_RNN_EMULATE_RACES)

struct Epoch {
  uint32_t agent = 0, time = 0;
};

struct Shadow {
  Epoch write;
  std::vector<Epoch> reads;  // since that write
};

constexpr uintptr_t kGranule = 2, kPage = 1024;

struct Detector {
  uint32_t threads = 0;
  std::unordered_map<uintptr_t, std::vector<Shadow>> pages;
  std::unordered_map<uintptr_t, Clock> objects;  // mbarriers (their address plus the phase's parity) and flags
};

__attribute__((visibility("hidden"))) inline Detector detector;

inline void start_launch(uint32_t threads) {
  detector.threads = threads;
  detector.pages.clear();
  detector.objects.clear();
}

// Shared memory has new owners: what earlier CTAs did there is no concern of theirs.
inline void start_wave() {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.arena), end = begin + machine.arena_bytes;
  for (uintptr_t page = begin / kPage; page <= end / kPage; ++page) detector.pages.erase(page);
  for (auto it = detector.objects.begin(); it != detector.objects.end();)
    it = it->first >= begin && it->first < end ? detector.objects.erase(it) : std::next(it);
}

inline void start_thread(Thread& thread) {
  thread.clock.assign(2 * detector.threads, 0);
  thread.clock[thread.id] = 1;
}

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

inline void publish(Clock& to) {
  Inside guard;
  join(to, machine.current->clock);
  ++machine.current->clock[machine.current->id];
}

inline void observe(Thread& thread, const Clock& from) {
  Inside guard;
  join(thread.clock, from);
}
inline void observe(const Clock& from) {
  observe(*machine.current, from);
}

inline Clock& object(const void* p, unsigned parity = 0) {
  Inside guard;
  return detector.objects[reinterpret_cast<uintptr_t>(p) + parity];
}

// The clock of a copy that the current thread issues: all that the thread knows, plus a moment of the copy's own.
inline void start_copy(Clock& clock) {
  Inside guard;
  Thread& thread = *machine.current;
  clock = thread.clock;
  clock[detector.threads + thread.id] = ++thread.async_clock;
  ++thread.clock[thread.id];
}

inline std::string agent_name(uint32_t agent) {
  const uint32_t thread = agent % detector.threads, per_cta = machine.block.x * machine.block.y * machine.block.z;
  return std::string(agent < detector.threads ? "" : "an asynchronous copy of ") + "thread " +
         std::to_string(thread % per_cta) + " of CTA " + std::to_string(thread / per_cta);
}

[[noreturn]] inline void report(const char* kind, uintptr_t address, uint32_t agent, uint32_t other) {
  const void* p = reinterpret_cast<const void*>(address);
  std::string place = "global memory";
  if (in_arena(p)) {
    const Cta* cta = owner_of(p);
    place = "shared memory of CTA " + std::to_string(cta->linear) + " at byte " +
            std::to_string(static_cast<const unsigned char*>(p) - cta->shared);
  }
  fail(std::string("RACE (") + kind + ") on " + place + ": " + agent_name(agent) + " against " + agent_name(other));
}

inline Shadow& shadow_of(uintptr_t address) {
  std::vector<Shadow>& page = detector.pages[address / kPage];
  if (page.empty()) page.resize(kPage / kGranule);
  return page[address % kPage / kGranule];
}

inline bool ordered(Epoch earlier, const Clock& clock, uint32_t agent) {
  return earlier.agent == agent || earlier.time <= (earlier.agent < clock.size() ? clock[earlier.agent] : 0);
}

inline void touch_granule(uintptr_t address, bool write, const Clock& clock, uint32_t agent) {
  Shadow& shadow = shadow_of(address);
  if (!ordered(shadow.write, clock, agent))
    report(write ? "write after write" : "read after write", address, agent, shadow.write.agent);
  if (write) {
    for (const Epoch& read : shadow.reads)
      if (!ordered(read, clock, agent)) report("write after read", address, agent, read.agent);
    shadow.reads.clear();
    shadow.write = {agent, clock[agent]};
    return;
  }
  for (Epoch& read : shadow.reads)
    if (read.agent == agent) {
      read.time = clock[agent];
      return;
    }
  shadow.reads.push_back({agent, clock[agent]});
}

inline void touch(const void* p, size_t bytes, bool write, const Clock& clock, uint32_t agent) {
  Inside guard;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = begin / kGranule; a <= (begin + bytes - 1) / kGranule; ++a)
    touch_granule(a * kGranule, write, clock, agent);
}

inline void read(const void* p, size_t bytes) {
  touch(p, bytes, false, machine.current->clock, machine.current->id);
}
inline void write(const void* p, size_t bytes) {
  touch(p, bytes, true, machine.current->clock, machine.current->id);
}
inline void copy_reads(const void* p, const Clock& clock, uint32_t sender) {
  touch(p, kCopyBytes, false, clock, detector.threads + sender);
}
inline void copy_writes(const void* p, const Clock& clock, uint32_t sender) {
  touch(p, kCopyBytes, true, clock, detector.threads + sender);
}

// At an access of compiled code.
FUSED_RNN_EMULATOR_RAW inline void on_access(const void* p, size_t bytes, bool is_write) {
  if (machine.inside || !machine.current || stacks.contains(p)) return;
  Inside guard;
  if (is_write)
    write(p, bytes);
  else
    read(p, bytes);
}

#else

inline void start_launch(uint32_t) {}
inline void start_wave() {}
inline void start_thread(Thread&) {}
inline void publish(Clock&) {}
inline void observe(Thread&, const Clock&) {}
inline void observe(const Clock&) {}
inline Clock& object(const void*, unsigned = 0) {
  static Clock none;
  return none;
}
inline void start_copy(Clock&) {}
inline void read(const void*, size_t) {}
inline void write(const void*, size_t) {}
inline void copy_reads(const void*, const Clock&, uint32_t) {}
inline void copy_writes(const void*, const Clock&, uint32_t) {}

#endif

}  // namespace fused_rnn::emulator::races

#if defined(FUSED_RNN_EMULATE_RACES)
// The names that g++ -fsanitize=thread calls. Weak: every translation unit brings them.
extern "C" {
#define FUSED_RNN_WEAK FUSED_RNN_EMULATOR_RAW __attribute__((weak)) void
#define FUSED_RNN_ACCESS(bytes)                             \
  FUSED_RNN_WEAK __tsan_read##bytes(void* p) {              \
    fused_rnn::emulator::races::on_access(p, bytes, false); \
  }                                                         \
  FUSED_RNN_WEAK __tsan_write##bytes(void* p) {             \
    fused_rnn::emulator::races::on_access(p, bytes, true);  \
  }                                                         \
  FUSED_RNN_WEAK __tsan_unaligned_read##bytes(void* p) {    \
    fused_rnn::emulator::races::on_access(p, bytes, false); \
  }                                                         \
  FUSED_RNN_WEAK __tsan_unaligned_write##bytes(void* p) {   \
    fused_rnn::emulator::races::on_access(p, bytes, true);  \
  }
FUSED_RNN_ACCESS(1)
FUSED_RNN_ACCESS(2)
FUSED_RNN_ACCESS(4)
FUSED_RNN_ACCESS(8)
FUSED_RNN_ACCESS(16)
FUSED_RNN_WEAK __tsan_read_range(void* p, unsigned long n) {
  fused_rnn::emulator::races::on_access(p, n, false);
}
FUSED_RNN_WEAK __tsan_write_range(void* p, unsigned long n) {
  fused_rnn::emulator::races::on_access(p, n, true);
}
FUSED_RNN_WEAK __tsan_init() {}
FUSED_RNN_WEAK __tsan_func_entry(void*) {}
FUSED_RNN_WEAK __tsan_func_exit() {}
FUSED_RNN_WEAK __tsan_vptr_update(void*, void*) {}
FUSED_RNN_WEAK __tsan_vptr_read(void*) {}
#undef FUSED_RNN_ACCESS
#undef FUSED_RNN_WEAK
}
#endif
