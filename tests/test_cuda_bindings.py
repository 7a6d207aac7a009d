"""csrc/cuda/ops.cpp, called by torch's dispatcher: compiled for the host with the emulated kernels, and registered in a
process of its own, where the CPU's kernels are otherwise."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from test_rows import both_visits, int8, int32
from torch.utils.cpp_extension import include_paths, library_paths

from drllm_fast import ops

ROOT = Path(__file__).parents[1]
EMULATION, SOURCES = ROOT / "tests" / "cuda_emulation", ROOT / "csrc" / "cuda"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bindings")
    (folder / "cuda").mkdir()
    text = (SOURCES / "ops.cpp").read_text()
    assert text.count("(drllm_fast, CUDA, m)") == 1
    (folder / "cuda" / "ops.cpp").write_text(text.replace("(drllm_fast, CUDA, m)", "(drllm_fast, CPU, m)"))
    shutil.copy(ROOT / "csrc" / "tensors.h", folder)
    built = folder / "library.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-pthread", "-Wno-unknown-pragmas"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", EMULATION, "-I", SOURCES]
    flags += [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    sources = ["-x", "c++", folder / "cuda" / "ops.cpp", SOURCES / "rows.cu", EMULATION / "torch_stubs.cpp"]
    links = ["-x", "none", *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*map(str, ["g++", *flags, *sources, *links, "-o", built])], check=True)
    return built


SCRIPT = """
import itertools, sys
sys.modules["drllm_fast._C"] = None
import pytest, torch
from test_rows import (  # first, since it asks which kernels there are
    DECISIONS, ENDS, FLOATS, OPTIONS, REFUSED, W, fill, int8, int32, int64, layouts
)
from drllm_fast import ops, rows_reference as reference

torch.ops.load_library(sys.argv[1])
for name in ("visit_rows", "gather_rows", "scatter_rows", "scatter_add_rows", "gather_rms_norm"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drllm_fast::{name}", "CPU")

def same(got, expected):
    got, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and x.is_contiguous() and torch.equal(x, y), (x, y)

def twice(x):
    return x.repeat_interleave(2)[::2]

for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex128):
    rows, new, index = fill(5, 3, dtype), fill(3, 3, dtype).flip(0), twice(int64(4, -1, 0))
    for (_, x), (_, y) in itertools.product(layouts(rows), layouts(new)):
        same(ops.gather_rows(x, index), reference.gather_rows(x, index))
        same(ops.scatter_rows(x, index, y), reference.scatter_rows(x, index, y))
weight = 1 + torch.arange(8.0)
for dtype in FLOATS:
    rows, new, index = fill(5, 8, dtype), fill(3, 8, dtype).flip(0), twice(int64(4, -1, 0))
    for (_, x), (_, y) in zip(layouts(rows), layouts(new)):
        same(ops.scatter_add_rows(x, index, y), reference.scatter_add_rows(x, index, y))
    for _, x in layouts(rows):
        got = ops.gather_rms_norm(x, index, twice(weight.to(dtype)), eps=0.5)
        expected = reference.gather_rms_norm(x, index, weight.to(dtype), 0.5)
        same(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])
for decisions, ends in ((int8(1, 0, 2), int32(0, 2, 3, 7)), (int8(), int32(0))):
    for tokens in (int(ends[-1]), int(ends[-1]) + 3):
        expected = reference.visit_rows(decisions, ends, tokens)
        same(ops.visit_rows(twice(decisions), twice(ends), tokens=tokens), expected)
for rows, columns in ((0, 5), (0, 0), (4, 0)):
    x, index = torch.zeros(rows, columns), torch.arange(rows)
    same(ops.gather_rows(x, index), x)
    same(ops.scatter_rows(x, index, x), x)
    same(ops.scatter_add_rows(x, index, x), x)
    same(ops.gather_rms_norm(x, index, torch.ones(columns), eps=1.0), (x, x))

by_value = {"index", "must not name a row twice", "cu_seqlens must start at 0", "must not fall"}
for op, arguments, error, message in REFUSED:
    if op == "active_tokens" or message in by_value or "got 7 and 8" in message or any(x.is_meta for x in arguments):
        continue  # not of CUDA, not looked at there, or faked
    with pytest.raises((error, RuntimeError)):
        getattr(torch.ops.drllm_fast, op)(*arguments, *OPTIONS.get(op, {}).values())
for eps in (0.0, -1.0, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="eps must be positive and finite"):
        torch.ops.drllm_fast.gather_rms_norm(torch.ones(1, 3), int64(0), W, eps)
with pytest.raises(ValueError, match="tokens must be at least"):
    torch.ops.drllm_fast.visit_rows(DECISIONS, ENDS, -1)
print("all of it ran")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the real one is tried where torch is built for CUDA")
def test_the_bindings(library):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(library)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "all of it ran" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_captured_graph_for_all_decisions(dtype):
    """On a device: nothing waits for it, and a replay reads the decisions anew."""
    assert ops.CUDA_EXTENSION_ERROR is None, ops.CUDA_EXTENSION_ERROR
    x, weight = torch.randn(9, 40).to(dtype), torch.randn(40).to(dtype)
    ends, plans = int32(0, 4, 4, 9), [int8(1, 2, 0), int8(0, 0, 0), int8(2, 1, 2), int8(0, 2, 1)]
    given = [tensor.cuda() for tensor in (x, plans[0], ends, weight)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both_visits(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_visits(*given)
    for plan in plans:
        given[1].copy_(plan)
        graph.replay()
        torch.testing.assert_close(captured.cpu(), both_visits(x, plan, ends, weight))
        assert torch.equal(captured, both_visits(*given))
