"""Triton without a GPU: kernels are compiled for a CUDA target, and what the compiler made of them is read back.

`compile_variants` works in a subprocess, since the tests themselves run Triton's interpreter (see conftest), and which
of the two a kernel is for is settled when `@triton.jit` is evaluated. What was compiled before comes from Triton's own
cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def require_triton() -> None:
    """At the top of a test module: skips it where Triton is missing, or fails if DRLLM_FAST_REQUIRE_TRITON=1."""
    if find_spec("triton") is None:
        if os.environ.get("DRLLM_FAST_REQUIRE_TRITON") == "1":
            raise ModuleNotFoundError("DRLLM_FAST_REQUIRE_TRITON=1, but triton is not installed")
        pytest.skip("triton is not installed", allow_module_level=True)


def compile_variants(
    module_name: str, kernel_name: str, variants: list[dict[str, Any]], targets: tuple[int, ...] = (80, 90, 100)
) -> list[dict[str, Any]]:
    """Compiles the kernel `kernel_name` of the module `module_name` to a cubin, for each target and then each variant.

    A variant has
        signature   {argument: type}, such as {"x_ptr": "*bf16", "tokens": "i32"}; constexprs may be left out
        constexprs  {argument: value}, also for integers that Triton specialises to 1 and for pointers that are None
        num_warps, num_stages (4 and 3 by default)
        divisible   names of the arguments that are multiples of 16; by default all pointers

    Each result has: target, variant (its number), registers (a thread), spilled (bytes of local memory a thread),
    shared (bytes a program), ptx (text), cubin (bytes). RuntimeError with what the compiler said if it fails.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # its default changes between the versions of Triton
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        request = {"module": module_name, "kernel": kernel_name, "variants": variants, "targets": targets}
        ran = subprocess.run(
            [sys.executable, __file__, folder],
            input=json.dumps(request), capture_output=True, text=True, env=environment
        )  # fmt: skip
        if ran.returncode:
            raise RuntimeError(f"{module_name}.{kernel_name} does not compile:\n{ran.stderr[-8000:]}")
        results = json.loads(ran.stdout.splitlines()[-1])
        for number, result in enumerate(results):
            result["ptx"] = Path(folder, f"{number}.ptx").read_text()
            result["cubin"] = Path(folder, f"{number}.cubin").read_bytes()
    return results


def _resources(cuobjdump: str, cubin: Path) -> dict[str, int]:
    """registers and spilled from a line such as `REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 ...`."""
    command = [cuobjdump, "--dump-resource-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def _main(folder: str) -> None:
    import importlib

    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    request = json.load(sys.stdin)
    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    results = []
    for target in request["targets"]:
        for number, variant in enumerate(request["variants"]):
            types, constants = variant["signature"], variant.get("constexprs", {})
            unknown = (types.keys() | constants.keys()) ^ set(kernel.arg_names)
            if unknown:
                raise ValueError(f"signature and constexprs differ from the kernel's arguments in {sorted(unknown)}")
            signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
            pointers = [name for name, kind in signature.items() if kind.startswith("*")]
            attributes = {
                (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                for name in variant.get("divisible", pointers)
                if signature[name] != "constexpr"
            }
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
            options = {"num_warps": variant.get("num_warps", 4), "num_stages": variant.get("num_stages", 3)}
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            ptx, cubin = (Path(folder, f"{len(results)}.{kind}") for kind in ("ptx", "cubin"))
            ptx.write_text(compiled.asm["ptx"])
            cubin.write_bytes(compiled.asm["cubin"])
            resources = _resources(knobs.nvidia.cuobjdump.path, cubin)
            results.append({"target": target, "variant": number, "shared": compiled.metadata.shared, **resources})
    print(json.dumps(results))


if __name__ == "__main__":
    _main(sys.argv[1])
