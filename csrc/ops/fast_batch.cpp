#include "fast_batch.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "../cpu/isa.h"

namespace fused_rnn::ops {
namespace {

// What copies of a row of x and y cost at least, and by their bytes: as measured, and as `microseconds_of` overrates a row.
constexpr double kMicrosecondsACopy = 0.005, kMicrosecondsAByte = 0.00003;

constexpr size_t kLine = 64, kMostKept = size_t(32) << 20;  // as the loops' scratch

// What a thread keeps for its next call.
struct Kept {
  std::unique_ptr<char[]> memory;
  size_t size = 0;
};
Kept& kept() {
  static thread_local Kept own;
  return own;
}

PyObject* packed_type;  // written once, at import

// Are all of them lengths of a sequence of T steps?
bool within(const int64_t* lengths, int64_t B, int64_t T) {
  for (int64_t b = 0; b < B; ++b)
    if (lengths[b] < 0 || lengths[b] > T) return false;
  return true;
}

// Never growing, down to one, of so many rows in all?
bool are_batch_sizes(const int64_t* sizes, int64_t T, int64_t rows) {
  int64_t sum = 0, before = sizes[0];
  for (int64_t t = 0; t < T; before = sizes[t++]) {
    if (sizes[t] < 1 || sizes[t] > before) return false;
    sum += sizes[t];
  }
  return sum == rows;
}

bool is_inverse(const int64_t* order, const int64_t* back, int64_t B) {
  for (int64_t b = 0; b < B; ++b)
    if (order[b] < 0 || order[b] >= B || back[order[b]] != b) return false;
  return true;
}

}  // namespace

// Taken away from the thread, for while results are made Python may call another module in it.
Memory::Memory() : kept_(std::move(kept().memory)), size_(std::exchange(kept().size, 0)) {}

Memory::~Memory() {
  if (used_ > size_ && used_ <= kMostKept) {
    kept_.reset(new (std::nothrow) char[used_]);
    size_ = kept_ ? used_ : 0;
  }
  kept() = {std::move(kept_), size_};
}

void* Memory::bytes(size_t count) {
  const size_t from = used_;
  used_ += (count + 2 * kLine - 1) / kLine * kLine;
  char* piece;
  if (used_ <= size_) {
    piece = kept_.get() + from;
  } else {
    piece = new (std::nothrow) char[used_ - from];
    pieces_[count_++].reset(piece);
    if (!piece) return PyErr_NoMemory();
  }
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(piece) + kLine - 1) / kLine * kLine);
}

void use_packed(PyObject* type) {
  Py_INCREF(type);  // for good
  packed_type = type;
}

PyObject* packed_as(PyObject* like, PyObject* data) {
  PyObject* const fields = PyTuple_Pack(4, data, PyTuple_GET_ITEM(like, 1), PyTuple_GET_ITEM(like, 2), PyTuple_GET_ITEM(like, 3));
  Py_DECREF(data);
  const Owned arguments{fields ? PyTuple_Pack(1, fields) : nullptr};
  Py_XDECREF(fields);
  return arguments.object ? PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(packed_type), arguments.object, nullptr) : nullptr;
}

bool Batch::read(PyObject* input, int axis, Memory& memory) {
  data = input;
  if (axis < 0) {
    if (!ops::read(data, x, 2, -1, -1)) return false;
    B = x.shape[0];
  } else if (reinterpret_cast<PyObject*>(Py_TYPE(input)) == packed_type) {
    if (PyTuple_GET_SIZE(input) != 4) return false;
    packed = input;
    data = PyTuple_GET_ITEM(input, 0);
    PyObject *const sorted = PyTuple_GET_ITEM(input, 2), *const unsorted = PyTuple_GET_ITEM(input, 3);
    dlpack::Tensor sizes, there, back;
    if (!ops::read(data, x, 2, -1, -1) || !read_integers(PyTuple_GET_ITEM(input, 1), sizes, -1)) return false;
    const auto* const each = static_cast<const int64_t*>(sizes.data);
    T = sizes.shape[0], B = each[0];
    if (!are_batch_sizes(each, T, x.shape[0])) return false;
    if (sorted != Py_None || unsorted != Py_None) {
      if (!read_integers(sorted, there, B) || !read_integers(unsorted, back, B)) return false;
      order = static_cast<const int64_t*>(there.data);
      if (!is_inverse(order, static_cast<const int64_t*>(back.data), B)) return false;
    }
    if (each[T - 1] < B) {
      batch_sizes = each;
      int64_t* const ends = memory.take<int64_t>(B);
      if (!ends) return false;
      for (int64_t t = T, b = 0; b < B; ++b) {
        while (each[t - 1] <= b) --t;
        ends[b] = t;
      }
      lengths = ends;
    }
  } else if (ops::read(input, x, 3, -1, -1, -1)) {
    T = x.shape[axis], B = x.shape[1 - axis];
    batch_first = axis == 1 && B > 1 && T > 1;
  } else {
    if (!ops::read(input, x, 2, -1, -1)) return false;
    unbatched = true;
    T = x.shape[0];
  }
  D = x.shape[x.ndim - 1];
  return true;
}

bool Batch::read_lengths(PyObject* given) {
  dlpack::Tensor t;
  if (packed || unbatched || !read_integers(given, t, B)) return false;
  lengths = static_cast<const int64_t*>(t.data);
  return within(lengths, B, T);
}

bool Batch::read_reset(PyObject* given, int axis, Memory& memory, const uint8_t*& flags) const {
  dlpack::Tensor t;
  const int64_t rows = axis ? B : T, columns = axis ? T : B;
  if (unbatched || !read_bools(given, t, rows, columns)) return false;
  const auto* const own = flags = static_cast<const uint8_t*>(t.data);
  if (rows == 1 || columns == 1 ? !order : !axis && !order) return true;
  uint8_t* turned = memory.take<uint8_t>(T * B);
  if (!turned) return false;
  flags = turned;
  for (int64_t s = 0; s < T; ++s)
    for (int64_t b = 0; b < B; ++b) {
      const int64_t from = order ? order[b] : b;
      *turned++ = own[axis ? from * T + s : s * B + from];
    }
  return true;
}

bool Batch::sort(double microseconds, size_t bytes, Memory& memory) {
  if (!lengths || packed) return true;
  int64_t rows = 0, left_out = 0;  // rows that the loop would run, and of those the ones that it then leaves out
  for (int64_t b = B, most = 0; b-- > 0; rows += most) {
    most = std::max(most, lengths[b]);
    left_out += most - lengths[b];
  }
  if (double(left_out) * microseconds < double(rows - left_out) * (kMicrosecondsACopy + double(bytes) * kMicrosecondsAByte)) return true;
  int64_t *const sorted = memory.take<int64_t>(B), *const ends = memory.take<int64_t>(B);
  if (!sorted || !ends) return false;
  for (int64_t b = 0; b < B; ++b) sorted[b] = (T - lengths[b]) * B + b;
  std::sort(sorted, sorted + B);
  for (int64_t b = 0; b < B; ++b) sorted[b] %= B;
  // A lone row is summed in other parts (gemm.h). So that the results are those in the caller's order, the longest is alone at the end if
  // it is the first there.
  if (sorted[0] != 0) std::swap(sorted[0], sorted[1]);
  for (int64_t b = 0; b < B; ++b) ends[b] = lengths[sorted[b]];
  order = sorted;
  lengths = ends;
  return true;
}

void Batch::to_loop(char* rows, size_t bytes) const {
  const char* from = static_cast<const char*>(x.data);
  const size_t row = size_t(batch_first ? T : 1) * bytes, step = size_t(batch_first ? 1 : B) * bytes;
  for (int64_t t = 0; t < T; ++t, rows += size_t(B) * bytes) {
    if (packed) {
      memcpy(rows, from, size_t(batch_sizes[t]) * bytes);
      from += size_t(batch_sizes[t]) * bytes;
      continue;
    }
    for (int64_t b = 0; b < B; ++b)
      if (t < lengths[b]) memcpy(rows + size_t(b) * bytes, from + size_t(t) * step + size_t(order[b]) * row, bytes);
  }
}

void Batch::from_loop(const char* rows, size_t bytes, char* y) const {
  for (int64_t t = 0; t < T; ++t, rows += size_t(B) * bytes) {
    if (packed) {
      memcpy(y, rows, size_t(batch_sizes[t]) * bytes);
      y += size_t(batch_sizes[t]) * bytes;
      continue;
    }
    for (int64_t b = 0; b < B; ++b) {
      char* const to = y + size_t(t * B + order[b]) * bytes;
      if (t < lengths[b]) memcpy(to, rows + size_t(b) * bytes, bytes);
      else memset(to, 0, bytes);
    }
  }
}

namespace {

size_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// n numbers of `from` as `to`, one of which is the other's accumulation dtype.
void convert(Dtype from, Dtype to, const char* numbers, char* out, int64_t n) {
  if (from == to) memcpy(out, numbers, size_t(n) * bytes_of(from));
  else cpu::kernels().convert(from, to, numbers, out, n);
}
Dtype wide(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

}  // namespace

void Batch::states_to_loop(Dtype dtype, const void* given, void* out, int64_t rows, int64_t width) const {
  const size_t from = size_t(width) * bytes_of(dtype), to = size_t(width) * bytes_of(wide(dtype));
  const auto* in = static_cast<const char*>(given);
  auto* made = static_cast<char*>(out);
  if (!order) return convert(dtype, wide(dtype), in, made, rows * B * width);
  for (int64_t r = 0; r < rows; ++r, in += size_t(B) * from)
    for (int64_t b = 0; b < B; ++b, made += to) convert(dtype, wide(dtype), in + size_t(order[b]) * from, made, width);
}

void Batch::states_from_loop(Dtype dtype, const void* states, void* out, int64_t rows, int64_t width) const {
  const size_t from = size_t(width) * bytes_of(wide(dtype)), to = size_t(width) * bytes_of(dtype);
  const auto* in = static_cast<const char*>(states);
  auto* made = static_cast<char*>(out);
  if (!order) return convert(wide(dtype), dtype, in, made, rows * B * width);
  for (int64_t r = 0; r < rows; ++r, made += size_t(B) * to)
    for (int64_t b = 0; b < B; ++b, in += from) convert(wide(dtype), dtype, in, made + size_t(order[b]) * to, width);
}

}  // namespace fused_rnn::ops
