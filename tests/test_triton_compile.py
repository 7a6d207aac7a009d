"""Every kind of kernel that is launched, compiled for the cards it is for: nothing spills, and enough programs fit."""

import re

import pytest
from triton_offline import compile_variants, require_triton

require_triton()

from drllm_fast import router_kernel  # noqa: E402

TARGETS = (80, 90, 100)
REGISTERS, THREADS = 2**16, 32  # of a multiprocessor, of a warp
WARPS = 4
SHARED = 99 * 2**10  # bytes a program may have on every card from sm_80 on


def router_variant(x, weights, h, aligned=True):
    chosen = router_kernel.constants(h)
    pointers = {
        "x_ptr": x, "cu_ptr": "i32", "w1_ptr": weights, "b1_ptr": weights, "w2_ptr": weights, "b2_ptr": weights,
        "cost_ptr": weights, "pieces_ptr": "fp32", "arrived_ptr": "i32", "logits_ptr": "fp32", "decisions_ptr": "i8",
    }  # fmt: skip
    sizes = ("rows", "stride_x", "d", "h", "windows", "splits", "slices")
    return {
        "signature": {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(sizes, "i32"),
        "num_warps": chosen.pop("num_warps"),
        "constexprs": chosen,
        "divisible": [*pointers, *(("stride_x", "d", "h") if aligned else ())],
    }


# x, weights, h, whether sizes are multiples of 16, programs that must fit on a multiprocessor
ROUTERS = [
    ("bf16", "fp32", 128, True, 3),
    ("fp32", "fp32", 1024, True, 3),
    ("fp16", "fp16", 64, True, 4),
    ("bf16", "fp32", 1000, False, 2),  # every number is loaded on its own
]


# Triton makes constants of integers that are 1.
ONES = dict.fromkeys(("stride_x", "d", "h"), 1)


@pytest.fixture(scope="module")
def compiled():
    variants = [router_variant(*router[:4]) for router in ROUTERS]
    ones = router_variant("fp32", "fp32", 1, aligned=False)
    ones["constexprs"] |= ONES
    results = compile_variants("drllm_fast.router_kernel", "router_kernel", [*variants, ones], TARGETS)
    return {(r["target"], [*ROUTERS, "ones"][r["variant"]]): r for r in results}


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: "-".join(map(str, router)))
@pytest.mark.parametrize("target", TARGETS)
def test_router(compiled, target, router):
    result = compiled[target, router]
    assert result["spilled"] == 0
    assert router_kernel.constants(router[2])["num_warps"] == WARPS
    assert -(-result["registers"] // 8) * 8 * THREADS * WARPS * router[4] <= REGISTERS
    assert result["shared"] * router[4] <= SHARED
    # Three products on the tensor cores, of 16 x 8 x 8 numbers and a warp at a time, are as good as fp32.
    products = router_kernel.BLOCK_D // 8 * router_kernel.constants(router[2])["BLOCK_H"] // 8 // WARPS
    assert len(re.findall(r"mma\.sync\S*\.tf32\.tf32", result["ptx"])) == 3 * products
    # All threads' pieces, then the count, which orders them before what the last program reads, past L1.
    before, count, after = re.split(r"(atom\.global\.gpu\.acq_rel\.add)", result["ptx"])
    assert count and before.rindex("bar.sync") > before.rindex("st.global")
    assert after.index("bar.sync") < after.index("ld.global.cg")
    assert bool(re.search(r"ld\.global\.v[24]", result["ptx"])) is router[3]


@pytest.mark.parametrize("target", TARGETS)
def test_router_of_one_column_and_one_hidden_unit(compiled, target):
    assert compiled[target, "ones"]["spilled"] == 0
