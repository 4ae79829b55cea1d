#include "team.h"

#include <sched.h>

#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <pthread.h>
#include <sys/mman.h>
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

}  // namespace

void run_team(int threads, void (*body)(void*, int, int), void* context) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) return body(context, 0, 1);
#if defined(_OPENMP)
  if (!forked) {
#pragma omp parallel num_threads(threads)
    body(context, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  run_plain_threads(threads, body, context);
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

void Barrier::wait_for_all(int me) {
  const int64_t turn = __atomic_load_n(&lines_[me * stride], __ATOMIC_RELAXED) + 1;
  __atomic_store_n(&lines_[me * stride], turn, __ATOMIC_RELEASE);
  for (int i = 0; i < size_; ++i) {
    // Spin briefly, then give the core away: a peer that is not running would otherwise cost a whole time slice.
    for (int spins = 0; __atomic_load_n(&lines_[i * stride], __ATOMIC_ACQUIRE) < turn;) {
      if (++spins < 4000) {
        if (spins > 64) pause();
      } else {
        sched_yield();
        spins = 64;
      }
    }
  }
}

}  // namespace fused_rnn::cpu
