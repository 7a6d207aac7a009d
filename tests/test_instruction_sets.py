"""The kernels of the CPU, once more for every instruction set that this processor has beside its best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drllm_fast import ops

LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]
FILES = ["tests/test_router.py", "tests/test_attention_op.py", "tests/test_linear.py"]
pytestmark = pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=f"no extension: {ops.EXTENSION_ERROR}")


def run(level, *command):
    environment = {**os.environ, "DRLLM_FAST_ISA": level}
    environment.pop("PYTEST_XDIST_WORKER", None)
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)


def best():
    from drllm_fast import _C

    return LEVELS.index(_C.isa())


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lesser_instruction_sets(level):
    if ops.EXTENSION_ERROR is None and LEVELS.index(level) >= best():
        pytest.skip(f"{LEVELS[best()]} is what all other tests run with")
    ran = run(
        level, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, "-k", "any or large or extremes or layouts"
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    said = run(level, "-c", "from drllm_fast import build_info; print(build_info()['extension']['instruction_set'])")
    assert said.stdout.strip() == level


def test_an_unknown_instruction_set_is_refused():
    ran = run("sse9", "-c", "import torch; from drllm_fast import _C; _C.isa()")
    assert ran.returncode and "ValueError: DRLLM_FAST_ISA=sse9: this processor has baseline to" in ran.stderr
