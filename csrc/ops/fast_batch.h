// The batch of a call: how its sequences lie in memory, and the order in which the loop takes them.
#pragma once
#include <Python.h>

#include <memory>

#include "../params.h"
#include "dlpack_view.h"

namespace fused_rnn::ops {

// Memory of one call, in pieces. What a call took the thread's next one finds: new pages cost more than what is copied into them.
class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  // Null, with an exception set, where there is none.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(size_t(count) * sizeof(T)));
  }

 private:
  void* bytes(size_t count);

  static constexpr int kMost = 8 + kMostStates;
  std::unique_ptr<char[]> kept_, pieces_[kMost];  // pieces: of what goes past what is kept
  size_t size_, used_ = 0;
  int count_ = 0;
};

struct Batch {
  PyObject* data = nullptr;  // x, or what is packed in it
  dlpack::Tensor x{};
  int64_t T = 1, B = 1, D = 0;
  bool unbatched = false, batch_first = false;  // batch_first: x is [B, T, D], and not at the same time [T, B, D]
  const int64_t* batch_sizes = nullptr;  // of packed sequences that are not equally long: how many reach each step
  const int64_t* lengths = nullptr;      // of the loop's sequences
  const int64_t* order = nullptr;        // sequence b of the loop is the caller's order[b]; null: they have the caller's order
  PyObject* packed = nullptr;            // the PackedSequence

  // axis: of time, -1 in a step. False where x, or what else is given, is out of the ordinary, or with an exception set.
  bool read(PyObject* input, int axis, Memory& memory);
  bool read_lengths(PyObject* given);
  // given: laid out as x. flags: [T, B] of the loop's sequences.
  bool read_reset(PyObject* given, int axis, Memory& memory, const uint8_t*& flags) const;

  // Puts sequences of a padded batch longest first where the rows that the loop then leaves out are worth copies of x and y. microseconds:
  // of a row. bytes: of a row of x and of y.
  bool sort(double microseconds, size_t bytes, Memory& memory);

  // Whether the loop has copies of x and y.
  bool copies() const { return batch_sizes || (order && !packed); }
  // Rows of so many bytes: x to the loop's [T, B], without what lies past a sequence's end; y from there.
  void to_loop(char* rows, size_t bytes) const;
  void from_loop(const char* rows, size_t bytes, char* y) const;
  // A state [rows, B, width] of the caller's sequences in this dtype to one of the loop's in the accumulation dtype, and back.
  void states_to_loop(Dtype dtype, const void* given, void* wide, int64_t rows, int64_t width) const;
  void states_from_loop(Dtype dtype, const void* wide, void* made, int64_t rows, int64_t width) const;
};

// The type of packed sequences. At import.
void use_packed(PyObject* type);
// A PackedSequence as `like` is, of other data; takes over the reference.
PyObject* packed_as(PyObject* like, PyObject* data);

}  // namespace fused_rnn::ops
