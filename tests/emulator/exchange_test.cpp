// The rounds of benchmarks/exchange.h do tell every member what they are to tell.
#include "../../benchmarks/exchange.h"
#include "harness.h"

using namespace fused_rnn::exchange;
using harness::Buffer;

namespace {

struct Rounds {
  static FUSED_RNN_DEVICE void body(Exchange p) { run(p); }
};

void check(Kind kind, int members, int rounds, int bytes = 0, int peers = 1, int piece = 512) {
  for (int seed = 0; seed < harness::seeds; ++seed) {
    Buffer<uint32_t> counters(kCounters), global(kGlobalWords), result(kMost * kWarp);
    const Exchange p{kind, members, rounds, counters.data(), global.data(), result.data(), bytes, peers, piece};
    const unsigned size = kind == cluster || kind == slices ? unsigned(members) : 1;
    const int shared = kind == slices ? slices_shared(p) : kShared;
    harness::launch<Rounds>({unsigned(ctas(p)), unsigned(threads(p)), size, shared, kind == grid || kind == flags}, uint64_t(seed), p);
    for (int rank = 0; rank < members; ++rank)
      for (int lane = 0; lane < kWarp; ++lane) {
        const uint32_t got = result[size_t(rank * kWarp + lane)], wanted = expected(p, rank, lane);
        REQUIRE(got == wanted, members, rank, lane, got, wanted);
      }
  }
}

}  // namespace

TEST(warps_of_a_cta) {
  for (const int members : {1, 2, 4}) check(cta, members, 7);
}
TEST(members_of_a_cluster) {
  if (!harness::has_cluster()) return;
  for (const int members : {2, 3, 8}) check(cluster, members, 6);
}
TEST(slices_of_a_cluster) {
  if (!harness::has_cluster()) return;
  for (const int members : {2, 3, 8})
    for (const int peers : {1, 8})
      for (const int piece : {64, 512}) check(slices, members, 4, 1024, peers, piece);
}
TEST(members_of_a_grid) {
  for (const int members : {1, 2, 5, 40}) check(grid, members, 4);
}
TEST(flags_of_members) {
  for (const int members : {1, 2, 5, 40}) check(flags, members, 4);
}

int main(int count, char** names) { return harness::run_all(count, names); }
