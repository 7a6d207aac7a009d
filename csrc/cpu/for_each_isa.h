// Kernels that are compiled once for each instruction set, and chosen where they run. A source file names its kernels
// and includes this one:
//
//     #define DRLLM_KERNELS "attention_kernel.h"
//     #include "for_each_isa.h"
//     ... DRLLM_BEST(run)(arguments) ...
//
// 4, 8 and 16 lanes; the last once more with dot products of bf16 pairs (DRLLM_DOT_BF16).
// DRLLM_KERNELS and simd.h are then included inside a namespace for each. They include nothing and instantiate nothing from
// elsewhere: an inline function of the standard library that is compiled for AVX-512 could be the one copy that the
// linker keeps for the whole program.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DRLLM_INLINE inline __attribute__((always_inline))

namespace drllm_fast::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023u;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -small : small;
}

template <int... i>
struct Sequence {};
template <int n, int... i>
struct Counting : Counting<n - 1, n - 1, i...> {};
template <int... i>
struct Counting<0, i...> {
  using Type = Sequence<i...>;
};

}  // namespace drllm_fast::cpu

#define DRLLM_LANES 4
namespace drllm_fast::cpu::baseline {
#include "simd.h"
#include DRLLM_KERNELS
}  // namespace drllm_fast::cpu::baseline
#undef DRLLM_LANES

#if defined(__x86_64__)
#define DRLLM_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace drllm_fast::cpu::avx2 {
#include "simd.h"
#include DRLLM_KERNELS
}  // namespace drllm_fast::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DRLLM_LANES

#define DRLLM_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
namespace drllm_fast::cpu::avx512 {
#include "simd.h"
#include DRLLM_KERNELS
}  // namespace drllm_fast::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define DRLLM_DOT_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif
namespace drllm_fast::cpu::avx512bf16 {
#include "simd.h"
#include DRLLM_KERNELS
}  // namespace drllm_fast::cpu::avx512bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef DRLLM_DOT_BF16
#undef DRLLM_LANES
#endif

#if defined(__x86_64__)
#define DRLLM_BEST(function)                                                                          \
  (isa() == Isa::avx512bf16 ? &avx512bf16::function                                                   \
                            : isa() == Isa::avx512 ? &avx512::function : isa() == Isa::avx2 ? &avx2::function \
                                                                                            : &baseline::function)
#else
#define DRLLM_BEST(function) (&baseline::function)
#endif
