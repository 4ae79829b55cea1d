// Who runs next: one of the ready threads, drawn by the seed. Where nobody can run, the report of who waits on what.
#pragma once
#include <map>
#include <string>
#include <utility>

#include "machine.h"
#include "stacks.h"

namespace fused_rnn::emulator {

void deliver_one();  // async.h: lets one remote store arrive

FUSED_RNN_EMULATOR_RAW inline void switch_to(Thread* thread) {
  Thread* from = machine.current;
  const int inside = machine.inside;
  machine.current = thread;
  ++machine.switches;
  switch_context(from ? from->context : machine.host, thread->context);
  machine.inside = inside;
}

// For good: the thread has ended, or the launch has failed. The exception is thrown on the host's own stack.
FUSED_RNN_EMULATOR_RAW inline void return_to_host() {
  Thread* from = machine.current;
  machine.current = nullptr;
  stacks.leave();
  switch_context(from->context, machine.host);
}

// On the host: everything until the launch has ended or failed.
FUSED_RNN_EMULATOR_RAW inline void run_until_host_returns(Thread* first) {
  const int inside = machine.inside;
  stacks.enter();
  switch_to(first);
  stacks.entered_host();
  machine.inside = inside;
}

// Ends the launch. Never returns, and does not say so: AddressSanitizer would clear up the stack before such a call, and take all
// fibers' stacks for one.
inline void stop(const std::string& error) {
  machine.error = error;
  stacks.abandon();
  return_to_host();
}

// Ends it by the fault of the thread that runs.
inline void fail(const std::string& what) {
  Inside guard;
  stop(what + "\n  in " + name_of(*machine.current));
}

FUSED_RNN_EMULATOR_RAW inline void make_ready(Thread* thread) {
  Warp& warp = *thread->warp;
  if (!warp.ready) {
    warp.queue_position = machine.ready_count++;
    machine.ready_warps[warp.queue_position] = &warp;
  }
  warp.ready |= 1u << thread->lane;
}

inline void make_ready(std::vector<Thread*>& threads) {
  for (Thread* thread : threads) make_ready(thread);
  threads.clear();
}

FUSED_RNN_EMULATOR_RAW inline void remove_from_queue(Warp& warp) {
  Warp* last = machine.ready_warps[--machine.ready_count];
  machine.ready_warps[warp.queue_position] = last;
  last->queue_position = warp.queue_position;
}

inline std::string deadlock_report() {
  std::map<std::pair<unsigned, int>, std::map<std::string, int>> groups;
  uint64_t ended = 0;
  for (const Cta* cta : machine.ctas)
    for (const Thread& thread : cta->threads) {
      if (thread.finished) ++ended;
      else ++groups[{cta->linear, thread.warp->number}][thread.waits_for + (" [" + std::to_string(thread.detail) + "]")];
    }
  std::string report = "DEADLOCK: every thread waits and no asynchronous store is on its way (" + std::to_string(ended) +
                       " threads have ended; " + std::to_string(machine.ctas.size()) + " of " +
                       std::to_string(machine.grid.x * machine.grid.y * machine.grid.z) + " CTAs are resident)";
  int lines = 0;
  for (const auto& [place, reasons] : groups)
    for (const auto& [reason, count] : reasons) {
      if (++lines > 32) return report + "\n  ...";
      report += "\n  CTA " + std::to_string(place.first) + " warp " + std::to_string(place.second) + ": " + std::to_string(count) +
                (count == 1 ? " thread waits" : " threads wait") + " for " + reason;
    }
  return report;
}

FUSED_RNN_EMULATOR_RAW inline Warp* choose_warp() {
  Warp* best = nullptr;
  for (unsigned i = 0; i < machine.candidates; ++i) {
    Warp* warp = machine.ready_warps[random_below(machine.ready_count)];
    if (!best || warp->priority > best->priority) best = warp;
  }
  return best;
}

FUSED_RNN_EMULATOR_RAW inline Thread* take_lane(Warp& warp) {
  const unsigned turn = random_below(kWarp);
  const uint32_t rotated = warp.ready >> turn | (turn ? warp.ready << (kWarp - turn) : 0);
  const unsigned lane = (unsigned(__builtin_ctz(rotated)) + turn) % kWarp;
  warp.ready &= ~(1u << lane);
  if (!warp.ready) remove_from_queue(warp);
  return warp.lanes[lane];
}

// Lanes of one warp mostly follow each other: they meet in the next collective anyway, and their stacks are in the cache.
FUSED_RNN_EMULATOR_RAW inline Thread* choose_thread() {
  if (machine.current && machine.current->warp->ready && random_below(32)) return take_lane(*machine.current->warp);
  if (machine.stores_under_way && random_below(machine.laziness) == 0) deliver_one();
  while (machine.ready_count == 0) {
    if (machine.stores_under_way == 0) stop(deadlock_report());
    deliver_one();
  }
  return take_lane(*choose_warp());
}

// The caller has put the thread where somebody will find it, or has ended it.
FUSED_RNN_EMULATOR_RAW inline void run_others() {
  Thread* next = choose_thread();
  if (next != machine.current) switch_to(next);
}

FUSED_RNN_EMULATOR_RAW inline void block(const char* waits_for, long long detail = 0) {
  machine.current->waits_for = waits_for;
  machine.current->detail = detail;
  run_others();
}

FUSED_RNN_EMULATOR_RAW inline void yield() {
  make_ready(machine.current);
  run_others();
}

// Where a kernel can be observed by others, a switch now and then.
FUSED_RNN_EMULATOR_RAW inline void maybe_yield(uint32_t one_in) {
  if (random_below(one_in) == 0) yield();
}

}  // namespace fused_rnn::emulator
