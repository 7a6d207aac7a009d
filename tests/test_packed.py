"""The layout of a batch without padding: pack, unpack, positions, subsets of rows and heads of rows, against loops."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm_fast.packed import PackedBatch

CPU = torch.device("cpu")
# More examples: DRLLM_FAST_EXAMPLES=1000 pytest tests/test_packed.py, which then also draws anew at each run.
EXAMPLES = os.environ.get("DRLLM_FAST_EXAMPLES")
draws = settings(deadline=None, derandomize=EXAMPLES is None, max_examples=int(EXAMPLES or 80), database=None)


@st.composite
def masks(draw, max_rows=5, max_columns=7):
    """bool lists [B][S]: left padding, right padding, holes, rows without tokens, rows without padding."""
    columns = draw(st.integers(1, max_columns))
    left = st.integers(0, columns).map(lambda n: [i >= n for i in range(columns)])
    right = st.integers(0, columns).map(lambda n: [i < n for i in range(columns)])
    holes = st.lists(st.booleans(), min_size=columns, max_size=columns)
    return draw(st.lists(left | right | holes, min_size=1, max_size=max_rows))


def packed_batch(mask):
    real = torch.tensor(mask)
    return PackedBatch(None if bool(real.all()) else real, *real.shape, CPU), real


@draws
@given(masks(), st.sampled_from([(), (3,), (2, 2)]))
def test_pack_and_unpack(mask, rest):
    packed, real = packed_batch(mask)
    x = torch.randn(*real.shape, *rest)
    tokens = [x[b, s] for b, row in enumerate(mask) for s, r in enumerate(row) if r]
    assert packed.tokens == len(tokens) and packed.lengths == [sum(row) for row in mask]
    y = packed.pack(x)
    assert torch.equal(y, torch.stack(tokens).unsqueeze(0) if tokens else x.new_zeros(1, 0, *rest))
    out = packed.unpack(y)
    assert out.shape == x.shape
    for b, row in enumerate(mask):
        for s in range(len(row)):
            before = [i for i in range(s + 1) if row[i]] or [row.index(True)] if any(row) else []
            assert torch.equal(out[b, s], x[b, before[-1]] if before else torch.zeros(rest)), (b, s)


@pytest.mark.parametrize("mask", [None, [[False, True, True], [True, True, False], [False] * 3]])
def test_dtypes_and_gradients_pass(mask):
    real = None if mask is None else torch.tensor(mask)
    packed = PackedBatch(real, 3, 3, CPU)
    for dtype in (torch.int64, torch.bool, torch.bfloat16):
        x = torch.ones(3, 3, 2).to(dtype)
        assert packed.unpack(packed.pack(x)).dtype == dtype
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: packed.unpack(packed.pack(t)), x)
    with torch.inference_mode():
        packed.unpack(packed.pack(x))


def test_without_padding_nothing_is_copied():
    packed, x = PackedBatch(None, 2, 3, CPU), torch.randn(2, 3, 4)
    y = packed.pack(x)
    assert y.shape == (1, 6, 4) and y.data_ptr() == x.data_ptr() == packed.unpack(y).data_ptr()
    assert packed.subset((0, 1), CPU).index is None and packed.heads([3, 3], CPU)[0] is None


def test_the_mask_may_be_on_another_device():
    real = torch.tensor([[False, True], [True, True]])
    packed = PackedBatch(real, 2, 2, torch.device("cpu", 0))
    assert packed.real.device == CPU and packed.lengths == [1, 2]
    with pytest.raises(NotImplementedError):  # moved: a meta tensor has no values to count
        PackedBatch(real.to("meta"), 2, 2, CPU)
    packed = PackedBatch(real, 2, 2, torch.device("meta"))  # what is packed may be elsewhere, too
    assert packed.unpack(packed.pack(torch.zeros(2, 2, 3, device="meta"))).shape == (2, 2, 3)
    assert packed.positions([4, 5]).is_meta
    assert PackedBatch(None, 3, 1, torch.device("meta")).subset((0, 2), torch.device("meta")).index.is_meta


@draws
@given(masks(), st.lists(st.integers(0, 300), min_size=5, max_size=5))
def test_positions_count_on_from_the_past(mask, past):
    packed, real = packed_batch(mask)
    past = past[: len(mask)]
    expected = [p + i for p, n in zip(past, packed.lengths, strict=True) for i in range(n)]
    positions = packed.positions(past)
    assert positions.dtype == torch.int64 and positions.tolist() == [expected]
    assert packed.unpack(positions).shape == real.shape


def test_positions_need_one_past_a_row():
    with pytest.raises(ValueError):
        PackedBatch(None, 2, 3, CPU).positions([0])


@draws
@given(masks(), st.data())
def test_a_subset_of_rows(mask, data):
    packed, real = packed_batch(mask)
    rows = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(mask))), min_size=1))))
    subset = packed.subset(rows, CPU)
    assert subset.rows == rows and subset.lengths == [packed.lengths[r] for r in rows]
    assert subset.tokens == sum(subset.lengths)
    assert packed.subset(rows, CPU) is subset  # remembered
    one_run = list(rows) == list(range(rows[0], rows[-1] + 1))
    assert (subset.index is None) == one_run and (subset is packed.everything) == (len(rows) == len(mask))
    x = packed.pack(torch.randn(*real.shape, 2))
    before, parts = x.clone(), list(x[0].split(packed.lengths))
    assert torch.equal(subset.take(x)[0], torch.cat([parts[r] for r in rows]))
    new = torch.randn(1, subset.tokens, 2)
    for r, part in zip(rows, new[0].split(subset.lengths), strict=True):
        parts[r] = part
    assert torch.equal(subset.put(x, new)[0], torch.cat(parts)) and torch.equal(x, before)


@draws
@given(masks(), st.data())
def test_heads_of_rows(mask, data):
    packed, real = packed_batch(mask)
    lengths = [data.draw(st.integers(0, n)) for n in packed.lengths]
    index, cu_seqlens = packed.heads(lengths, CPU)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(mask) + 1)]
    assert (index is None) == (lengths == packed.lengths)
    x = packed.pack(torch.randn(*real.shape, 2))
    heads = x[0] if index is None else x[0].index_select(0, index)
    expected = [t[:n] for t, n in zip(x[0].split(packed.lengths), lengths, strict=True)]
    assert torch.equal(heads, torch.cat(expected))
    again = packed.heads(list(lengths), CPU)
    assert again[0] is index and again[1] is cu_seqlens  # remembered: every block's router asks
    if sum(lengths):  # and not mistaken for others
        assert packed.heads([0] * len(mask), CPU)[1].tolist() == [0] * (len(mask) + 1)
