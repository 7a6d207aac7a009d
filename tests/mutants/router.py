"""Mutants of the router on the CPU. Some show on some instruction sets only: 4 lanes have no groups of 8 windows."""

CPP, KERNEL, SIMD = "csrc/cpu/router.cpp", "csrc/cpu/router_kernel.h", "csrc/cpu/simd.h"
TESTS = "tests/test_router.py"
BASELINE = "tests/test_instruction_sets.py -k baseline"

MUTANTS = [
    # what is checked, pooled, decided and shared
    (CPP, "check_value(end[row] <= end[row + 1], ", "check_value(true, ", TESTS),
    (CPP, "(end[row] + window * size) * row_bytes", "(end[row] + window) * row_bytes", TESTS),
    (CPP, "out[2] > out[1] && out[2] > out[0]", "out[2] > out[1] && out[2] >= out[0]", TESTS),
    (CPP, "{ pool_some(row, pooled, from, to); }", "{ pool_some(row, pooled, 0, to - from); }", TESTS),
    # sums of 64 tokens, columns behind the last vector, windows and units behind the last
    (
        KERNEL,
        "const int64_t last = first + 64 < count ? first + 64 : count;",
        "const int64_t last = first + 64;",
        TESTS,
    ),
    (KERNEL, "  store(to + d, Floats{});\n  for (; d < dim", "  for (; d < dim", TESTS),
    (KERNEL, "window + w < windows ? window + w : windows - 1", "window", TESTS),
    (KERNEL, "d < dim; ++d) left[d - dense]", "d + 1 < dim; ++d) left[d - dense]", TESTS),
    # fp16 without an instruction for it
    (
        SIMD,
        "for (int i = 0; i < kLanes; ++i) v[i] = widen(from[i]);",
        "for (int i = 0; i < kLanes; ++i) v[i] = from[i].bits;",
        BASELINE,
    ),
]
