"""Mutants of the linear layers with packed weights."""

CPP, KERNEL = "csrc/cpu/linear.cpp", "csrc/cpu/linear_kernel.h"
TESTS = "tests/test_linear.py"

MUTANTS = [
    (CPP, "(features + columns - 1) / columns == count", "true", TESTS),
    (CPP, "const int64_t row = c * chunk", "const int64_t row = c * (chunk - 1)", TESTS),
    (CPP, "if (l.widens && widened != c) DRLLM", "if (l.widens && widened < 0) DRLLM", TESTS),
    (CPP, "check_value(panels.is_contiguous(),", "check_value(true,", TESTS),
    (
        KERNEL,
        "feature < features ? weight[feature * stride + k] : T{}",
        "weight[feature % features * stride + k]",
        TESTS,
    ),
    (KERNEL, "x + r * stride + k, stride, floats, steps", "x + r * stride, stride, floats, steps", TESTS),
    (KERNEL, "l.depth - k < kDepth ? l.depth - k : kDepth", "kDepth", TESTS),
    (KERNEL, "for (; k < depth; ++k) to[k] = widen(from[k]);", "", TESTS),
    (KERNEL, "columns - i < kLanes ? columns - i : kLanes", "kLanes", TESTS),
    (KERNEL, "if (l.bias) v = v + bias[i / kLanes];", "if (l.bias) v = v + bias[0];", TESTS),
    (KERNEL, "if (count == rows) return multiply<rows>(acc", "if (count >= rows - 1) return multiply<rows>(acc", TESTS),
]
