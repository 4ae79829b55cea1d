// A team of CPU threads that stays together for a whole sequence, and its barrier. Compiled once (team.cpp), for the baseline ISA.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fused_rnn::cpu {

constexpr int kCacheLine = 64;
constexpr int kMaxThreads = 256;
constexpr int64_t kRowsEach = 12;  // from so many rows a thread on threads divide the batch, below it the units

// Memory for weights that are read at every step, to be given back by free(). From a MiB on in large pages, where the system has some.
void* pages(size_t bytes);

// Runs body(context, me, team_size) on up to `threads` threads at once, the caller among them, and returns when all have.
// The team may come out smaller than asked: inside another parallel region, or, where it `may_shrink`, for a while after larger ones have
// mostly waited for threads that had no core. body must go by team_size.
void run_team(int threads, void (*body)(void* context, int me, int team_size), void* context, bool may_shrink = true);

// Scratch memory of the calling thread, 64-byte aligned, valid until its next call. Kept between calls (fresh pages cost more
// than the work of a short sequence), except when very large.
void* scratch(size_t bytes);

// Every thread owns a cache line with the number of barriers it has reached; waiting is reading the others' lines. The store after a
// thread's writes and the load before its reads order the state that the team exchanges. Who waits long sleeps, and leaves word of it
// in the line it waits for, so that a thread whose peers are there makes no system call.
class Barrier {
 public:
  // Two cache lines a thread: the adjacent-line prefetcher fetches pairs.
  static constexpr int64_t stride = 2 * kCacheLine / int64_t(sizeof(int64_t));
  __attribute__((always_inline)) static constexpr int64_t words(int team_size) { return stride * team_size; }
  __attribute__((always_inline)) Barrier(int64_t* zeroed_words, int team_size) : lines_(zeroed_words), size_(team_size) {}
  __attribute__((always_inline)) void wait(int me) {  // always: shared by translation units of different ISAs
    if (size_ > 1) wait_for_all(me);
  }

 private:
  void wait_for_all(int me);
  int64_t* lines_;
  int size_;
};

}  // namespace fused_rnn::cpu
