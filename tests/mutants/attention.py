"""Mutants of attention on the CPU."""

CPP, KERNEL, SIMD = "csrc/cpu/attention.cpp", "csrc/cpu/attention_kernel.h", "csrc/cpu/simd.h"
PREFILL, DECODE = "csrc/cpu/attention_prefill.h", "csrc/cpu/attention_decode.h"
TESTS = "tests/test_attention_op.py"

MUTANTS = [
    # what is checked, and how it is split into tasks and parts
    (CPP, "std::max<int64_t>(0, past + 1 - a.window)", "std::max<int64_t>(0, past - a.window)", TESTS),
    (CPP, "std::min(task.first_key + kKeysOfTask, parts.task.last_key)", "task.first_key + kKeysOfTask", TESTS),
    (CPP, "tile.position += first;", "", TESTS),
    (
        CPP,
        "std::max(static_cast<float>(*softcap), std::numeric_limits<float>::min())",
        "static_cast<float>(*softcap)",
        TESTS,
    ),
    # masks, rescaling, sinks, tails of many queries
    (PREFILL, "(key <= end) & (key > begin)", "(key <= end)", TESTS),
    (PREFILL, "l[r + i] = l[r + i] * rescale[i] + sum(added);", "l[r + i] += sum(added);", TESTS),
    (PREFILL, "if (at * 2 + i < size) bits |=", "if (at * 2 < size) bits |=", TESTS),
    (PREFILL, "half < 2 && key + half < count; ++half", "half < 2; ++half", TESTS),
    # one query
    (DECODE, "key < static_cast<int32_t>(count) ? s : broadcast(-kInfinity)", "s", TESTS),
    (
        KERNEL,
        "to[a.dim_v + 1] = to[a.dim_v + 1] * mine + from[a.dim_v + 1] * theirs;",
        "to[a.dim_v + 1] += from[a.dim_v + 1];",
        TESTS,
    ),
    (SIMD, "bits + 0x7fff + ((bits >> 16) & 1)", "bits", TESTS),
    (SIMD, "return x < -126.0f ? Floats{} : result;", "return result;", TESTS),
    # a NaN, and scores of minus infinity
    (SIMD, "larger(broadcast(-126.0f), x)", "larger(x, broadcast(-126.0f))", TESTS),
    (SIMD, "x != x ? x : (x < 0.0f", "(x < 0.0f", TESTS),
    (KERNEL, "return top == -kInfinity ? 0 : top;", "return top;", TESTS),
]
