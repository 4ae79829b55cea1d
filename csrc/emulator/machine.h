// What an emulated GPU consists of: threads in warps, warps in CTAs, CTAs in clusters; and the one machine of this process.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "context.h"
#include "vectors.h"

namespace fused_rnn::emulator {

struct Cta;
struct Warp;
struct Thread;

// The race detector's vector clock; without the detector it has no content and costs nothing.
#if defined(FUSED_RNN_EMULATE_RACES)
using Clock = std::vector<uint32_t>;
#else
struct Clock {};
#endif

constexpr int kWarp = 32;
constexpr int kCopyBytes = 16;

// One cp.async between its issue and the wait that completes it.
struct Copy {
  unsigned char* destination;
  const unsigned char* source;  // null: zeros
  unsigned group;
  bool read_early;  // the hardware may read the source at any time: now, or as late as the wait
  unsigned char data[kCopyBytes];
  Clock clock;
};

struct Thread {
  Context context;
  Warp* warp = nullptr;
  Cta* cta = nullptr;
  dim3 index;
  int lane = 0;
  uint32_t id = 0;  // among the resident threads
  bool finished = false, cluster_arrived = false;
  unsigned cluster_phase = 0;
  const char* waits_for = "its first turn";
  long long detail = 0;
  uint64_t flag_events_seen = 0;
  std::vector<Copy> copies;  // in order of issue
  unsigned open_group = 0;   // the group that copies join until the next commit
  Clock clock;
  uint32_t async_clock = 0;
};

struct Warp {
  Thread* lanes[kWarp] = {};
  void* arguments[kWarp] = {};  // of the collective that lanes have arrived at
  uint32_t mask = 0;            // lanes that exist
  uint32_t ready = 0;           // lanes that can run
  uint32_t arrived = 0;         // lanes that wait in the collective `operation`
  const char* operation = "";
  uint32_t queue_position = 0;  // in Machine::ready_warps, while any lane is ready
  uint32_t priority = 0;
  int number = 0;
  Clock clock;
};

struct Barrier {
  unsigned arrived = 0, phase = 0;
  std::vector<Thread*> waiting;
  Clock clock[2];  // by the phase's parity
};

struct Cluster {
  Barrier barrier;
  unsigned live = 0;  // threads
  std::vector<Cta*> ctas;
};

// The threads that wait for a phase of one mbarrier.
struct Waiters {
  const void* object;
  std::vector<Thread*> threads;
};

struct Cta {
  dim3 index;
  unsigned linear = 0, rank = 0;
  Cluster* cluster = nullptr;
  unsigned char* shared = nullptr;
  unsigned live = 0;  // threads
  Barrier barrier;
  std::vector<Waiters> waiters;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

// One st.async on its way. Its barrier lies in the same CTA as its destination.
struct RemoteStore {
  unsigned char data[kCopyBytes];
  int bytes;  // of these, 8 or 16
  unsigned char* destination;
  unsigned char* barrier;
  Cta* target;
  uint32_t sender;
  Clock clock;
};

struct Options {
  uint64_t seed = 0;
  bool cooperative = false;  // all CTAs resident at once; else never all of them, unless there is one cluster alone
};

struct Machine {
  // the launch
  dim3 grid, block;
  unsigned cluster_size = 1;
  bool in_clusters = false;  // else each CTA is a cluster of its own, which st.async does not take for one
  size_t shared_bytes = 0, shared_stride = 0;
  void (*body)(void*) = nullptr;
  void* body_argument = nullptr;
  size_t body_bytes = 0;
  // the CTAs resident now
  std::vector<Cta*> ctas;
  uint64_t live = 0;  // threads
  unsigned char* arena = nullptr;
  size_t arena_bytes = 0;
  // the schedule
  Thread* current = nullptr;  // null: the host
  Context host;
  Warp** ready_warps = nullptr;  // room for all resident warps
  uint32_t ready_count = 0;
  std::vector<RemoteStore> remote_stores;
  size_t stores_under_way = 0;  // their number, where code that no sanitizer sees can read it
  std::vector<Thread*> flag_waiters;
  uint64_t flag_events = 0;
  uint64_t random_state = 1;
  unsigned candidates = 1;  // how many ready warps compete by priority for each turn: 1 is a fair lottery
  unsigned laziness = 4;    // one turn in so many delivers a remote store
  uint64_t switches = 0;
  std::string error;
  int inside = 0;  // > 0 within the emulator itself: the race detector looks away
};

// Hidden, or g++ would make it one object for all libraries that a process loads, however they were compiled.
__attribute__((visibility("hidden"))) inline Machine machine;

// While one lives, memory accesses are the emulator's own and not the kernel's.
struct Inside {
  FUSED_RNN_EMULATOR_RAW Inside() { ++machine.inside; }
  FUSED_RNN_EMULATOR_RAW ~Inside() { --machine.inside; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
};

// Uniform in [0, n): xorshift64*.
FUSED_RNN_EMULATOR_RAW inline uint32_t random_below(uint32_t n) {
  uint64_t& s = machine.random_state;
  s ^= s >> 12;
  s ^= s << 25;
  s ^= s >> 27;
  return uint32_t(((s * 0x2545F4914F6CDD1Dull) >> 32) * n >> 32);
}

inline std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(&thread - thread.cta->threads.data()) + " (warp " + std::to_string(thread.warp->number) + ", lane " +
         std::to_string(thread.lane) + ") of CTA " + std::to_string(thread.cta->linear);
}

}  // namespace fused_rnn::emulator
