// Runs a kernel: CTAs in random order, some or all of them resident at a time, every thread a fiber.
#pragma once
#include <algorithm>
#include <memory>
#include <type_traits>

#include "async.h"

namespace fused_rnn::emulator {

FUSED_RNN_EMULATOR_RAW inline dim3 thread_index() { return machine.current->index; }
FUSED_RNN_EMULATOR_RAW inline dim3 block_index() { return machine.current->cta->index; }
FUSED_RNN_EMULATOR_RAW inline dim3 block_size() { return machine.block; }
FUSED_RNN_EMULATOR_RAW inline dim3 grid_size() { return machine.grid; }

inline unsigned count(dim3 d) { return d.x * d.y * d.z; }
inline dim3 unflatten(unsigned i, dim3 d) { return {i % d.x, i / d.x % d.y, i / d.x / d.y}; }

inline void check_unfinished(const Thread& thread) {
  if (!thread.copies.empty()) fail("the thread ends with copies that it has not waited for");
  if (thread.cluster_arrived) fail("the thread ends between cluster_arrive and cluster_wait");
  if (thread.warp->arrived) fail(std::string("the thread ends while lanes of its warp wait at ") + thread.warp->operation);
}

inline void check_ended(const Cta& cta) {
  for (const RemoteStore& store : machine.remote_stores)
    if (store.target == &cta) fail("the CTA ends while a store to its shared memory is on its way");
  check_redzone(cta);
  poison(cta.shared, machine.shared_stride);
}

// A barrier does not wait for threads that have ended.
inline void end_thread() {
  Inside guard;
  Thread& thread = *machine.current;
  check_unfinished(thread);
  thread.finished = true;
  --machine.live;
  Cta& cta = *thread.cta;
  if (--cta.live == 0) check_ended(cta);
  release_if_complete(cta.barrier, cta.live);
  release_if_complete(cta.cluster->barrier, --cta.cluster->live);
  if (machine.live == 0) return_to_host();
  run_others();
}

inline void fiber_main() {
  stacks.entered_fiber();
  machine.inside = 0;
  std::string thrown;
  try {
    machine.body(machine.body_argument);
  } catch (const std::exception& error) {  // it cannot leave a fiber's stack
    thrown = error.what();
  }
  if (!thrown.empty()) fail(thrown);
  end_thread();
  __builtin_unreachable();
}

// The CTAs that are resident together.
struct Wave {
  std::vector<Cluster> clusters;
  std::vector<Cta> ctas;
  std::vector<Warp*> ready_warps;
};

inline void build_threads(Cta& cta, uint32_t first_id) {
  const unsigned threads = count(machine.block);
  cta.threads.resize(threads);
  cta.warps.resize((threads + kWarp - 1) / kWarp);
  for (size_t w = 0; w < cta.warps.size(); ++w) {
    cta.warps[w].number = int(w);
    cta.warps[w].priority = random_below(1u << 30);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = cta.threads[i];
    thread.cta = &cta;
    thread.warp = &cta.warps[i / kWarp];
    thread.lane = int(i % kWarp);
    thread.index = unflatten(i, machine.block);
    thread.id = first_id + i;
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->mask |= 1u << thread.lane;
    prepare_context(thread.context, stacks.begin(thread.id), Stacks::usable_bytes(thread.id), fiber_main);
    races::start_thread(thread);
    make_ready(&thread);
  }
}

inline void build_wave(Wave& wave, const std::vector<unsigned>& clusters) {
  const unsigned size = machine.cluster_size, threads = count(machine.block);
  wave.clusters.resize(clusters.size());
  wave.ctas.resize(clusters.size() * size);
  wave.ready_warps.resize(wave.ctas.size() * ((threads + kWarp - 1) / kWarp));
  machine.ready_warps = wave.ready_warps.data();
  stacks.reserve(wave.ctas.size() * threads);
  prepare_arena(wave.ctas.size());
  races::start_wave(uint32_t(wave.ctas.size() * threads));
  for (size_t i = 0; i < wave.ctas.size(); ++i) {
    Cta& cta = wave.ctas[i];
    cta.linear = clusters[i / size] * size + unsigned(i % size);
    cta.index = unflatten(cta.linear, machine.grid);
    cta.rank = unsigned(i % size);
    cta.cluster = &wave.clusters[i / size];
    cta.cluster->ctas.push_back(&cta);
    cta.cluster->live += threads;
    cta.shared = machine.arena + i * machine.shared_stride;
    cta.live = threads;
    machine.ctas.push_back(&cta);
    build_threads(cta, uint32_t(i * threads));
  }
  machine.live = wave.ctas.size() * threads;
}

inline void clear_schedule() {
  machine.ctas.clear();
  machine.ready_count = 0;
  machine.stores_under_way = 0;
  machine.remote_stores.clear();
  machine.flag_waiters.clear();
  machine.current = nullptr;
  machine.inside = 0;
}

inline void run_wave(const std::vector<unsigned>& clusters) {
  Wave wave;
  clear_schedule();
  build_wave(wave, clusters);
  machine.inside = 1;
  run_until_host_returns(choose_thread());
  clear_schedule();
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

// Some seeds are fair to all warps, some let one run ahead as far as it can; some deliver at once, some as late as possible.
inline void draw_schedule(uint64_t seed) {
  machine.random_state = (seed + 1) * 0x9E3779B97F4A7C15ull;
  for (int i = 0; i < 4; ++i) random_below(2);
  const unsigned candidates[] = {1, 1, 2, 4, 16}, laziness[] = {1, 2, 8, 64, 1u << 30};
  machine.candidates = candidates[random_below(5)];
  machine.laziness = laziness[random_below(5)];
}

inline void check_launch(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes) {
  auto refuse = [](const std::string& what) { throw std::invalid_argument("launch: " + what); };
  if (count(grid) == 0) refuse("grid is empty");
  if (count(block) == 0 || count(block) > 1024) refuse("block has " + std::to_string(count(block)) + " threads, expected 1 to 1024");
  if (cluster > 16 || (cluster && grid.x % cluster))
    refuse("cluster is " + std::to_string(cluster) + ", expected 0 to 16 and a divisor of grid.x = " + std::to_string(grid.x));
  if (shared_bytes > kMostShared)
    refuse("shared_bytes is " + std::to_string(shared_bytes) + ", expected at most " + std::to_string(kMostShared));
}

// Calls body() in every thread of the grid; cluster: 0 where the launch is not one of clusters. Throws std::runtime_error where the kernel
// does what the hardware would not forgive.
template <class Body>
inline void launch(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, Options options, Body&& body) {
  check_launch(grid, block, cluster, shared_bytes);
  machine.grid = grid;
  machine.block = block;
  machine.in_clusters = cluster > 0;
  cluster = std::max(cluster, 1u);
  machine.cluster_size = cluster;
  machine.shared_bytes = shared_bytes;
  machine.body_argument = const_cast<void*>(static_cast<const void*>(std::addressof(body)));
  machine.body_bytes = sizeof(body);
  machine.body = [](void* p) { (*static_cast<std::remove_reference_t<Body>*>(p))(); };
  machine.error.clear();
  machine.switches = 0;
  draw_schedule(options.seed);
  races::start_launch();

  std::vector<unsigned> order(count(grid) / cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (unsigned i = unsigned(order.size()); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  while (!order.empty()) {
    const size_t some = 1 + random_below(std::min<uint32_t>(4, uint32_t(order.size())));
    const size_t resident = options.cooperative ? order.size() : std::min<size_t>(some, std::max<size_t>(1, count(grid) / cluster - 1));
    run_wave({order.end() - long(resident), order.end()});
    order.resize(order.size() - resident);
  }
}

}  // namespace fused_rnn::emulator
