"""The CUDA sources compile with the flags of setup.py, for every architecture, into kernels that fit.

What nvcc makes of them is read from its own report: registers, spills, shared memory, width of accesses."""

import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = re.findall(r"(\d+)\.(\d+)", SETUP["CUDA_ARCHITECTURES"])
REGISTERS = 64  # 1,024 threads of these on a multiprocessor, half of what it holds
SHARED = 48 << 10  # what a kernel has without asking for more

required = os.environ.get("DRLLM_FAST_REQUIRE_NVCC") == "1"  # then these fail where there is no nvcc
needs_nvcc = pytest.mark.skipif(not required and not shutil.which("nvcc"), reason="there is no nvcc")


def run(*command):
    ran = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@dataclass
class Kernel:
    name: str
    architecture: str
    stack: int
    spills: int
    registers: int
    shared: int


def report(said):
    """What `-Xptxas -v` said about each kernel."""
    kernels = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        stack, stores, loads = map(int, frame.groups())
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = sum(int(size) for size in re.findall(r"(\d+) bytes smem", part))
        kernels.append(Kernel(name, architecture, stack, stores + loads, registers, shared))
    return kernels


def entries(source):
    """The names of the kernels in a source."""
    found = re.findall(r"__global__ void (?:__launch_bounds__\(\w+\)\s*)?(\w+)\(", source.read_text())
    assert len(found) == source.read_text().count("__global__")
    return found


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_kernel_fits(source, tmp_path):
    targets = [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in ARCHITECTURES]
    flags = [*SETUP["NVCC_FLAGS"], "-std=c++17", *targets, "-Xptxas", "-v", "-Werror", "all-warnings"]
    kernels = report(run("nvcc", *flags, "-c", source, "-o", tmp_path / "object"))
    for architecture in (f"sm_{major}{minor}" for major, minor in ARCHITECTURES):
        here = [kernel for kernel in kernels if kernel.architecture == architecture]
        for name in entries(source):
            assert any(name in kernel.name for kernel in here), f"{name} is missing for {architecture}"
    for kernel in kernels:
        assert kernel.stack == kernel.spills == 0, kernel
        assert kernel.registers <= REGISTERS and kernel.shared <= SHARED, kernel


@needs_nvcc
def test_wide_accesses_are_wide(tmp_path):
    """The kernels whose elements are 16 bytes read and write them at once; the narrow ones do not."""
    run("nvcc", "-ptx", "-std=c++17", "-arch=sm_80", ROOT / "csrc/cuda/rows.cu", "-o", tmp_path / "ptx")
    bodies = re.split(r"\.entry ", (tmp_path / "ptx").read_text())[1:]
    widths = {}
    for body in bodies:
        name = body.split("(")[0]
        if element := re.search(r"(copy_rows|add_rows|norm_rows)I(.*)E", name):
            wide = re.search(r"PackI(?:jLi4|fLi4|dLi2|\w*?(?:bfloat16|half)Li8)E", element[2]) is not None
            accesses = len(re.findall(r"(?:ld|st)\.global\.v[24]", body))
            widths.setdefault((element[1], wide), []).append(accesses > 0)
    assert len(widths) == 6, widths
    for (kernel, wide), are_wide in widths.items():
        two_words = kernel == "copy_rows" and not wide  # elements of 8 bytes
        assert all(are_wide) if wide else sum(are_wide) == (2 if two_words else 0), (kernel, wide, are_wide)


@needs_nvcc
def test_the_bindings_compile_against_torch():
    include = [*include_paths(), sysconfig.get_paths()["include"], SETUP["cuda_home"]() / "include"]
    flags = [*SETUP["CUDA_CXX_FLAGS"], "-std=c++20", "-fsyntax-only", *(f"-isystem{folder}" for folder in include)]
    run("g++", *flags, "-Wall", "-Wextra", "-Werror", ROOT / "csrc/cuda/ops.cpp")


def toolkit(folder):
    """What a CUDA toolkit has, as far as it is looked for: its nvcc tells where it is, as the real one does."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={folder}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    return folder


def test_the_toolkit_is_found_behind_a_script(tmp_path, monkeypatch):
    home, elsewhere = toolkit(tmp_path / "toolkit"), tmp_path / "elsewhere" / "bin"
    elsewhere.mkdir(parents=True)
    (elsewhere.parent / "lib").mkdir()
    (elsewhere / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    (elsewhere / "nvcc").chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{elsewhere}:{os.environ['PATH']}")
    assert SETUP["cuda_home"]() == home.resolve()


def test_a_toolkit_that_is_named_is_taken_or_refused(tmp_path, monkeypatch):
    home = toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert SETUP["cuda_home"]() == home.resolve()
    (home / "lib64").rmdir()
    with pytest.raises(SETUP["CannotCompile"], match=f"looked in {home}; set CUDA_HOME"):
        SETUP["cuda_home"]()
