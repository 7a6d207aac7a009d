"""`attend_rows` against loops over rows, heads and queries in fp64; see `attention_cases` for the tolerances."""

import pytest
import torch
from attention_cases import DIM, DIM_V, FEATURES, HEADS, ROWS, eager, features, inputs, oracle, rounding_bound, segments

from drllm_fast import attention_reference
from drllm_fast.attention_reference import attend_rows as ragged_attention
from drllm_fast.attention_reference import causal_mask


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_loops_in_fp64(rows, feature, heads):
    (new, total), heads = ROWS[rows], HEADS[heads]
    *qkv, starts = inputs(new, total, heads)
    given = features(feature, heads)
    out = ragged_attention(*qkv, new, starts, total, **given)
    assert out.shape == (1, sum(new), heads[0], DIM_V) and out.dtype == torch.float32
    expected = oracle(*qkv, new, starts, total, **given)
    assert (out - expected).abs().max() <= rounding_bound(*qkv, **given)


@pytest.mark.parametrize("layout", ["tokens first", "slices"])
@pytest.mark.parametrize("feature", ["causal", "window 4", "sinks softcap window"])
@pytest.mark.parametrize("rows", ROWS)
def test_keys_need_not_be_contiguous(rows, feature, layout):
    (new, total), heads = ROWS[rows], HEADS["grouped"]
    *qkv, starts = inputs(new, total, heads, layout=layout, gap=0 if layout == "tokens first" else 3)
    given = features(feature, heads)
    expected = oracle(*qkv, new, starts, total, **given)
    out = ragged_attention(*qkv, new, starts, total, **given)
    assert (out - expected).abs().max() <= rounding_bound(*qkv, **given)


@pytest.mark.parametrize("dim_v", [4, 16])
@pytest.mark.parametrize("feature", ["causal", "sinks"])
@pytest.mark.parametrize("rows", ["one row decode", "equal turn", "turn"])
def test_values_may_have_another_width(rows, feature, dim_v):
    (new, total), heads = ROWS[rows], HEADS["grouped"]
    *qkv, starts = inputs(new, total, heads, dim_v=dim_v)
    given = features(feature, heads)
    out = ragged_attention(*qkv, new, starts, total, **given)
    assert out.shape[-1] == dim_v
    assert (out - oracle(*qkv, new, starts, total, **given)).abs().max() <= rounding_bound(*qkv, **given)


def test_segments_may_lie_in_any_order():
    """Rows that changed places in a slot do not have to move there."""
    new, total, heads = [2, 1, 3], [5, 9, 3], HEADS["grouped"]
    query, keys, values, starts = inputs(new, total, heads)
    order = [2, 0, 1]
    new, total, starts = ([x[i] for i in order] for x in (new, total, starts))
    out = ragged_attention(query, keys, values, new, starts, total)
    assert (out - oracle(query, keys, values, new, starts, total)).abs().max() <= rounding_bound(query, keys, values)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rows", ["one row prefill", "one row decode", "equal turn", "equal decode", "prefill", "turn"])
def test_bf16_is_as_exact_as_eager(rows, feature):
    (new, total), heads = ROWS[rows], (8, 2)
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):  # the largest error of some hundred elements is a matter of luck, of some thousand less so
        *qkv, starts = inputs(new, total, heads, dtype=torch.bfloat16, seed=seed)
        given = features(feature, heads, torch.bfloat16)
        expected = oracle(*qkv, new, starts, total, **given)
        for i, f in enumerate((ragged_attention, eager)):
            out = f(*qkv, new, starts, total, **given)
            assert out.dtype == torch.bfloat16
            errors[i] = torch.maximum(errors[i], (out - expected).abs().max())
    ours, theirs = errors.tolist()
    assert ours <= 2 * theirs


@pytest.mark.parametrize(
    ("rows", "gap", "calls"),
    [
        ("equal prefill", 0, 1),
        ("equal decode", 5, 1),
        ("one row turn", 2, 1),
        ("decode", 2, 4),
        ("same total", 2, 3),
        ("idle rows", 2, 2),
    ],
)
def test_equal_rows_at_equal_distances_are_one_batch(monkeypatch, rows, gap, calls):
    (new, total), heads, seen = ROWS[rows], HEADS["grouped"], []
    attend = attention_reference._attend
    monkeypatch.setattr(attention_reference, "_attend", lambda *args: seen.append(len(args[0])) or attend(*args))
    *qkv, starts = inputs(new, total, heads, gap=gap)
    ragged_attention(*qkv, new, starts, total)
    assert len(seen) == calls and sum(seen) == sum(n > 0 for n in new)


@pytest.mark.parametrize(("total", "gaps"), [([6, 6, 6], [0, 2, 7, 0]), ([9, 4, 2], [0, 1, 6, 8])])
def test_other_rows_are_not(total, gaps):
    """Equal rows at unequal distances, and unequal rows at equal ones: a stride would read the keys of a neighbour."""
    new, heads = [1, 1, 1], HEADS["grouped"]
    starts, size = segments(total, gaps)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads[0], 3, DIM, generator=generator)
    keys, values = (torch.randn(1, heads[1], size, DIM, generator=generator) for _ in range(2))
    out = ragged_attention(query, keys, values, new, starts, total)
    assert (out - oracle(query, keys, values, new, starts, total)).abs().max() <= rounding_bound(query, keys, values)


@pytest.mark.parametrize("feature", ["causal", "window 4", "sinks softcap window"])
@pytest.mark.parametrize("rows", ["one row turn", "equal turn", "turn"])
def test_gradients(rows, feature):
    (new, total), heads = ROWS[rows], (2, 1)
    *qkv, starts = inputs(new, total, heads, dtype=torch.float64, gap=0)
    qkv = [torch.nan_to_num(t).requires_grad_() for t in qkv]
    given = features(feature, heads, torch.float64)
    # Sinks and scores meet in fp32 whatever the dtype, as in Hugging Face's own: as exact as that allows.
    tolerances = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-2} if "sinks" in feature else {}
    assert torch.autograd.gradcheck(lambda *x: ragged_attention(*x, new, starts, total, **given), qkv, **tolerances)


@pytest.mark.parametrize("feature", ["causal", "sinks"])
def test_dropout_drops_and_rescales(feature):
    """With values of one, an output is the share of attention that was kept: right on average, and never constant."""
    new, total, heads = [40], [40], (4, 4)
    query, keys, values, starts = inputs(new, total, heads, gap=0)
    ones, given = torch.ones_like(values), features(feature, heads)
    torch.manual_seed(0)
    dropped = ragged_attention(query, keys, ones, new, starts, total, dropout=0.25, **given)
    kept = ragged_attention(query, keys, ones, new, starts, total, **given)
    assert (dropped != kept).any() and abs(float(dropped.mean() / kept.mean()) - 1) < 0.1


@pytest.mark.parametrize(
    ("feature", "wrong"),
    [
        ("window 4", {"window": 5}),
        ("window 4", {"window": 3}),
        ("window 12", {"window": 13}),
        ("window 12", {"window": 11}),
        ("sinks", {"sinks": None}),
        ("sinks softcap window", {"sinks": None}),
        ("softcap", {"softcap": None}),
        ("causal", {"scale": 1.0}),
    ],
)
def test_the_tolerance_tells_mistakes_apart(feature, wrong):
    (new, total), heads = ROWS["one row prefill"], HEADS["grouped"]
    *qkv, starts = inputs(new, total, heads)
    given = features(feature, heads)
    right, mistaken = (oracle(*qkv, new, starts, total, **g) for g in (given, {**given, **wrong}))
    assert (right - mistaken).abs().max() > 100 * rounding_bound(*qkv, **given)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (3, 3), (2, 5), (5, 5)])
def test_causal_mask(n, m, window):
    mask = causal_mask(n, m, window, torch.device("cpu"))
    for i in range(n):
        for j in range(m):
            distance = (m - n + i) - j
            assert bool(mask[i, j]) == (0 <= distance < (window or m))
