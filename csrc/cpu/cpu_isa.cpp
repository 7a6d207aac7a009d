// Which instruction set the kernels of csrc/cpu run with.
#include "cpu_isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace drllm_fast::cpu {
namespace {

Isa found() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

// DRLLM_FAST_ISA asks for less than there is, so that every level can be tested on one machine.
Isa chosen() {
  const Isa best = found();
  const char* asked = std::getenv("DRLLM_FAST_ISA");
  if (asked == nullptr) return best;
  for (int level = 0; level <= static_cast<int>(best); ++level)
    if (std::strcmp(asked, name(static_cast<Isa>(level))) == 0) return static_cast<Isa>(level);
  throw std::invalid_argument(std::string("DRLLM_FAST_ISA=") + asked + ": this processor has baseline to " + name(best));
}

}  // namespace

Isa isa() {
  static const Isa best = chosen();
  return best;
}

const char* name(Isa level) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  return names[static_cast<int>(level)];
}

}  // namespace drllm_fast::cpu
