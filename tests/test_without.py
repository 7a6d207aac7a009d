"""Everything runs without the extension, without Triton, and without both: through the reference implementations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = ["test_router.py", "test_attention.py", "test_linear.py", "test_rows.py", "test_planner.py"]
MODEL = ["test_routing.py", "test_generate.py"]
# Slow where a reference does the work, and no other there than here.
LEFT_OUT = "opcheck or graph or time or any_width or any_length or random or second or instruction or layouts"


def run(missing, *command):
    environment = {**os.environ, "DRLLM_FAST_TESTS_WITHOUT": missing}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("missing", "files"),
    [("drllm_fast._C", OPS), ("triton", MODEL), ("drllm_fast._C triton", MODEL)],
    ids=["extension", "triton", "both"],
)
def test_without(missing, files):
    report = "import sys; sys.path[:0] = ['tests']; import conftest, drllm_fast; print(drllm_fast.build_info())"
    said = run(missing, "-c", report)
    assert said.returncode == 0, said.stderr
    assert ("'why_not': None" not in said.stdout) == ("_C" in missing)
    paths = [f"tests/{file}" for file in files]
    ran = run(missing, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})", *paths)
    assert ran.returncode == 0, ran.stdout[-3000:]
