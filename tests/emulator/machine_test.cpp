// The emulator itself: wrong kernels must end in an error that says what is wrong, whatever the schedule, and right ones must not.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include "cuda/primitives/barrier.h"
#include "cuda/primitives/copy.h"
#include "cuda/primitives/flags.h"
#include "cuda/primitives/mma.h"
#include "harness.h"

using namespace fused_rnn::cuda;
using harness::Buffer;
using harness::expect_error;
using harness::Shape;

namespace {

#if defined(FUSED_RNN_EMULATE_RACES)
constexpr bool kRaces = true;
#else
constexpr bool kRaces = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddresses = true;
#else
constexpr bool kAddresses = false;
#endif

template <class Body>
void run(Shape shape, uint64_t seed, Body body) {
  fused_rnn::emulator::Options options;
  options.seed = seed;
  options.cooperative = shape.cooperative;
  fused_rnn::emulator::launch(dim3(shape.ctas), dim3(shape.threads), shape.cluster, size_t(shape.shared), options, body);
}

template <class Body>
void every_seed_fails(const char* part, Shape shape, Body body) {
  for (uint64_t seed = 0; seed < 8; ++seed) expect_error(part, [&] { run(shape, seed, body); });
}

// ---- the schedule

std::vector<unsigned> order_of(uint64_t seed) {
  std::vector<unsigned> order;
  run({3, 64}, seed, [&] {
    fused_rnn::emulator::Inside guard;  // a log, no part of the kernel
    order.push_back(blockIdx.x * 64 + threadIdx.x);
  });
  return order;
}

TEST(a_seed_is_one_schedule) {
  REQUIRE(order_of(1) == order_of(1));
  REQUIRE(order_of(1) != order_of(2));
  const std::vector<unsigned> order = order_of(3);
  REQUIRE(std::set<unsigned>(order.begin(), order.end()).size() == 3 * 64);
}

TEST(indices_of_three_dimensions) {
  std::set<unsigned> seen;
  fused_rnn::emulator::launch(dim3(2, 3, 2), dim3(4, 2, 3), 1, 0, {}, [&] {
    fused_rnn::emulator::Inside guard;
    REQUIRE(gridDim.y == 3 && blockDim.z == 3);
    const unsigned block = blockIdx.x + 2 * (blockIdx.y + 3 * blockIdx.z);
    seen.insert(block * 24 + threadIdx.x + 4 * (threadIdx.y + 2 * threadIdx.z));
  });
  REQUIRE(seen.size() == 12 * 24 && *seen.rbegin() == 12 * 24 - 1);
}

TEST(many_threads) {
  Buffer<uint32_t> out(16 * 512);
  run({16, 512, 16}, 1, [&] {
    cluster_arrive();
    cluster_wait();
    out[blockIdx.x * 512 + threadIdx.x] = cluster_rank();
  });
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == i / 512, i);
}

// A process may have 65,530 of them, and tests load many libraries with an emulator each.
TEST(many_threads_take_few_mappings) {
  run({16, 512, 16}, 1, [] { cluster_rank(); });
  std::ifstream maps("/proc/self/maps");
  const auto count = std::count(std::istreambuf_iterator<char>(maps), {}, '\n');
  REQUIRE(count < 400, count);
}

TEST(launches_that_no_device_takes) {
  auto nothing = [] {};
  expect_error("block has 1025 threads", [&] { run({1, 1025}, 0, nothing); });
  expect_error("cluster is 2", [&] { run({3, 32, 2}, 0, nothing); });
  expect_error("shared_bytes is 300000", [&] { run({1, 32, 1, 300000}, 0, nothing); });
  expect_error("grid is empty", [&] { run({0, 32}, 0, nothing); });
}

// ---- deadlocks

TEST(an_mbarrier_that_lacks_bytes) {
  const char* report = "CTA 0 warp 1: 32 threads wait for barrier_wait, parity [0]";
  every_seed_fails(report, {1, 64, 1, 8}, [] {
    uint64_t* barrier = shared_array<uint64_t>(0, 1);
    if (threadIdx.x == 0) {
      barrier_init(barrier, 1);
      barrier_expect(barrier, 16);
    }
    sync_threads();
    barrier_wait(barrier, 0);
  });
}

TEST(a_barrier_that_a_thread_misses) {
  every_seed_fails("DEADLOCK", {2, 64, 2}, [] {
    if (blockIdx.x == 0 && threadIdx.x == 5) sync_threads();  // the others wait for the cluster
    cluster_arrive();
    cluster_wait();
  });
  every_seed_fails("1 thread waits for sync_threads", {2, 64, 2}, [] {
    if (blockIdx.x == 0 && threadIdx.x == 5) sync_threads();
    cluster_arrive();
    cluster_wait();
  });
}

TEST(flags_without_cooperation) {
  Buffer<uint32_t> flag(1);
  auto body = [&] {
    if (threadIdx.x == 0) {
      add_release(flag.data(), 1);
      while (load_acquire(flag.data()) < gridDim.x) pause();
    }
    sync_threads();
  };
  for (uint64_t seed = 0; seed < 8; ++seed) {
    flag[0] = 0;
    expect_error("a flag in global memory, last read as", [&] { run({6, 32}, seed, body); });
    flag[0] = 0;
    expect_error("of 6 CTAs are resident", [&] { run({6, 32}, seed, body); });
    flag[0] = 0;
    run({6, 32, 1, 0, true}, seed, body);
  }
}

// ---- warps

TEST(a_lane_that_skips_a_collective) {
  every_seed_fails("while lanes of its warp wait at mma of bf16", {1, 32}, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x != 7) mma(d, a, b, bf16{});
  });
  every_seed_fails("divergent warp", {1, 32}, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x == 7) sync_warp();
    else mma(d, a, b, bf16{});
  });
  every_seed_fails("a warp of fewer than 32 threads", {1, 48}, [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    mma(d, a, b, f16{});
  });
}

// ---- addresses

TEST(misaligned_addresses) {
  static const uint4 source[2] = {};
  every_seed_fails("copy_async16: misaligned", {1, 1, 1, 64}, [] { copy_async16(shared_memory() + 8, source, true); });
  every_seed_fails("copy_async16: misaligned", {1, 1, 1, 64},
                   [] { copy_async16(shared_memory(), reinterpret_cast<const char*>(source) + 4, true); });
}

TEST(addresses_outside) {
  static const uint4 source[2] = {};
  every_seed_fails("past the end of shared memory", {1, 1, 1, 64}, [] { copy_async16(shared_memory() + 64, source, true); });
  every_seed_fails("not in shared memory", {1, 1, 1, 64}, [] {
    uint4 local{};
    copy_async16(&local, source, true);
  });
  every_seed_fails("lie outside the launch's", {1, 1, 1, 64}, [] { shared_array<float>(16, 13); });
  if (kAddresses) {
    every_seed_fails("copy_async16: an address outside its array", {1, 1, 1, 256},
                     [] { copy_async16(shared_array<uint4>(0, 2) + 2, source, true); });
    Buffer<uint4> global(2);
    every_seed_fails("copy_async16: an address outside its array", {1, 1, 1, 256},
                     [&] { copy_async16(shared_array<uint4>(0, 2), global.data() + 2, true); });
  }
}

// AddressSanitizer ends the process here: these two run alone, by name.
TEST(a_write_past_the_end) {
  every_seed_fails("a write past the end of shared memory", {1, 32, 1, 64}, [] {
    volatile float* all = shared_array<float>(0, 16);
    if (threadIdx.x <= 16) all[threadIdx.x] = 1;
  });
}

TEST(a_read_between_arrays) {
  if (!kAddresses) return;
  run({1, 32, 1, 256}, 0, [] {
    volatile float* first = shared_array<float>(0, 8);
    shared_array<float>(kSharedGap, 8);
    if (threadIdx.x == 8) REQUIRE(first[threadIdx.x] != 0);
  });
}

// ---- copies

TEST(a_copy_that_nobody_waits_for) {
  static const uint4 source[32] = {};
  every_seed_fails("copies that it has not waited for", {1, 32, 1, 512}, [] {
    copy_async16(shared_array<uint4>(0, 32) + threadIdx.x, source + threadIdx.x, true);
    copy_commit();
  });
}

TEST(a_read_before_the_wait_sees_no_data) {
  static const uint4 source[1] = {{1, 1, 1, 1}};
  auto body = [] {
    volatile uint32_t* buffer = shared_array<uint32_t>(0, 4);
    copy_async16(const_cast<uint32_t*>(buffer), source, true);
    copy_commit();
    const uint32_t early = *buffer;
    copy_wait<0>();
    REQUIRE(early == 0xFFFFFFFF && *buffer == 1, early);
  };
  if (kRaces) return every_seed_fails("RACE (read after write)", {1, 1, 1, 16}, body);
  for (uint64_t seed = 0; seed < 8; ++seed) run({1, 1, 1, 16}, seed, body);
}

// The hardware may read the source at once or late; a kernel that changes it in between gets either.
TEST(a_source_that_changes_under_way) {
  std::set<uint32_t> seen;
  uint4 source = {1, 1, 1, 1};
  auto body = [&] {
    uint4* buffer = shared_array<uint4>(0, 1);
    copy_async16(buffer, &source, true);
    copy_commit();
    reinterpret_cast<volatile uint4&>(source).x = 2;
    copy_wait<0>();
    fused_rnn::emulator::Inside guard;
    seen.insert(buffer->x);
    source.x = 1;
  };
  if (kRaces) return every_seed_fails("RACE (write after read) on global memory", {1, 1, 1, 16}, body);
  for (uint64_t seed = 0; seed < 32; ++seed) run({1, 1, 1, 16}, seed, body);
  REQUIRE(seen.size() == 2);
}

// ---- clusters

TEST(mbarriers_used_wrongly) {
  every_seed_fails("barrier_wait: the mbarrier is not initialised", {1, 1, 1, 8}, [] { barrier_wait(shared_array<uint64_t>(0, 1), 0); });
  every_seed_fails("cluster_wait: without a cluster_arrive", {2, 1, 2}, [] { cluster_wait(); });
  every_seed_fails("between cluster_arrive and cluster_wait", {1, 1, 1}, [] { cluster_arrive(); });
  every_seed_fails("store_async: the launch is not one of clusters", {1, 1, 0, 64}, [] {
    uint4* buffer = shared_array<uint4>(0, 1);
    uint64_t* barrier = shared_array<uint64_t>(32, 1);
    store_async(remote(buffer, 0), remote(barrier, 0), {1, 2, 3, 4});
  });
  every_seed_fails("rank 2 outside the cluster", {2, 1, 2, 16}, [] { remote(shared_memory(), 2); });
  every_seed_fails("the mbarrier of another CTA", {2, 1, 2, 8}, [] {
    uint64_t* barrier = shared_array<uint64_t>(0, 1);
    barrier_init(barrier, 1);
    cluster_arrive();
    cluster_wait();
    barrier_expect(reinterpret_cast<uint64_t*>(remote(barrier, cluster_rank() ^ 1)), 16);
  });
}

// One message from rank 1 to rank 0, which may forget to wait for it and ends: too early for the message, if not for its sender.
TEST(a_store_to_a_cta_that_ends) {
  int on_its_way = 0, too_late = 0;
  for (bool waits : {true, false})
    for (uint64_t seed = 0; seed < 32; ++seed) try {
        run({2, 1, 2, 32}, seed, [waits] {
          uint64_t* barrier = shared_array<uint64_t>(0, 1);
          uint4* buffer = shared_array<uint4>(16, 1);
          barrier_init(barrier, 1);
          barrier_fence();
          cluster_arrive();
          cluster_wait();
          if (cluster_rank() == 1) store_async(remote(buffer, 0), remote(barrier, 0), {1, 2, 3, 4});
          else barrier_expect(barrier, 16);
          if (cluster_rank() == 0 && waits) barrier_wait(barrier, 0);
        });
      } catch (const std::runtime_error& error) {
        REQUIRE(!waits);
        on_its_way += std::strstr(error.what(), "the CTA ends while a store to its shared memory is on its way") != nullptr;
        too_late += std::strstr(error.what(), "store_async: shared memory of a CTA that has exited") != nullptr;
      }
  REQUIRE(on_its_way > 0 && too_late > 0, on_its_way, too_late);
}

// ---- races, which only the race build must find under every schedule

template <class Body>
void is_a_race(const char* part, Shape shape, Body body) {
  if (kRaces) every_seed_fails(part, shape, body);
}

TEST(a_missing_barrier) {
  Buffer<uint32_t> out(64);
  for (bool barrier : {true, false}) {
    auto body = [&out, barrier] {
      uint32_t* all = shared_array<uint32_t>(0, 64);
      all[threadIdx.x] = threadIdx.x;
      if (barrier) sync_threads();
      out[threadIdx.x] = all[63 - threadIdx.x];
    };
    if (barrier)
      for (uint64_t seed = 0; seed < 8; ++seed) run({1, 64, 1, 256}, seed, body);
    else is_a_race("on shared memory of CTA 0 at byte", {1, 64, 1, 256}, body);
  }
}

// A buffer that the next step writes while a neighbour may still read it.
TEST(a_single_buffer) {
  Buffer<uint32_t> out(64);
  is_a_race("on shared memory of CTA 0 at byte", {1, 64, 1, 256}, [&] {
    uint32_t* all = shared_array<uint32_t>(0, 64);
    for (uint32_t step = 0; step < 2; ++step) {
      all[threadIdx.x] = step;
      sync_threads();
      out[threadIdx.x] = all[63 - threadIdx.x];
    }
  });
}

TEST(a_missing_sync_warp) {
  Buffer<uint32_t> out(32);
  for (bool sync : {true, false}) {
    auto body = [&, sync] {
      uint32_t* rows = shared_array<uint32_t>(0, 32 * 4);
      for (int i = 0; i < 4; ++i) rows[threadIdx.x * 4 + i] = threadIdx.x;
      if (sync) sync_warp();
      for (int i = 0; i < 4; ++i) out[threadIdx.x] += rows[(31 - threadIdx.x) * 4 + i];
    };
    if (sync) run({1, 32, 1, 512}, 0, body);
    else is_a_race("on shared memory of CTA 0 at byte", {1, 32, 1, 512}, body);
  }
}

TEST(a_release_before_the_barrier) {
  for (bool right : {true, false}) {
    Buffer<uint32_t> data(64), out(64), flag(1);
    auto body = [&, right] {
      data[blockIdx.x * 32 + threadIdx.x] = 1;
      if (right) sync_threads();
      if (threadIdx.x == 0) {
        add_release(flag.data(), 1);
        while (load_acquire(flag.data()) < 2) pause();
      }
      sync_threads();
      out[blockIdx.x * 32 + threadIdx.x] = data[(1 - blockIdx.x) * 32 + threadIdx.x];
    };
    const Shape shape{2, 32, 1, 0, true};
    for (uint64_t seed = 0; seed < 8; ++seed) {
      flag[0] = 0;
      if (right) run(shape, seed, body);
      else if (kRaces) expect_error("on global memory", [&] { run(shape, seed, body); });
    }
  }
}

TEST(ctas_that_are_not_resident_together) {
  Buffer<uint32_t> out(1);
  is_a_race("RACE (write after write) on global memory", {4, 32}, [&] {
    if (threadIdx.x == 0) out[0] = blockIdx.x;
  });
}

TEST(a_buffer_of_a_cluster_that_is_written_too_early) {
  for (bool right : {true, false}) {
    Buffer<uint32_t> out(2 * 32);
    auto body = [&, right] {
      uint64_t* barriers = shared_array<uint64_t>(0, 2);
      uint4* buffers = shared_array<uint4>(128, 2);
      if (threadIdx.x == 0)
        for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
      barrier_fence();
      cluster_arrive();
      cluster_wait();
      for (uint32_t step = 0; step < 4; ++step) {
        uint4* now = buffers + (right ? step % 2 : 0);
        if (threadIdx.x == 0) {
          barrier_expect(barriers + step % 2, 16);
          const unsigned peer = cluster_rank() ^ 1;
          store_async(remote(now, peer), remote(barriers + step % 2, peer), {step, 0, 0, 0});
        }
        barrier_wait(barriers + step % 2, step / 2 % 2);
        out[blockIdx.x * 32 + threadIdx.x] = now->x;
        sync_threads();
      }
      cluster_arrive();
      cluster_wait();
    };
    const Shape shape{2, 32, 2, 256};
    if (!right) is_a_race("on shared memory of CTA", shape, body);
    for (uint64_t seed = 0; right && seed < 8; ++seed) run(shape, seed, body);
  }
}

}  // namespace

int main(int count, char** names) { return harness::run_all(count, names); }
