#include "packed.h"

#include <cstdlib>
#include <stdexcept>

#include "../cpu/isa.h"
#include "../cpu/team.h"

namespace fused_rnn::ops {

void Packed::Free::operator()(void* memory) const { std::free(memory); }

Packed::Packed(const Problem& problem, int64_t layers, int64_t directions, bool projects, Narrow narrow)
    : problem_(problem), layers_(layers), projects_(projects), narrow_(narrow) {
  problem_.R = directions;
  panels_.resize(size_t(layers * directions));
  addresses_.resize(panels_.size());
}

void Packed::give(int64_t l, Weights* w, Forward& f) const {
  const Problem& of = problem_;
  f.p.cell = of.cell, f.p.dtype = of.dtype;
  f.p.D = l > 0 ? of.R * of.P : of.D;
  f.p.H = of.H, f.p.P = of.P, f.p.R = of.R;
  f.p.weights = w;
  f.packed = &addresses_[size_t(l * of.R)];
  f.narrow = narrow_;
  for (int64_t r = 0; r < of.R; ++r) {
    w[r] = {};  // all packed; the loop asks whether there is a projection
    w[r].w_hr = projects_ ? f.packed[r] : nullptr;
    w[r].direction = r == 0 ? 1 : -1;
  }
}

void Packed::pack(const std::vector<WeightAddresses>& recurrences) {
  bytes_ = 0;
  for (size_t i = 0; i < panels_.size(); ++i) {
    const size_t matrices = size_t(problem_.cell->matrices), params = size_t(problem_.cell->params);
    const WeightAddresses& given = recurrences.at(i);
    if (given.size() != 5 + matrices + params)
      throw std::invalid_argument("weights: expected five addresses and one of each matrix and param");
    const auto w = [&](size_t k) { return reinterpret_cast<const void*>(given[k]); };
    Weights weights{w(0), w(1), w(2), w(3), w(4), 1, {}, {}, {}, {}};
    for (size_t k = 0; k < matrices; ++k) weights.matrices[k] = w(5 + k);
    for (size_t k = 0; k < params; ++k) weights.params[k] = w(5 + matrices + k);
    Problem p = problem_;
    if (i >= size_t(p.R)) p.D = p.R * p.P;
    p.R = 1;
    p.weights = &weights;
    p.threads = 1;
    int64_t bytes = 0;
    Packing packing{p, narrow_, nullptr, &bytes};
    cpu::kernels().pack(packing);
    if (!panels_[i]) {
      panels_[i].reset(cpu::pages(size_t(bytes)));
      addresses_[i] = panels_[i].get();
    }
    packing.packed = panels_[i].get();
    cpu::kernels().pack(packing);
    bytes_ += bytes;
  }
}

}  // namespace fused_rnn::ops
