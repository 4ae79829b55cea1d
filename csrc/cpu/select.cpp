#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_rnn::cpu {

extern const Kernels baseline;
#if defined(__x86_64__)
[[gnu::weak]] extern const Kernels avx2, avx512, avx512bf16, amx;  // null where they were not built

namespace {
// Every flag an ISA's file is compiled with is asked for (setup.py lists them).
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"); }
bool has_amx() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM; the kernel grants tiles only on request
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has_avx512bf16() && tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
}  // namespace
#endif

namespace {
struct Choice {
  const Kernels* best = nullptr;
  std::string all;
  Choice() {
    const char* wanted = std::getenv("FUSED_RNN_ISA");
    const Kernels* named = nullptr;
    auto offer = [&](const Kernels* k, bool runs) {
      if (!k || !runs) return;
      all += (all.empty() ? "" : ", ") + std::string(k->name);
      if (!best) best = k;
      if (wanted && !std::strcmp(wanted, k->name)) named = k;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    offer(&amx, has_amx());
    offer(&avx512bf16, has_avx512bf16());
    offer(&avx512, has_avx512());
    offer(&avx2, has_avx2());
#endif
    offer(&baseline, true);
    if (wanted && *wanted && !named)
      throw std::runtime_error("FUSED_RNN_ISA=" + std::string(wanted) + ": this build on this processor runs " + all);
    if (named) best = named;
  }
};
const Choice& choice() {
  static const Choice c;
  return c;
}
}  // namespace

const Kernels& kernels() { return *choice().best; }
const char* available_isas() { return choice().all.c_str(); }

}  // namespace fused_rnn::cpu
