#include "team.h"

#include <sched.h>

#include <cstdlib>
#include <memory>
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
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, context, i, threads);
  body(context, 0, threads);
  for (auto& t : others) t.join();
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
