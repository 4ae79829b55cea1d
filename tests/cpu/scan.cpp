// The loops of cells that are linear in their states, in double: by many steps at once the bits of step by step. Random layers in both
// directions, with lengths and resets and without, by one thread and by three. test_scan_mistakes.py compiles it.
#define FUSED_RNN_ISA of_test
#define FUSED_RNN_VECTOR_BYTES 16
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/program_text.h"

using namespace fused_rnn;

namespace {

using Values = std::vector<double>;
using Results = std::map<std::string, Values>;
using FUSED_RNN_ISA::F64;
using FUSED_RNN_ISA::Interpreted;
constexpr size_t kPad = 32;  // the loops write whole vectors into arrays that end in one

std::mt19937_64 generator(0);
Values normal(int64_t n) {
  std::normal_distribution<double> distribution;
  Values made(size_t(n) + kPad);
  for (double& value : made) value = distribution(generator);
  return made;
}
Values nowhere(int64_t n) { return Values(size_t(n) + kPad, NAN); }
const ScanLimits kNever{int64_t(1) << 40, 0, 1};

struct Layer {
  const CellDescriptor& cell;
  Problem p{};
  Weights w[2]{};
  std::vector<Values> held;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> reset;
  Values x, dy;
  std::vector<Values> states, dstates, dsequences;

  Layer(const Program& program, int64_t T, int64_t B, int64_t H, bool masked, int threads) : cell(program.cell) {
    const int64_t D = 3, G = cell.gates;
    p.cell = &cell, p.dtype = Dtype::f64, p.T = p.stop = T, p.B = B, p.D = D, p.H = p.P = H, p.R = 2, p.weights = w, p.threads = threads;
    held.reserve(64);
    const auto hold = [&](int64_t n) { return held.emplace_back(normal(n)).data(); };
    for (int r = 0; r < 2; ++r) {
      w[r].w_ih = hold(G * H * D), w[r].b_ih = hold(G * H), w[r].direction = r == 0 ? 1 : -1;
      for (int k = 0; k < cell.params; ++k) {
        w[r].params[k] = hold(H);
        for (double& value : held.back()) value *= 0.5;
      }
    }
    for (int64_t b = 0; b < B; ++b) lengths.push_back(b == 0 ? T : b == 1 ? T / 2 : int64_t(generator() % uint64_t(T)));
    for (int64_t i = 0; i < T * B; ++i) reset.push_back(generator() % 5 == 0);
    if (masked) p.lengths = lengths.data(), p.reset = reset.data();
    x = normal(T * B * D), dy = normal(T * B * 2 * H);
    for (int j = 0; j < cell.states; ++j) {
      states.push_back(normal(2 * B * H)), dstates.push_back(normal(2 * B * H)), dsequences.push_back(normal(T * B * 2 * H));
    }
  }
  int64_t over_time() const { return p.T * p.B * p.R * p.H; }

  // Rows past a sequence's end, of which nobody reads what is kept.
  void clear(Values& kept, int64_t width) const {
    for (int64_t t = 0; t < p.T && p.lengths; ++t)
      for (int64_t b = 0; b < p.B; ++b)
        for (int64_t i = 0; i < p.R * width && t >= lengths[size_t(b)]; ++i) kept[size_t((t * p.B + b) * p.R * width + i)] = 0;
  }

  Results run(int64_t range) const {
    Results out;
    Forward f{};
    f.p = p;
    f.x = {x.data(), p.B * p.D, p.D, 0};
    f.y = (out["y"] = nowhere(over_time())).data();
    f.hidden = (out["hidden"] = nowhere(over_time())).data();
    f.saved = (out["saved"] = nowhere(over_time() * cell.saved)).data();
    f.every = 4;
    Backward g{};
    g.whole = true;
    g.dy = dy.data(), g.hidden = f.hidden, g.saved = f.saved;
    for (int j = 0; j < cell.states; ++j) {
      const std::string name = cell.state_names[j];
      f.states[j] = (out[name + " after"] = states[size_t(j)]).data();
      g.dstates[j] = (out["d" + name] = dstates[size_t(j)]).data();
      g.first[j] = states[size_t(j)].data();
      if (j == 0) continue;
      f.histories[j] = (out[name + " over time"] = nowhere(over_time())).data();
      f.checkpoints[j] = (out[name + " kept"] = nowhere((p.T + 3) / 4 * p.R * p.B * p.H)).data();
      g.histories[j] = f.histories[j], g.dsequences[j] = dsequences[size_t(j)].data();
    }
    FUSED_RNN_ISA::ForwardLoop<F64, double, Interpreted>::run(f);
    const int64_t gradients = cell.gates + cell.apart;
    g.dparams = (out["dparams"] = Values(size_t(p.R * p.B * cell.params * p.H) + kPad)).data();
    for (int64_t start = (p.T - 1) / range * range; start >= 0; start -= range) {
      g.p = p;
      g.p.start = start, g.p.stop = start + range < p.T ? start + range : p.T;
      g.dgates = (out["dgates from " + std::to_string(start)] = nowhere(range * p.B * p.R * gradients * p.H)).data();
      FUSED_RNN_ISA::BackwardLoop<F64, double, Interpreted>::run(g);
    }
    clear(out["saved"], cell.saved * p.H);
    return out;
  }
};

int compare(const Results& found, const Results& expected) {
  for (const auto& [name, values] : expected)
    for (size_t i = 0; i + kPad < values.size(); ++i) {
      const double one = found.at(name)[i], other = values[i];
      if (one == other || (std::isnan(one) && std::isnan(other))) continue;
      printf("error: %s[%zu] is %.17g, expected %.17g\n", name.c_str(), i, one, other);
      return 1;
    }
  return 0;
}

// From so many steps on, for so few vectors a thread.
bool rule() {
  const Scan scan{};
  const auto runs = [&](int64_t T, int64_t B, int64_t vectors, int64_t R, int threads) {
    Problem p{};
    p.T = T, p.B = B, p.R = R, p.threads = threads;
    return FUSED_RNN_ISA::scanned(p, vectors, &scan) == &scan;
  };
  const auto [T, few, rows] = scan_limits();
  return runs(T, 1, few, 1, 1) && runs(T, 2, few / 2, 2, 1) && !runs(T - 1, 1, 1, 1, 1) && !runs(T, 1, few + 1, 1, 1) &&
         runs(T, 2, few, 1, 2) && !runs(T, 2, few, 2, 2) && rows > 0;
}

}  // namespace

// argv[1]: a file with a program's text a line.
int main(int, char** argv) {
  if (!rule()) return puts("error: the rule"), 1;
  std::ifstream file(argv[1]);
  for (std::string text, reason; std::getline(file, text);) {
    const Program* const program = cpu::program_of(text, reason);
    if (!program || !program->scan_forward) return printf("error: %s is no scan. %s\n", text.c_str(), reason.c_str());
    for (const bool masked : {false, true})
      for (const int threads : {1, 6}) {
        const Layer layer(*program, 23, 3, 5, masked, threads);
        scan_limits() = kNever;
        const Results expected = layer.run(9);
        for (const int64_t rows : {1, 6, 100}) {
          scan_limits() = {1, int64_t(1) << 40, rows};
          if (compare(layer.run(9), expected)) return printf("masked %d threads %d rows %d\n", masked, threads, int(rows)), 1;
        }
      }
  }
  printf("ok\n");
  return 0;
}
