"""How an op `drllm_fast::name` is made known to torch.

Its schema is defined once, in Python; its reference implementation runs on any device (CompositeExplicitAutograd).
Kernels are put in front of that: C++ by importing `drllm_fast._C` and `drllm_fast._C_cuda`, Triton by `triton_kernel`.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.library import define, impl

# Whether drllm_fast._C is loaded: its kernels check all of their input, so that Python need not do it first.
cpu_kernels = False
TRITON_OPS: list[str] = []  # which ops have a Triton kernel
# Why those kernels are not registered; None when they are.
NO_TRITON = (
    "torch is CPU only"
    if torch.version.cuda is None
    else "triton is not installed"
    if find_spec("triton") is None
    else None
)


def define_op(name: str, schema: str, reference: Callable) -> None:
    define(f"drllm_fast::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    impl(f"drllm_fast::{name}", "CompositeExplicitAutograd", reference)


def triton_kernel(name: str, function: Callable) -> None:
    """`function` runs the op on CUDA devices. It imports its kernel when called: importing Triton takes a second."""
    TRITON_OPS.append(name)
    if NO_TRITON is None:
        impl(f"drllm_fast::{name}", "CUDA", function)


def check_integer(name: str, value: object, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check(checks: Callable, *arguments) -> None:
    """Raise what `checks` raises, unless the call is being compiled: sizes may be unknown there, and the fakes say what
    must hold."""
    if not torch.compiler.is_compiling():
        checks(*arguments)
