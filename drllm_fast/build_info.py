"""What this installation is made of: versions, what is compiled, and which implementation each op runs, and why."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from drllm_fast import ops, planner, planner_reference, registration

RELATED = ("torch", "transformers", "triton")
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def build_info() -> dict[str, Any]:
    """As plain data, fit for JSON:

    versions   of drllm-fast, Python, torch, transformers and triton; None for what is not installed
    cuda       the CUDA version torch was built for, or None; the device, or None; the file of drllm_fast._C_cuda, or
               None; and what torch's own varlen_attn takes, to which `ragged_attention` leaves packed prompts where
               that is enough (see `drllm_fast.varlen`)
    extension  whether drllm_fast._C is loaded, its facts, and the reason if it is not; instruction_set is what the CPU
               kernels run with: baseline, avx2, avx512 or avx512bf16, the best there is or DRLLM_FAST_ISA
    planner    the implementation that runs, and why
    ops        for each op and device the implementation that runs, and why
    """
    from drllm_fast import varlen

    return {
        "versions": {
            "drllm-fast": _version("drllm-fast"),
            "python": platform.python_version(),
            **{name: _version(name) for name in RELATED},
        },
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "extension": None if ops.CUDA_EXTENSION_ERROR else sys.modules["drllm_fast._C_cuda"].__file__,
            "varlen_attn": sorted(varlen.parameters()),
        },
        "extension": _extension(),
        "planner": _planner(),
        "ops": {name: {device: _implementation(name, device) for device in DISPATCH_KEYS} for name in _op_names()},
    }


def build_report() -> str:
    """`build_info()` as text."""
    info = build_info()
    extension, cuda = info["extension"], info["cuda"]
    lines = [f"{name:14}{found or 'not installed'}" for name, found in info["versions"].items()]
    built_for = f"torch is built for CUDA {cuda['torch_built_for']}" if cuda["torch_built_for"] else "torch is CPU only"
    lines.append(f"{'cuda':14}{built_for}, {cuda['device'] or 'no device'}")
    lines.append(f"{'extension':14}{_extension_text(extension)}")
    lines.append(f"{'planner':14}{info['planner']['implementation']}, {info['planner']['why']}")
    width = max(map(len, info["ops"]), default=0)
    for name, devices in info["ops"].items():
        for device, runs in devices.items():
            lines.append(f"op {name:{width}}  {device:5} {runs['implementation']:10} {runs['why']}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    error = ops.EXTENSION_ERROR
    if error is None:
        from drllm_fast import _C

        try:
            instruction_set = _C.isa()
        except ValueError as wrong:  # an op would raise it too
            instruction_set = str(wrong)
        facts = {name: getattr(_C, name) for name in ("backends", "built_with_torch", "compiler")}
        return {"loaded": True, "why_not": None, "file": _C.__file__, "instruction_set": instruction_set, **facts}
    missing = isinstance(error, ModuleNotFoundError) and error.name == "drllm_fast._C"
    why_not = "not compiled" if missing else f"compiled, but it cannot be loaded: {error}"
    return {"loaded": False, "why_not": why_not, "file": error.path}


def _extension_text(extension: dict[str, Any]) -> str:
    if extension["loaded"]:
        return (
            f"{extension['backends']} with {extension['instruction_set']}, built with torch "
            f"{extension['built_with_torch']}, {extension['file']}"
        )
    return f"{extension['why_not']}; pip install --no-build-isolation . compiles it, with torch and a C++ compiler"


def _planner() -> dict[str, str]:
    if planner._implementation is planner_reference:
        return {"implementation": "Python", "why": "the extension is not loaded"}
    return {"implementation": "C++", "why": "the extension is loaded"}


def _op_names() -> list[str]:
    prefix = "drllm_fast::"
    return sorted(n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix))


def _implementation(op: str, device: str) -> dict[str, str]:
    """The dispatcher's own answer: a kernel registered for the device, or the reference, which runs on any."""
    key = DISPATCH_KEYS[device]
    kernel = next((x for x in torch._C._dispatch_dump(f"drllm_fast::{op}").splitlines() if x.startswith(f"{key}:")), "")
    if kernel:
        compiled = ".cpp:" in kernel or ".cu:" in kernel
        name = ("C++" if device == "cpu" else "CUDA C++") if compiled else "Triton"
        return {"implementation": name, "why": f"a kernel is registered for {key}"}
    if device == "cpu" and ops.EXTENSION_ERROR is not None:
        return {"implementation": "reference", "why": "the extension is not loaded"}
    if device == "cuda" and op in registration.TRITON_OPS:
        return {"implementation": "reference", "why": registration.NO_TRITON}
    if op == "router_windows":
        return {"implementation": "reference", "why": "a product of matrices, which is the vendor's"}
    if device == "cuda" and ops.CUDA_EXTENSION_ERROR is not None:
        why = f"the CUDA extension is not loaded: {ops.CUDA_EXTENSION_ERROR}"
        return {"implementation": "reference", "why": why}
    return {"implementation": "reference", "why": f"this version has no {key} kernel for it"}
