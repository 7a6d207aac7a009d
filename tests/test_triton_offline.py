"""That the offline compiler tells a kernel that spills from one that does not."""

import pytest
from triton_offline import compile_variants, require_triton

require_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def normalise_kernel(x_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(x_ptr + at, x / tl.sum(x), mask=at < n)


def variant(size, num_warps=1):
    return {"signature": {"x_ptr": "*fp32", "n": "i32"}, "constexprs": {"SIZE": size}, "num_warps": num_warps}


def test_resources_are_read_from_the_cubin():
    small, large = compile_variants(__name__, "normalise_kernel", [variant(64), variant(32 * 512)], targets=(80,))
    assert (small["target"], small["variant"], large["variant"]) == (80, 0, 1)
    assert small["spilled"] == 0 and 0 < small["registers"] < 64
    assert large["spilled"] > 1024  # 512 numbers a thread, needed twice, and 255 registers
    assert ".target sm_80" in small["ptx"] and small["cubin"][:4] == b"\x7fELF"


def test_targets():
    assert [r["target"] for r in compile_variants(__name__, "normalise_kernel", [variant(64)])] == [80, 90, 100]


def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="SIZE"):
        compile_variants(__name__, "normalise_kernel", [{"signature": {"x_ptr": "*fp32", "n": "i32"}}], targets=(80,))
    with pytest.raises(RuntimeError, match="power of 2"):
        compile_variants(__name__, "normalise_kernel", [variant(48)], targets=(80,))
