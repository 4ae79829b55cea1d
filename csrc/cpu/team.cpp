#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn::cpu {
namespace {

// After fork() OpenMP's worker threads are gone in the child, yet its runtime waits for them forever. There the team is made of
// plain threads, started anew for each call.
bool forked = false;
const bool watching_forks = [] {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return true;
}();

// Looks at a peer's line: without a pause between them; that count as work; before sleep, for about as long as that and waking take.
constexpr int kNearby = 64, kBrief = 200, kPatient = 1000;

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};
constexpr size_t kKeptBytes = size_t(64) << 20;
constexpr size_t kHugePage = size_t(2) << 20;

// `bytes` rounded up to whole pages, which are large ones if there are that many bytes.
void* allocate(size_t& bytes, size_t large) {
  const size_t page = bytes >= large ? kHugePage : 4096;
  bytes = (bytes + page - 1) / page * page;
  void* const memory = std::aligned_alloc(page, bytes);
  if (!memory) throw std::bad_alloc();
  if (page == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Nobody begins before all have been started, for the team is only as large as the system allows.
void run_plain_threads(int threads, void (*body)(void*, int, int), void* context) {
  std::mutex mutex;
  std::condition_variable started;
  int size = 0;
  std::vector<std::thread> others;
  try {
    others.reserve(size_t(threads - 1));
    for (int me = 1; me < threads; ++me)
      others.emplace_back([&, me] {
        std::unique_lock<std::mutex> lock(mutex);
        started.wait(lock, [&] { return size > 0; });
        lock.unlock();
        body(context, me, size);
      });
  } catch (const std::exception&) {  // no memory, or too many threads
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    size = 1 + int(others.size());
  }
  started.notify_all();
  body(context, 0, size);
  for (auto& t : others) t.join();
}

int64_t now(clockid_t clock = CLOCK_MONOTONIC) {  // nanoseconds
  timespec t;
  clock_gettime(clock, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Sleeps of this thread in a row. After each it looks half as often, for threads that share a core; as often as ever after 32.
thread_local unsigned sleeps = 0;
thread_local int64_t spun = 0;  // nanoseconds that this thread was awake in a barrier, beyond brief waits

// How many threads a team gets. Where other programs keep the cores busy, all members wait for the one that has no core, and a team takes
// longer than one thread would. A team whose members together worked for less than half of their time did no more than half of them can:
// after two of those in a row teams are half as large, for many times as long as the last one took, which bounds what trying again costs.
class Limit {
 public:
  int of(int threads) {
    static const bool fixed = std::getenv("FUSED_RNN_FIXED_TEAMS") != nullptr;
    if (fixed) return threads;
    if (halved_ > 0 && now() > until_) halved_ = 0;
    const int fewer = threads >> halved_;
    return fewer > 1 ? fewer : 1;
  }
  void learn(int64_t took, int64_t worked, int team_size) {
    const bool late = 2 * worked < took * team_size;
    if (late && late_.exchange(true)) {
      until_ = now() + 32 * took;
      if (halved_ < 8) ++halved_;
    }
    if (!late && halved_ == 0) late_ = false;
  }

 private:
  std::atomic<int> halved_{0};
  std::atomic<int64_t> until_{0};
  std::atomic<bool> late_{false};  // the last team of full size
} limit;

// A body between two looks at the clock, and a barrier behind it where who is early sleeps: OpenMP's spins for milliseconds.
struct Watched {
  void (*body)(void*, int, int);
  void* context;
  int size = 1;  // of the team that came of it
  alignas(2 * kCacheLine) int64_t lines[Barrier::words(kMaxThreads)];  // a barrier's; each thread's second word is what it worked

  static void run(void* watched, int me, int team_size) {
    Watched& self = *static_cast<Watched*>(watched);
    const int64_t start = now(CLOCK_THREAD_CPUTIME_ID);
    spun = 0;
    if (me == 0) self.size = team_size;
    self.body(self.context, me, team_size);
    Barrier(self.lines, team_size).wait(me);
    self.lines[me * Barrier::stride + 1] = now(CLOCK_THREAD_CPUTIME_ID) - start - spun;
  }
};

}  // namespace

void run_team(int threads, void (*body)(void*, int, int), void* context, bool may_shrink) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (may_shrink) threads = limit.of(threads);
  if (threads <= 1) return body(context, 0, 1);
  Watched watched;
  watched.body = body, watched.context = context;
  memset(watched.lines, 0, Barrier::words(threads) * sizeof(int64_t));
  const int64_t start = now();
  bool done = false;
#if defined(_OPENMP)
  if (!forked) {
#pragma omp parallel num_threads(threads)
    Watched::run(&watched, omp_get_thread_num(), omp_get_num_threads());
    done = true;
  }
#endif
  if (!done) run_plain_threads(threads, Watched::run, &watched);
  int64_t worked = 0;
  for (int i = 0; i < watched.size; ++i) worked += watched.lines[i * Barrier::stride + 1];
  limit.learn(now() - start, worked, watched.size);
}

void* pages(size_t bytes) { return allocate(bytes, kHugePage / 2); }

void* scratch(size_t bytes) {
  static thread_local Scratch kept;
  const bool shrink = kept.size > kKeptBytes && bytes <= kKeptBytes;
  if (bytes > kept.size || shrink) {
    std::free(kept.memory);
    kept.size = 0;
    kept.memory = nullptr;  // if there is none to be had
    kept.memory = allocate(bytes, kHugePage);
    kept.size = bytes;
  }
  return kept.memory;
}

// A line's count of barriers is twice what it says; the last bit is set by who sleeps until the line changes.
void Barrier::wait_for_all(int me) {
  const auto line = [this](int i) { return reinterpret_cast<unsigned*>(lines_ + i * stride); };
  const unsigned turn = (__atomic_load_n(line(me), __ATOMIC_RELAXED) | 1u) + 1;
  if (__atomic_exchange_n(line(me), turn, __ATOMIC_ACQ_REL) & 1u) syscall(SYS_futex, line(me), FUTEX_WAKE_PRIVATE, INT_MAX);
  for (int i = 0; i < size_; ++i) {
    int64_t since = 0;
    int looks = 0;
    const int patience = kPatient >> sleeps % 32;
    bool slept = false;
    for (;;) {
      unsigned found = __atomic_load_n(line(i), __ATOMIC_ACQUIRE);
      if (int(found - turn) >= 0) break;
      if (++looks > kNearby) pause();
      if (looks == kBrief) since = now();
      if (looks <= patience) continue;
      if (since) spun += now() - since;
      since = 0;
      slept = true;
      if (found & 1u || __atomic_compare_exchange_n(line(i), &found, found | 1u, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        syscall(SYS_futex, line(i), FUTEX_WAIT_PRIVATE, found | 1u, nullptr);
    }
    if (since) spun += now() - since;
    if (slept) ++sleeps;
    else if (looks > 0) sleeps = 0;
  }
}

}  // namespace fused_rnn::cpu
