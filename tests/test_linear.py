"""The ops `pack_linear` and `packed_linear` as the dispatcher runs them (C++ on the CPU where it is compiled), against
the product in fp64.

Shapes come from what csrc/cpu/linear_kernel.h counts in: panels of 8, 16 or 32 outputs, blocks of 6 or 12 rows, chunks
of 96 rows, depth in steps of 128, 256 or 512.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from drllm_fast import linear_reference, ops

U = 2.0**-24  # half a unit in the last place of fp32
DTYPES = [torch.float32, torch.bfloat16]
compiled = pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=f"no extension: {ops.EXTENSION_ERROR}")


def case(rows, depth, features, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=g).to(dtype)
    weight = torch.randn(features, depth, generator=g).to(dtype)
    return x, weight, torch.randn(features, generator=g).to(dtype) if bias else None


def check_product(out, x, weight, bias):
    """A sum of K products, one after another, is off by at most (K + 1) u of the sum of their magnitudes; rounding to
    bf16 adds half a unit of that."""
    assert out.shape == (len(x), len(weight)) and out.dtype == x.dtype and out.is_contiguous()
    x, weight = x.double(), weight.double()
    exact, terms = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = (x.shape[1] + 2) * U * terms + (exact.abs() * 2.0**-8 if out.dtype == torch.bfloat16 else 0)
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 29, 95, 96, 97, 203])
def test_any_number_of_rows(rows, dtype):
    x, weight, bias = case(rows, 70, 37, dtype)
    out = ops.packed_linear(x, ops.pack_linear(weight), bias, features=37)
    check_product(out, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("features", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 69, 200])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_any_number_of_features(rows, features, dtype):
    x, weight, bias = case(rows, 33, features, dtype)
    out = ops.packed_linear(x, ops.pack_linear(weight), bias, features=features)
    check_product(out, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("depth", [0, 1, 3, 16, 127, 128, 129, 255, 256, 257, 512, 513, 1030])
@pytest.mark.parametrize("rows", [1, 8, 14])
def test_any_depth(rows, depth, dtype):
    x, weight, _ = case(rows, depth, 19, dtype, bias=False)
    out = ops.packed_linear(x, ops.pack_linear(weight), features=19)
    check_product(out, x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_any_layout_of_x_and_weight(dtype):
    x, weight, bias = case(9, 80, 41, dtype)
    panels = ops.pack_linear(weight)
    want = ops.packed_linear(x, panels, bias, features=41)
    wide = torch.zeros(9, 200, dtype=dtype)
    wide[:, 60:140] = x
    for other in (x.T.contiguous().T, wide[:, 60:140], torch.stack((x, x), 1).view(18, 80)[::2]):
        assert torch.equal(ops.packed_linear(other, panels, bias, features=41), want)
    assert torch.equal(ops.pack_linear(weight.T.contiguous().T), panels)
    assert torch.equal(ops.pack_linear(torch.cat((weight, weight), 1)[:, :80]), panels)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_any_company_leaves_a_row_bit_for_bit(dtype):
    x, weight, bias = case(230, 300, 50, dtype)
    panels = ops.pack_linear(weight)
    whole = ops.packed_linear(x, panels, bias, features=50)
    for first, count in ((0, 1), (3, 2), (90, 6), (17, 7), (100, 13), (5, 96), (94, 97)):
        alone = ops.packed_linear(x[first : first + count], panels, bias, features=50)
        assert torch.equal(alone, whole[first : first + count])
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.packed_linear(x, panels, bias, features=50), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_extremes_stay_where_they_belong(dtype):
    x, weight, bias = case(8, 40, 21, dtype)
    x[2, 5], x[3, 0], weight[4, 7] = torch.nan, torch.inf, torch.inf
    out = ops.packed_linear(x, ops.pack_linear(weight), bias, features=21)
    want = F.linear(x.double(), weight.double(), bias.double())
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    finite = want.isfinite()
    assert torch.allclose(out.double()[finite], want[finite], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_the_panels_are_those_of_the_formula():
    _, weight, _ = case(1, 5, 37)
    panels = ops.pack_linear(weight)
    columns = panels.shape[2]
    for n in range(panels.shape[0] * columns):
        want = weight[n] if n < 37 else torch.zeros(5)
        assert torch.equal(panels[n // columns, :, n % columns], want)
    x, _, bias = case(3, 5, 37)
    check_product(linear_reference.packed_linear(x, panels, bias, 37), x, weight, bias)


def test_large_products_on_several_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        x, weight, bias = case(150, 576, 700)
        check_product(ops.packed_linear(x, ops.pack_linear(weight), bias, features=700), x, weight, bias)
    finally:
        torch.set_num_threads(threads)


def test_what_is_refused():
    x, weight, bias = case(2, 8, 20)
    panels = ops.pack_linear(weight)
    with pytest.raises(TypeError, match="weight must be floating"):
        ops.pack_linear(weight.int())
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        ops.pack_linear(weight[0])
    for arguments, error in (
        ((x.double(), panels, bias), TypeError),
        ((x.int(), panels.int(), bias), TypeError),
        ((x[0], panels, bias), ValueError),
        ((x, panels[0], bias), ValueError),
        ((x[:, :7], panels, bias), ValueError),
        ((x, panels, bias[:19]), ValueError),
        ((x, panels, bias.int()), TypeError),
    ):
        with pytest.raises(error):
            ops.packed_linear(*arguments, features=20)
    for features in (-1, 0, 20 + panels.shape[2] * panels.shape[0]):
        with pytest.raises(ValueError, match="features must be what weight had"):
            ops.packed_linear(x, panels, bias, features=features)


@compiled
def test_the_kernel_checks_for_itself():
    x, weight, bias = case(2, 8, 20)
    panels = ops.pack_linear(weight)
    op = torch.ops.drllm_fast.packed_linear
    with pytest.raises((ValueError, RuntimeError), match="another instruction set"):
        op(x, panels.repeat(1, 1, 2)[: panels.shape[0]], bias, 20)
    with pytest.raises((ValueError, RuntimeError), match="as pack_linear made them"):
        op(x, panels.transpose(0, 2).contiguous().transpose(0, 2), bias, 20)
    with pytest.raises((ValueError, RuntimeError), match="packed for 8"):
        op(x[:, :7], panels, bias, 20)
    with pytest.raises((ValueError, RuntimeError), match="features must be"):
        op(x, panels, None, 20 + panels.shape[0] * panels.shape[2])
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        op(x.half(), panels.half(), None, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_opcheck(dtype):
    x, weight, bias = case(3, 9, 20, dtype)
    opcheck(torch.ops.drllm_fast.pack_linear.default, (weight,))
    opcheck(torch.ops.drllm_fast.packed_linear.default, (x, ops.pack_linear(weight), bias, 20))


def test_graph_for_rows():
    x, weight, bias = case(6, 9, 20)
    panels = ops.pack_linear(weight)
    compiled = torch.compile(
        lambda x: ops.packed_linear(x * 2, panels, bias, features=20), fullgraph=True, dynamic=True
    )
    for rows in (2, 5, 6):
        assert torch.equal(compiled(x[:rows]), ops.packed_linear(x[:rows] * 2, panels, bias, features=20))
