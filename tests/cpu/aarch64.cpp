// The CPU kernels without torch: reads layers with their inputs, writes outputs and gradients. test_aarch64.py compiles it for another
// processor, runs it in an emulator of one, and judges the numbers.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cells/all.h"
#include "cpu/isa.h"

using namespace fused_rnn;

namespace {

using Bytes = std::vector<char>;
constexpr size_t kPad = 256;  // after an array: the kernels write whole vectors into arrays that end in one

struct Header {
  int64_t cell, dtype, T, B, D, H, P, R, bias, lengths, reset, threads;
};

FILE *in, *out;

int64_t size_of(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }
Dtype wide_of(Dtype d) { return d == Dtype::f64 ? d : Dtype::f32; }

Bytes room(int64_t n, Dtype d) { return Bytes(size_t(n * size_of(d)) + kPad); }
Bytes read(int64_t bytes) {
  Bytes data(size_t(bytes) + kPad);
  if (fread(data.data(), 1, size_t(bytes), in) != size_t(bytes)) exit(2);
  return data;
}
void write(const void* data, int64_t bytes) { fwrite(data, 1, size_t(bytes), out); }

// As the accumulation dtype has it.
Bytes widened(const Bytes& narrow, int64_t n, Dtype d) {
  if (size_of(d) >= 4) return narrow;
  Bytes wide = room(n, Dtype::f32);
  cpu::kernels().convert(d, Dtype::f32, narrow.data(), wide.data(), n);
  return wide;
}

// A weight's gradient in the accumulation dtype, its rows rounded up to whole vectors, or, with columns = 0, a bias's in double.
struct Gradient {
  int64_t rows, columns, stride;
  Dtype type;
  Bytes data;
  Gradient(int64_t rows, int64_t width, Dtype wide) : rows(rows), columns(width ? width : 1), type(width ? wide : Dtype::f64) {
    const int64_t pad = width ? cpu::kernels().products_pad / size_of(type) : 1;
    stride = (columns + pad - 1) / pad * pad;
    data = room(rows * stride, type);
  }
  void write_to_file() const {
    for (int64_t i = 0; i < rows; ++i) write(data.data() + i * stride * size_of(type), columns * size_of(type));
  }
};

void run(const Header& k) {
  const Dtype d = Dtype(k.dtype), wide = wide_of(d);
  const CellDescriptor& cell = kCells.of[k.cell];
  const bool projects = k.P != k.H;
  const int64_t e = size_of(d), TB = k.T * k.B, rows = cell.gates * k.H;

  std::vector<Bytes> arrays;
  auto next = [&](int64_t n) {
    arrays.push_back(read(n * e));
    return static_cast<const void*>(arrays.back().data());
  };
  arrays.reserve(size_t(5 * k.R));
  std::vector<Weights> weights(k.R);
  for (int64_t r = 0; r < k.R; ++r) {
    Weights& w = weights[size_t(r)];
    w.w_ih = next(rows * k.D), w.w_hh = next(rows * k.P);
    w.b_ih = k.bias ? next(rows) : nullptr, w.b_hh = k.bias ? next(rows) : nullptr;
    w.w_hr = projects ? next(k.P * k.H) : nullptr;
    w.direction = r ? -1 : 1;
  }
  const auto size = [&](int state) { return k.R * k.B * (state == 0 ? k.P : k.H); };
  const auto read_states = [&] {
    std::vector<Bytes> states;
    for (int i = 0; i < cell.states; ++i) states.push_back(read(size(i) * e));
    return states;
  };
  const Bytes x = read(TB * k.D * e);
  const std::vector<Bytes> initial = read_states();
  const Bytes lengths = read(k.lengths ? 8 * k.B : 0), reset = read(k.reset ? TB : 0);
  const Bytes dy = read(TB * k.R * k.P * e);
  const std::vector<Bytes> dstates = read_states();

  Problem p{&cell, d, k.T, k.B, k.D, k.H, k.P, k.R, 0, k.T, weights.data(), nullptr, nullptr, int(k.threads)};
  if (k.lengths) p.lengths = reinterpret_cast<const int64_t*>(lengths.data());
  if (k.reset) p.reset = reinterpret_cast<const uint8_t*>(reset.data());

  Bytes y = room(TB * k.R * k.P, d), hidden = y, saved = room(TB * k.R * cell.saved * k.H, d);
  std::vector<Bytes> first, after, d_after, histories;
  for (int i = 0; i < cell.states; ++i) {
    first.push_back(widened(initial[size_t(i)], size(i), d));
    d_after.push_back(widened(dstates[size_t(i)], size(i), d));
    histories.push_back(room(TB * k.R * k.H, d));
  }
  after = first;
  const auto write_states = [&](const std::vector<Bytes>& states) {
    for (int i = 0; i < cell.states; ++i) write(states[size_t(i)].data(), size(i) * size_of(wide));
  };
  Forward f{};
  f.p = p;
  f.x = {x.data(), k.B * k.D, k.D, 0};
  f.y = y.data(), f.hidden = hidden.data(), f.saved = saved.data();
  for (int i = 0; i < cell.states; ++i) f.states[i] = after[size_t(i)].data(), f.histories[i] = histories[size_t(i)].data();
  cpu::kernels().forward(f);
  write(y.data(), TB * k.R * k.P * e);
  write_states(after);

  Bytes dgates = room(TB * k.R * (cell.gates + cell.apart) * k.H, d), dprojected = room(TB * k.R * k.P, d),
        unprojected = room(TB * k.R * k.H, d);
  Backward b{};
  b.p = p;
  b.dy = dy.data(), b.hidden = hidden.data(), b.saved = saved.data(), b.whole = true;
  for (int i = 0; i < cell.states; ++i) {
    b.histories[i] = histories[size_t(i)].data();
    b.first[i] = first[size_t(i)].data();
    b.dstates[i] = d_after[size_t(i)].data();
  }
  b.dgates = dgates.data(), b.need_dh = true;
  if (projects) b.dprojected = dprojected.data(), b.unprojected = unprojected.data();
  cpu::kernels().backward(b);

  std::vector<std::vector<Gradient>> gradients(5);
  std::vector<std::vector<void*>> places(5);
  const int64_t widths[] = {k.D, k.P, 0, 0, k.H}, depths[] = {rows, rows, rows, rows, k.P};
  for (size_t i = 0; i < 5; ++i)
    for (int64_t r = 0; r < k.R; ++r) gradients[i].emplace_back(depths[i], widths[i], wide);
  for (size_t i = 0; i < 5; ++i)
    for (Gradient& gradient : gradients[i]) places[i].push_back(gradient.data.data());
  Bytes dx = room(TB * k.D, d);
  Products q{};
  q.p = p;
  q.dgates = dgates.data(), q.x = f.x, q.hidden = hidden.data(), q.h0 = initial[0].data();
  q.dw_ih = places[0].data(), q.dw_hh = places[1].data();
  if (k.bias) q.db_ih = places[2].data(), q.db_hh = places[3].data();
  if (projects) q.dprojected = dprojected.data(), q.unprojected = unprojected.data(), q.dw_hr = places[4].data();
  q.dx = dx.data(), q.add_dx = k.R > 1, q.first = true;
  cpu::kernels().products(q);
  write(dx.data(), TB * k.D * e);
  write_states(d_after);
  for (int64_t r = 0; r < k.R; ++r)
    for (size_t i = 0; i < 5; ++i)
      if (i < 2 || (i < 4 && k.bias) || (i == 4 && projects)) gradients[i][size_t(r)].write_to_file();
}

}  // namespace

int main(int, char** arguments) {
  in = fopen(arguments[1], "rb"), out = fopen(arguments[2], "wb");
  if (!in || !out) return 1;
  for (Header k; fread(&k, sizeof k, 1, in) == 1;) run(k);
  return fclose(out);
}
