// What the loops of programs measure before they run is what they then lay out. test_arena.py compiles it.
#define FUSED_RNN_ISA of_test
#define FUSED_RNN_VECTOR_BYTES 16
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/program_text.h"

using namespace fused_rnn;

namespace {

using FUSED_RNN_ISA::Arena;
using FUSED_RNN_ISA::F64;
using FUSED_RNN_ISA::Interpreted;
using ForwardLoop = FUSED_RNN_ISA::ForwardLoop<F64, double, Interpreted>;
using BackwardLoop = FUSED_RNN_ISA::BackwardLoop<F64, double, Interpreted>;

Problem problem(const CellDescriptor& cell, const Weights* weights, int64_t T, int64_t H, int threads) {
  Problem p{};
  p.cell = &cell, p.dtype = Dtype::f64, p.T = p.stop = T, p.B = 2, p.D = 3, p.H = p.P = H, p.R = 2, p.weights = weights,
  p.threads = threads;
  return p;
}
template <class Loop>
size_t measured(const Loop& loop, int threads) {
  Arena nothing{nullptr};
  loop.layout(nothing, threads);
  return nothing.used;
}
template <class Loop>
bool agrees(const Loop& loop, const char* what, const Problem& p) {
  const size_t expected = measured(loop, p.threads);
  std::vector<char> memory(expected + (1 << 20));
  Arena arena{memory.data()};
  loop.layout(arena, p.threads);
  if (arena.used == expected) return true;
  printf("error: %s, H %d, %d threads: %zu bytes, measured %zu\n", what, int(p.H), p.threads, arena.used, expected);
  return false;
}

}  // namespace

// argv[1]: a file with a program's text a line.
int main(int, char** argv) {
  std::ifstream file(argv[1]);
  char saved = 0;
  for (std::string text, reason; std::getline(file, text);) {
    const Program* const program = cpu::program_of(text, reason);
    if (!program) return printf("error: %s\n", reason.c_str());
    Weights w[2]{};
    w[0].direction = 1, w[1].direction = -1;
    for (const int64_t H : {15, 21, 24, 48})
      for (const int threads : {1, 2, 4}) {
        Forward f{};
        Backward b{};
        f.p = b.p = problem(program->cell, w, 20, H, threads);
        f.saved = &saved;
        if (!agrees(ForwardLoop(f), "forward", f.p) || !agrees(BackwardLoop(b), "backward", b.p)) return 1;
      }
    Forward f{};  // of few steps and many threads
    f.p = problem(program->cell, w, 16, 64, 32);
    if (const size_t bytes = measured(ForwardLoop(f), 32); program->scan_infer && bytes > 4 << 20)
      return printf("error: %zu bytes for 16 steps\n", bytes);
  }
  printf("ok\n");
  return 0;
}
