"""The C++ of the CPU under the address and undefined-behaviour sanitizers, with every instruction set that there is.

    python -m tests.sanitize             or make sanitize
    python -m tests.sanitize --planted   first shows that they notice what is planted in the kernels

In a copy of the tree. The sanitizers' libraries are loaded in front of Python, so that what torch allocates ends where
they can see it. Leaks are not looked for: Python and torch leave much to the end of the process. Needs GCC on Linux."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.run import Tree
from tests.test_instruction_sets import LEVELS

ONCE = "tests/test_rows.py tests/test_planner.py"  # what is compiled for one instruction set
EACH = "tests/test_router.py tests/test_attention_op.py tests/test_linear.py tests/test_fuzz_ops.py"
LEFT_OUT = "-k 'not opcheck and not graph and not take_no_time'"  # torch's own compiler, and times

OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
CALL = "import torch; from drllm_fast import ops; i = lambda *n: torch.tensor(n, dtype=torch.int32); "
# (file, old text, new text, a program, what must be reported of it)
PLANTED = [
    (  # one element behind a tensor
        "csrc/cpu/fused_rows.cpp",
        "sum_of_squares(copy, columns)",
        "sum_of_squares(copy, columns + 1)",
        "ops.gather_rms_norm(torch.ones(1, 3), torch.tensor([0]), torch.ones(3), eps=1.0)",
        OVERFLOW,
    ),
    (  # one key behind the last
        "csrc/cpu/attention_decode.h",
        "smaller(j * kLanes + i, count - 1)",
        "smaller(j * kLanes + i, count)",
        "x = torch.ones(1, 3, 16); "
        "ops.ragged_attention(x[:, :1], x, x, i(0, 1), i(0), i(3), max_query=1, max_length=3)",
        OVERFLOW,
    ),
    (  # positions less a window that is no int64
        "csrc/cpu/attention.cpp",
        "std::min(window.value_or(kNoWindow), kNoWindow)",
        "window.value_or(kNoWindow)",
        "x = torch.ones(1, 70, 16); "
        "ops.ragged_attention(x[0][:, None], x, x, i(0, 70), i(0), i(70), max_query=70, max_length=70, "
        "window=2**63 - 1)",
        "runtime error: signed integer overflow",
    ),
]


def libraries():
    compiler = os.environ.get("CXX", "g++").split()[0]
    names = ("libasan.so", "libubsan.so")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    if not all(map(os.path.isabs, paths)):
        raise SystemExit(f"{compiler} has no {' and '.join(names)}; set CXX to a GCC that has")
    return " ".join(paths)


class Sanitized(Tree):
    """Compiled with the sanitizers, and run with them."""

    def __init__(self, root):
        super().__init__(root)
        self.environment |= {"DRLLM_FAST_SANITIZE": "1", "OMP_NUM_THREADS": "1"}
        self.preload = {
            "LD_PRELOAD": libraries(),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }

    def compile(self):
        for name in self.preload:
            self.environment.pop(name, None)
        super().compile()
        self.environment |= self.preload


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--planted", action="store_true", help="first show that planted errors are reported")
    parser.add_argument("-n", default="2", help="how many tests run at once")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Sanitized(Path(folder) / "tree")
        if options.planted:
            for file, old, new, *_ in PLANTED:
                text = (tree.root / file).read_text()
                assert text.count(old) == 1, old
                (tree.root / file).write_text(text.replace(old, new))
            tree.compile()
            for file, old, new, program, report in PLANTED:
                ran = tree.run("-c", CALL + program)
                if ran.returncode == 0 or report not in ran.stdout:
                    raise SystemExit(f"{file}: {old} -> {new} is not reported as {report}:\n{ran.stdout}")
                print(f"{file}: {old} -> {new}: {report}", flush=True)
                (tree.root / file).write_text((tree.root / file).read_text().replace(new, old))
        tree.compile()
        best = tree.run("-c", "import torch; from drllm_fast import _C; print(_C.isa())").stdout.split()[-1]
        for level in LEVELS[LEVELS.index(best) :: -1]:
            tree.environment["DRLLM_FAST_ISA"] = level
            ran = tree.test(f"-n {options.n} {ONCE if level == best else ''} {EACH} {LEFT_OUT}")
            print(f"{level}: {ran.stdout.strip().splitlines()[-1]}", flush=True)
            if ran.returncode:
                raise SystemExit(ran.stdout)
    used = os.times()
    print(f"{used.children_user + used.children_system:.0f} s of CPU, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
