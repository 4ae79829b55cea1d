// A team of threads and its barrier by themselves. test_team.py compiles it, with OpenMP and without, and under ThreadSanitizer.
#include "cpu/team.h"

#include <time.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/quota.h"

using namespace fused_rnn::cpu;

namespace {

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}
void sleep_for(double s) {
  const timespec t{time_t(s), long((s - double(time_t(s))) * 1e9)};
  nanosleep(&t, nullptr);
}
int failed(const char* what, double found) {
  printf("%s: %g\n", what, found);
  return 1;
}

// Whoever waits for a late peer sleeps, at a barrier and at the end of a body.
struct Late {
  static constexpr double delay = 0.3;
  int64_t lines[Barrier::words(2)] = {};
  bool at_end = false;
  int size = 0;

  static void body(void* context, int me, int size) {
    Late& self = *static_cast<Late*>(context);
    if (me == 0) self.size = size;
    if (me == size - 1) sleep_for(delay);
    if (!self.at_end) Barrier(self.lines, size).wait(me);
  }
};
int waiting_sleeps() {
  for (const bool at_end : {false, true}) {
    Late late;
    late.at_end = at_end;
    const double wall = seconds(CLOCK_MONOTONIC), awake = seconds(CLOCK_THREAD_CPUTIME_ID);
    run_team(2, Late::body, &late);
    const double took = seconds(CLOCK_MONOTONIC) - wall, worked = seconds(CLOCK_THREAD_CPUTIME_ID) - awake;
    if (late.size != 2) return failed("threads", late.size);
    if (took < Late::delay) return failed("seconds, too few", took);
    if (worked > 0.2 * Late::delay) return failed(at_end ? "seconds awake at the end" : "seconds awake in a barrier", worked);
  }
  return 0;
}

// Each thread adds up what the others wrote before the barrier; none writes again before all have read.
struct Exchange {
  static constexpr int most = 16;
  int64_t lines[Barrier::words(most)];
  long steps, written[most], sums[most], expected;
  int late;  // every so many steps one sleeps: the others as well, then

  static void body(void* context, int me, int size) {
    Exchange& self = *static_cast<Exchange*>(context);
    Barrier barrier(self.lines, size);
    long sum = 0;
    for (long step = 0; step < self.steps; ++step) {
      self.written[me] = step * (me + 1);
      if (self.late && step % self.late == 0 && step / self.late % size == me) sleep_for(1e-4);
      barrier.wait(me);
      for (int i = 0; i < size; ++i) sum += self.written[i];
      barrier.wait(me);
    }
    self.sums[me] = sum;
    if (me == 0) self.expected = self.steps * (self.steps - 1) / 2 * (size * (size + 1) / 2);
    barrier.wait(me);
    if (sum != self.expected) self.sums[0] = -1;
  }
};
int exchanges(long steps) {
  for (const int threads : {1, 2, 3, 8, 16})
    for (const int late : {0, 50}) {
      Exchange exchange{};
      exchange.steps = steps, exchange.late = late;
      run_team(threads, Exchange::body, &exchange);
      if (exchange.sums[0] != exchange.expected) return failed("a wrong sum with threads", threads);
    }
  return 0;
}
// Teams of several callers at the same time.
int callers(long steps) {
  std::vector<int> failures(4);
  std::vector<std::thread> threads;
  for (int& failure : failures) threads.emplace_back([&failure, steps] { failure = exchanges(steps); });
  for (auto& t : threads) t.join();
  for (const int failure : failures)
    if (failure) return failure;
  return 0;
}

// After two teams in a row that mostly waited, one thread; the team comes back when its time is over.
struct Size {
  int size = 0;
  bool late;
  static void body(void* context, int me, int size) {
    Size& self = *static_cast<Size*>(context);
    if (me == 0) self.size = size;
    if (me == 1 && self.late) sleep_for(0.05);
    const double until = seconds(CLOCK_THREAD_CPUTIME_ID) + 1e-3;
    while (seconds(CLOCK_THREAD_CPUTIME_ID) < until) {
    }
  }
};
int size_of_team(bool late) {
  Size size{0, late};
  run_team(2, Size::body, &size);
  return size.size;
}
int fewer() {
  for (int i = 0; i < 2; ++i)
    if (size_of_team(true) != 2) return failed("not two threads at call", i);
  for (int i = 0; i < 20; ++i)
    if (size_of_team(true) != 1) return failed("not one thread at call", i);
  for (const double start = seconds(CLOCK_MONOTONIC); size_of_team(false) != 2;)
    if (seconds(CLOCK_MONOTONIC) - start > 60) return failed("one thread for seconds", 60);
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  if (what == "quota") return printf("%d\n", quota(arguments[2])) < 0;
  const long steps = arguments[2] ? std::stol(arguments[2]) : 0;
  const int failure = what == "sleeps"      ? waiting_sleeps()
                      : what == "exchanges" ? exchanges(steps)
                      : what == "callers"   ? callers(steps)
                                            : fewer();
  if (!failure) printf("ok\n");
  return failure;
}
