"""Compiles `drllm_fast._C`, where that can be done. Everything else about the package is in pyproject.toml.

    DRLLM_FAST_BUILD=auto   compile for the CPU if torch and a C++ compiler are there, else build pure Python (default)
    DRLLM_FAST_BUILD=cpu    compile for the CPU, or fail
    DRLLM_FAST_BUILD=cuda   compile for the CPU and CUDA, or fail: not in this version
    DRLLM_FAST_BUILD=none   pure Python

torch is no build requirement: an isolated build would fetch gigabytes of it, and not the one that is installed. So
compiling takes a build that sees the installed torch: pip install --no-build-isolation .
No device is probed, and without the extension every op still has its reference implementation.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
# The oldest torch that the binary runs on: typed data pointers of the stable ABI begin there.
TORCH_TARGET = (2, 10)


class CannotCompile(Exception):
    """Why the extension cannot be compiled here."""


def notice(text):
    print(f"\ndrllm-fast: {text}\n", file=sys.stderr, flush=True)


def compile_with_torch(mode):
    """The arguments of setup() that compile the extension."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise CannotCompile(
            f"torch cannot be imported by this build ({error}). To compile against the torch that is installed: "
            f"pip install --no-build-isolation ."
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
        ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=["csrc/ops.h", *sorted(glob("csrc/cpu/*.h"))],
        extra_compile_args=[
            "/O2" if os.name == "nt" else "-O3",
            f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
        ],
    )
    extension.libraries.remove("torch_python")  # has no stable ABI, and nothing of it is used

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

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}}


def setup_arguments():
    mode = os.environ.get("DRLLM_FAST_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"DRLLM_FAST_BUILD={mode} is not one of {', '.join(MODES)}")
    if mode == "cuda":
        sys.exit("DRLLM_FAST_BUILD=cuda: this version has no CUDA sources yet; use auto, cpu or none")
    if mode == "none":
        return {}
    try:
        return compile_with_torch(mode)
    except CannotCompile as reason:
        if mode == "cpu":
            sys.exit(f"DRLLM_FAST_BUILD=cpu: {reason}")
        notice(f"building pure Python: {reason}")
        return {}


setup(**setup_arguments())
