"""What the compiler makes of the attention kernels, as they are launched, for sm_80, sm_90 and sm_100.

No register is spilled, and shared memory is within what a program may have on any of them, or on sm_86 and sm_89.
"""

import inspect

import pytest
import torch
from triton_offline import compile_variants, require_triton

require_triton()

from drllm_fast import attention_kernel  # noqa: E402

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
UNSPECIALISED = {"rows", "tiles", "window", "splits"}
SHARED = 99 * 1024
TARGETS = (80, 90, 100)
MATRIX_PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

# dtype, head dim, tokens a row asks with, features; named after models that have such layers.
CASES = {
    "Gemma 2 27B": (torch.float16, 128, 300, {"window": 200, "softcap": 50.0}),
    "GPT-OSS": (torch.bfloat16, 64, 300, {"window": 128, "sinks": True}),
    "Gemma 2": (torch.bfloat16, 256, 300, {"window": 200, "softcap": 50.0}),
    "Phi-2": (torch.bfloat16, 80, 300, {}),
    "fp32": (torch.float32, 128, 300, {"window": 200}),
    "Mistral decodes": (torch.bfloat16, 128, 1, {"window": 1000}),
    "Gemma 2 decodes": (torch.bfloat16, 256, 1, {"window": 1000, "softcap": 50.0}),
}
PREFILLS = ["Gemma 2 27B", "GPT-OSS", "Gemma 2", "Phi-2"]


class Recorder:
    """Stands for a kernel, and keeps what it is launched with in the form that `compile_variants` takes."""

    def __init__(self, kernel):
        self.names, self.variants = list(inspect.signature(kernel.fn).parameters), []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        given = dict(zip(self.names, args, strict=False))
        assert options.pop("enable_fp_fusion")
        variant = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
        types = {name: "fp32" if isinstance(x, float) else "i32" for name, x in given.items()}
        types |= {name: POINTERS[x.dtype] for name, x in given.items() if isinstance(x, torch.Tensor)}
        constants = options | {name: None for name, x in given.items() if x is None}
        divisible = [name for name, kind in types.items() if kind[0] == "*" and name not in constants]
        divisible += [n for n, x in given.items() if isinstance(x, int) and x % 16 == 0 and n not in UNSPECIALISED]
        signature = {name: kind for name, kind in types.items() if name not in constants}
        self.variants.append({"signature": signature, "constexprs": constants, "divisible": divisible, **variant})


def launched(major):
    """What both kernels are launched with for rows of each case, on a device of that compute capability."""
    kernels = {name: getattr(attention_kernel, name) for name in ("ragged_attention_kernel", "combine_kernel")}
    recorders, sizes = {name: Recorder(kernel) for name, kernel in kernels.items()}, attention_kernel.block_sizes
    with pytest.MonkeyPatch.context() as patch:
        for name, recorder in recorders.items():
            patch.setattr(attention_kernel, name, recorder)
        patch.setattr(attention_kernel, "block_sizes", lambda *args: sizes(*args[:3], major))
        for dtype, dim, new, given in CASES.values():
            query = torch.empty(8 * new, 32, dim, dtype=dtype)
            keys, values = (torch.empty(8192, 8, dim, dtype=dtype).transpose(0, 1) for _ in range(2))
            sinks = torch.empty(32, dtype=dtype) if given.get("sinks") else None
            longest = new if new == 1 else 2 * new  # so that rows are searched for
            layout = (torch.empty(9).int(), *torch.empty(2, 8).int(), longest, 1024)
            attention_kernel.ragged_attention(query, keys, values, *layout, dim**-0.5, **{**given, "sinks": sinks})
    return [recorder.variants for recorder in recorders.values()]


@pytest.fixture(scope="module")
def compiled():
    """{(case, target): (variant, result)} of the first kernel, and the results of the second."""
    (attends, combines), (older, _) = launched(9), launched(8)
    results = {}
    for variants, targets in ((older, TARGETS[:1]), (attends, TARGETS[1:])):
        keys = [(target, case) for target in targets for case in CASES]
        found = compile_variants("drllm_fast.attention_kernel", "ragged_attention_kernel", variants, targets)
        results |= {(k[1], k[0]): (v, r) for k, v, r in zip(keys, variants * len(targets), found, strict=True)}
    return results, compile_variants("drllm_fast.attention_kernel", "combine_kernel", combines[:1], TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_it_fits(compiled, case, target):
    variant, result = compiled[0][case, target]
    assert result["target"] == target and "cp.async.cg.shared.global" in result["ptx"]  # 16 bytes at a time
    print({**variant["constexprs"], **{n: result[n] for n in ("target", "registers", "spilled", "shared")}})
    assert result["spilled"] == 0
    assert result["shared"] <= SHARED


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", PREFILLS)
def test_prefill_uses_tensor_cores(compiled, case, target):
    variant, result = compiled[0][case, target]
    assert variant["constexprs"]["SEARCH"] and not variant["constexprs"]["SPLIT"]
    assert MATRIX_PRODUCTS[target] in result["ptx"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("case", "most"), [("Mistral decodes", 128), ("Gemma 2 decodes", 192)])
def test_decode_leaves_room(compiled, case, most, target):
    """For 4 programs a multiprocessor, or 2."""
    variant, result = compiled[0][case, target]
    assert variant["constexprs"]["SPLIT"] and variant["constexprs"]["BLOCK_M"] == 16
    assert result["registers"] <= most and "mma.sync" in result["ptx"]


def test_combine(compiled):
    for result in compiled[1]:
        assert result["spilled"] == 0 and result["registers"] <= 128


@pytest.mark.parametrize("target", TARGETS)
def test_float32_is_not_rounded_to_tf32(compiled, target):
    assert "tf32" not in compiled[0]["fp32", target][1]["ptx"]
