"""Compiles `drllm_fast._C` and `_C_cuda`, where that can be done. Everything else is in pyproject.toml.

    DRLLM_FAST_BUILD=auto   compile for the CPU if torch and a C++ compiler are there, else build pure Python (default)
    DRLLM_FAST_BUILD=cpu    compile for the CPU, or fail
    DRLLM_FAST_BUILD=cuda   compile for the CPU and CUDA, or fail; needs a torch built for CUDA, and the CUDA toolkit
    DRLLM_FAST_BUILD=none   pure Python

torch is no build requirement: an isolated build would fetch gigabytes of it, and not the one that is installed. So
compiling takes a build that sees the installed torch, and pybind11: pip install --no-build-isolation .
No device is probed (TORCH_CUDA_ARCH_LIST says what to compile for, if not what is below), and without the
extension every op still has its reference implementation. The kernels are written in the dialect of GCC and Clang.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
# The oldest torch that the binary runs on: typed data pointers of the stable ABI begin there.
TORCH_TARGET = (2, 10)
CXX_FLAGS = [
    *(["/O2", "/std:c++17"] if os.name == "nt" else ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]),
    f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
]
# DRLLM_FAST_SANITIZE=1, for tests/sanitize.py. Python's own -fwrapv would define what the second one is to find.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv", "-O1", "-g1"]
SANITIZE = SANITIZE if os.environ.get("DRLLM_FAST_SANITIZE") == "1" else []
CUDA_CXX_FLAGS = [*CXX_FLAGS, "-DUSE_CUDA"]  # without which torch's headers leave its stream out
NVCC_FLAGS = ["-O3"]
# Ampere, Hopper, Blackwell (from CUDA 12.8 on); and code that a driver can compile for what comes after them.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
OLD_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


class CannotCompile(Exception):
    """Why the extension cannot be compiled here."""


def notice(text):
    print(f"\ndrllm-fast: {text}\n", file=sys.stderr, flush=True)


def cuda_home():
    """The folder of the CUDA toolkit: the one with bin/nvcc and lib64.

    torch guesses it from where nvcc is, which is wrong where that is a script that calls the real one. nvcc knows.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [named] if named else []
    if not named and (nvcc := shutil.which("nvcc")):
        said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        folders += re.findall(r"^#\$ TOP=(.*?)\r?$", said.stdout + said.stderr, re.MULTILINE)
        folders.append(Path(nvcc).resolve().parent.parent)
    if not named:
        folders.append("/usr/local/cuda")
    for folder in map(Path, folders):
        if (folder / "bin" / "nvcc").is_file() and (folder / "lib64").is_dir():
            return folder.resolve()
    looked = ", ".join(map(str, folders))
    raise CannotCompile(f"no CUDA toolkit with bin/nvcc and lib64 was found (looked in {looked}; set CUDA_HOME)")


def cuda_extension():
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    architectures = CUDA_ARCHITECTURES if version >= (12, 8) else OLD_CUDA_ARCHITECTURES
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
    return CUDAExtension(
        "drllm_fast._C_cuda",
        ["csrc/cuda/ops.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        depends=["csrc/tensors.h", *sorted(glob("csrc/cuda/*.h"))],
        extra_compile_args={"cxx": CUDA_CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


def compile_with_torch(mode):
    """The arguments of setup() that compile the extensions."""
    try:
        import torch

        if mode == "cuda":  # before torch looks for it, in the next import
            if torch.version.cuda is None:
                raise CannotCompile(f"it needs a torch that is built for CUDA, and torch {torch.__version__} is not")
            os.environ["CUDA_HOME"] = str(cuda_home())
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise CannotCompile(
            f"torch cannot be imported by this build ({error}). To compile against the torch that is installed: "
            f"pip install --no-build-isolation ."
        ) from error
    try:
        import pybind11
    except ImportError as error:
        raise CannotCompile(
            f"pybind11 cannot be imported by this build ({error}). Install it beside torch: pip install 'pybind11>=3'"
        ) from error
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < TORCH_TARGET:
        raise CannotCompile(f"torch {torch.__version__} is older than the 2.10 that the extension is written for")
    compilers = ["cl"] if os.name == "nt" else ["c++", "g++", "clang++"]
    if "CXX" in os.environ:
        compilers = os.environ["CXX"].split()[:1]
    if not any(shutil.which(name) for name in compilers):
        raise CannotCompile(f"no C++ compiler was found (looked for {', '.join(compilers)}; set CXX to name one)")

    extension = CppExtension(
        "drllm_fast._C",
        ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp")), *sorted(glob("csrc/plan*.cpp"))],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        include_dirs=[pybind11.get_include()],  # before the older one that torch brings
        extra_compile_args=[*CXX_FLAGS, *SANITIZE],
        extra_link_args=SANITIZE,
    )
    extensions = [extension, cuda_extension()] if mode == "cuda" else [extension]
    for each in extensions:
        each.libraries.remove("torch_python")  # has no stable ABI, and nothing of it is used

    class BuildExt(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if mode != "auto":
                    raise
                notice(f"building pure Python, since the extension did not compile: {error}")
                self.extensions = self.distribution.ext_modules = []
                wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel:  # its tag was chosen while there was an extension
                    wheel.root_is_pure = True

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExt}}


def setup_arguments():
    mode = os.environ.get("DRLLM_FAST_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"DRLLM_FAST_BUILD={mode} is not one of {', '.join(MODES)}")
    if mode == "none":
        return {}
    try:
        return compile_with_torch(mode)
    except CannotCompile as reason:
        if mode != "auto":
            sys.exit(f"DRLLM_FAST_BUILD={mode}: {reason}")
        notice(f"building pure Python: {reason}")
        return {}


if __name__ == "__main__":
    setup(**setup_arguments())
