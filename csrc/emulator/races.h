// The race detector: which accesses are ordered by a barrier, an mbarrier, a flag or a wait, whatever the schedule was.
//
// Vector clocks, one component for each resident thread and one for its asynchronous copies; a shadow of every two
// bytes that the kernel touches outside its stacks, in shared and in global memory. g++ -fsanitize=thread calls us at
// every access, instead of libtsan, which is not linked. Without FUSED_RNN_EMULATE_RACES every function here is empty.
#pragma once
#include "shared.h"
#if defined(FUSED_RNN_EMULATE_RACES)
#include <algorithm>
#include <unordered_map>
#endif

namespace fused_rnn::emulator::races {

#if defined(FUSED_RNN_EMULATE_RACES)

// A moment of one agent. Between the CTAs of two waves nothing is ever ordered: on a GPU they may be resident together.
struct Epoch {
  uint32_t agent = 0, time = 0, wave = 0;
};

struct Shadow {
  Epoch write;
  std::vector<Epoch> reads;  // since that write, one for each agent of this wave, in the agents' order
  Epoch earlier_read;        // of an earlier wave: one stands for all
};

constexpr uintptr_t kGranule = 2, kPage = 1024;

struct Detector {
  uint32_t threads = 0, wave = 0;
  std::unordered_map<uintptr_t, std::vector<Shadow>> pages;
  std::unordered_map<uintptr_t, Clock> objects;  // mbarriers (their address plus the phase's parity) and flags
};

__attribute__((visibility("hidden"))) inline Detector detector;

inline void start_launch() {
  detector.pages.clear();
  detector.objects.clear();
}

// Shared memory has new owners: what earlier CTAs did there is no concern of theirs.
inline void start_wave(uint32_t threads) {
  detector.threads = threads;
  ++detector.wave;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.arena), end = begin + machine.arena_bytes;
  for (uintptr_t page = begin / kPage; page <= end / kPage; ++page) detector.pages.erase(page);
  for (auto it = detector.objects.begin(); it != detector.objects.end();)
    it = it->first >= begin && it->first < end ? detector.objects.erase(it) : std::next(it);
}

inline void start_thread(Thread& thread) {
  thread.clock.assign(2 * detector.threads, 0);
  thread.clock[thread.id] = 1;
}

// Most of the detector's time: hence by bare pointers, and optimised in every build.
__attribute__((optimize("O3"))) FUSED_RNN_EMULATOR_RAW inline void join_times(uint32_t* into, const uint32_t* from, size_t n) {
  for (size_t i = 0; i < n; ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  join_times(into.data(), from.data(), from.size());
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
inline void observe(const Clock& from) { observe(*machine.current, from); }

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

inline std::string agent_name(Epoch epoch) {
  if (epoch.wave != detector.wave) return "a CTA that was not resident at the same time";
  const uint32_t thread = epoch.agent % detector.threads;
  const size_t per_cta = machine.ctas[0]->threads.size();
  return std::string(epoch.agent < detector.threads ? "" : "an asynchronous copy of ") +
         name_of(machine.ctas[thread / per_cta]->threads[thread % per_cta]);
}

inline void report(const char* kind, uintptr_t address, Epoch now, Epoch earlier) {
  const void* p = reinterpret_cast<const void*>(address);
  std::string place = "global memory";
  if (in_arena(p)) {
    const Cta* cta = owner_of(p);
    place = "shared memory of CTA " + std::to_string(cta->linear) + " at byte " +
            std::to_string(static_cast<const unsigned char*>(p) - cta->shared);
  }
  fail(std::string("RACE (") + kind + ") on " + place + ": " + agent_name(now) + " against " + agent_name(earlier));
}

inline Shadow& shadow_of(uintptr_t address) {
  std::vector<Shadow>& page = detector.pages[address / kPage];
  if (page.empty()) page.resize(kPage / kGranule);
  return page[address % kPage / kGranule];
}

inline bool ordered(Epoch earlier, Epoch now, const Clock& clock) {
  if (earlier.time == 0) return true;  // nothing yet
  return earlier.wave == now.wave && (earlier.agent == now.agent || earlier.time <= clock[earlier.agent]);
}

inline void touch_granule(uintptr_t address, bool write, Epoch now, const Clock& clock) {
  Shadow& shadow = shadow_of(address);
  if (!ordered(shadow.write, now, clock)) report(write ? "write after write" : "read after write", address, now, shadow.write);
  if (write) {
    if (!ordered(shadow.earlier_read, now, clock)) report("write after read", address, now, shadow.earlier_read);
    for (const Epoch& read : shadow.reads)
      if (!ordered(read, now, clock)) report("write after read", address, now, read);
    shadow.reads.clear();
    shadow.write = now;
    return;
  }
  if (!shadow.reads.empty() && shadow.reads[0].wave != now.wave) {
    shadow.earlier_read = shadow.reads[0];
    shadow.reads.clear();
  }
  const auto place = std::lower_bound(shadow.reads.begin(), shadow.reads.end(), now.agent,
                                      [](const Epoch& read, uint32_t agent) { return read.agent < agent; });
  if (place != shadow.reads.end() && place->agent == now.agent) place->time = now.time;
  else shadow.reads.insert(place, now);
}

inline void touch(const void* p, size_t bytes, bool write, const Clock& clock, uint32_t agent) {
  Inside guard;
  const Epoch now{agent, clock[agent], detector.wave};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t a = begin / kGranule; a <= (begin + bytes - 1) / kGranule; ++a) touch_granule(a * kGranule, write, now, clock);
}

inline void read(const void* p, size_t bytes) { touch(p, bytes, false, machine.current->clock, machine.current->id); }
inline void write(const void* p, size_t bytes) { touch(p, bytes, true, machine.current->clock, machine.current->id); }
inline void copy_reads(const void* p, const Clock& clock, uint32_t sender) {
  touch(p, kCopyBytes, false, clock, detector.threads + sender);
}
inline void copy_writes(const void* p, const Clock& clock, uint32_t sender, int bytes = kCopyBytes) {
  touch(p, size_t(bytes), true, clock, detector.threads + sender);
}

// The kernel's arguments, which every thread reads and none can write.
FUSED_RNN_EMULATOR_RAW inline bool is_argument(const void* p) {
  const char* begin = static_cast<const char*>(machine.body_argument);
  return p >= begin && p < begin + machine.body_bytes;
}

// At an access of compiled code.
FUSED_RNN_EMULATOR_RAW inline void on_access(const void* p, size_t bytes, bool is_write) {
  if (machine.inside || !machine.current || stacks.contains(p) || is_argument(p)) return;
  Inside guard;
  if (is_write) write(p, bytes);
  else read(p, bytes);
}

#else

inline void start_launch() {}
inline void start_wave(uint32_t) {}
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
inline void copy_writes(const void*, const Clock&, uint32_t, int = kCopyBytes) {}

#endif

}  // namespace fused_rnn::emulator::races

#if defined(FUSED_RNN_EMULATE_RACES)
// The names that g++ -fsanitize=thread calls. Weak: every translation unit brings them.
extern "C" {
#define FUSED_RNN_WEAK FUSED_RNN_EMULATOR_RAW __attribute__((weak)) void
#define FUSED_RNN_ACCESS(bytes) \
  FUSED_RNN_WEAK __tsan_read##bytes(void* p) { fused_rnn::emulator::races::on_access(p, bytes, false); } \
  FUSED_RNN_WEAK __tsan_write##bytes(void* p) { fused_rnn::emulator::races::on_access(p, bytes, true); } \
  FUSED_RNN_WEAK __tsan_unaligned_read##bytes(void* p) { fused_rnn::emulator::races::on_access(p, bytes, false); } \
  FUSED_RNN_WEAK __tsan_unaligned_write##bytes(void* p) { fused_rnn::emulator::races::on_access(p, bytes, true); }
FUSED_RNN_ACCESS(1)
FUSED_RNN_ACCESS(2)
FUSED_RNN_ACCESS(4)
FUSED_RNN_ACCESS(8)
FUSED_RNN_ACCESS(16)
FUSED_RNN_WEAK __tsan_read_range(void* p, unsigned long n) { fused_rnn::emulator::races::on_access(p, n, false); }
FUSED_RNN_WEAK __tsan_write_range(void* p, unsigned long n) { fused_rnn::emulator::races::on_access(p, n, true); }
FUSED_RNN_WEAK __tsan_init() {}
FUSED_RNN_WEAK __tsan_func_entry(void*) {}
FUSED_RNN_WEAK __tsan_func_exit() {}
FUSED_RNN_WEAK __tsan_vptr_update(void*, void*) {}
FUSED_RNN_WEAK __tsan_vptr_read(void*) {}
// The guard of a static local variable.
FUSED_RNN_EMULATOR_RAW __attribute__((weak)) char __tsan_atomic8_load(const volatile char* p, int) { return *p; }
#undef FUSED_RNN_ACCESS
#undef FUSED_RNN_WEAK
}
#endif
