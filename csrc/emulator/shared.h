// Shared memory: one arena for all resident CTAs, filled with NaN, with redzones between them that AddressSanitizer
// knows; a plain build looks at the redzones when the CTA ends.
#pragma once
#include <cstring>
#include <string>

#include "scheduler.h"

namespace fused_rnn::emulator {

constexpr size_t kMostShared = 227 << 10;  // of a CTA on sm_90 and sm_100
constexpr size_t kArenaRedzone = 128;
constexpr unsigned char kNan = 0xFF;  // every format reads a row of these as NaN

// Grows and is kept, because mapping fresh pages costs more than a small launch.
inline void prepare_arena(size_t ctas) {
  machine.shared_stride = (machine.shared_bytes + 2 * kArenaRedzone - 1) / kArenaRedzone * kArenaRedzone;
  const size_t bytes = machine.shared_stride * ctas;
  if (bytes > machine.arena_bytes) {
    if (machine.arena) munmap(machine.arena, machine.arena_bytes);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for shared memory");
    machine.arena = static_cast<unsigned char*>(p);
    machine.arena_bytes = bytes;
  }
  unpoison(machine.arena, machine.arena_bytes);
  std::memset(machine.arena, kNan, bytes);
  poison(machine.arena, machine.arena_bytes);
}

FUSED_RNN_EMULATOR_RAW inline void check_redzone(const Cta& cta) {
  for (size_t i = machine.shared_bytes; i < machine.shared_stride; ++i)
    if (cta.shared[i] != kNan) fail("a write past the end of shared memory, at byte " + std::to_string(i));
}

// All of it becomes accessible. shared_array opens one array alone, so that gaps between arrays stay traps.
FUSED_RNN_EMULATOR_RAW inline unsigned char* shared_memory() {
  Inside guard;
  unsigned char* base = machine.current->cta->shared;
  unpoison(base, machine.shared_bytes);
  return base;
}

FUSED_RNN_EMULATOR_RAW inline unsigned char* shared_array(size_t offset, size_t bytes) {
  Inside guard;
  if (offset + bytes > machine.shared_bytes)
    fail("shared_array: bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) + " lie outside the launch's " +
         std::to_string(machine.shared_bytes) + " bytes of shared memory");
  unsigned char* base = machine.current->cta->shared + offset;
  unpoison(base, bytes);
  return base;
}

FUSED_RNN_EMULATOR_RAW inline bool in_arena(const void* p) {
  return p >= machine.arena && p < machine.arena + machine.shared_stride * machine.ctas.size();
}

FUSED_RNN_EMULATOR_RAW inline Cta* owner_of(const void* p) {
  if (!in_arena(p)) fail("the address is not in shared memory");
  return machine.ctas[size_t(static_cast<const unsigned char*>(p) - machine.arena) / machine.shared_stride];
}

inline void check_aligned(const char* instruction, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(std::string(instruction) + ": misaligned address, not a multiple of " + std::to_string(bytes));
}

// What a plain access would trap on: the primitives move bytes behind AddressSanitizer's back.
FUSED_RNN_EMULATOR_RAW inline void check_accessible([[maybe_unused]] const char* instruction, [[maybe_unused]] const void* p,
                                                    [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (__asan_region_is_poisoned(const_cast<void*>(p), bytes)) fail(std::string(instruction) + ": an address outside its array");
#endif
}

FUSED_RNN_EMULATOR_RAW inline void check_shared(const char* instruction, const void* p, size_t bytes, size_t alignment) {
  check_aligned(instruction, p, alignment);
  const Cta* cta = owner_of(p);
  const size_t offset = size_t(static_cast<const unsigned char*>(p) - cta->shared);
  if (offset + bytes > machine.shared_bytes) fail(std::string(instruction) + ": an address past the end of shared memory");
  if (cta->live == 0) fail(std::string(instruction) + ": shared memory of a CTA that has exited");
  check_accessible(instruction, p, bytes);
}

// A null source stands for zeros.
FUSED_RNN_EMULATOR_RAW inline void raw_copy(unsigned char* destination, const unsigned char* source, int bytes = kCopyBytes) {
  if (source) __builtin_memcpy(destination, source, size_t(bytes));
  else __builtin_memset(destination, 0, size_t(bytes));
}

FUSED_RNN_EMULATOR_RAW inline void raw_fill(unsigned char* destination, int bytes = kCopyBytes) {
  __builtin_memset(destination, kNan, size_t(bytes));
}

}  // namespace fused_rnn::emulator
