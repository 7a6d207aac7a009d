"""`ragged_attention` against loops over rows, heads and queries in fp64.

Tolerances are derived, not tuned. fp32: the first-order bound of `rounding_bound`. bf16: at most twice the error that
the textbook form ("eager", as Hugging Face writes it) makes in the same dtype, both against fp64.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from drllm_fast import attention_reference
from drllm_fast.attention_reference import attend_rows as ragged_attention
from drllm_fast.attention_reference import causal_mask

# (new, total) of the rows. One row; equal rows (one strided batch); unequal ones; rows without a new token.
ROWS = {
    "one token": ([1], [1]),
    "one row prefill": ([13], [13]),
    "one row decode": ([1], [13]),
    "one row turn": ([4], [13]),
    "equal prefill": ([9, 9, 9], [9, 9, 9]),
    "equal decode": ([1, 1, 1], [12, 12, 12]),
    "equal turn": ([3, 3], [12, 12]),
    "prefill": ([5, 1, 11], [5, 1, 11]),
    "decode": ([1, 1, 1, 1], [3, 12, 7, 1]),
    "turn": ([2, 1, 5], [9, 9, 5]),
    "same new": ([2, 2, 2], [9, 4, 2]),
    "same total": ([1, 2, 8], [8, 8, 8]),
    "idle rows": ([0, 3, 0, 1, 0], [4, 7, 1, 9, 0]),
}
# A window of 1, smaller than, as large as, one larger than and much larger than the longest keys (13).
FEATURES = {
    "causal": {},
    "scale": {"scale": 0.3},
    "window 1": {"window": 1},
    "window 4": {"window": 4},
    "window 7": {"window": 7},
    "window 12": {"window": 12},
    "window 13": {"window": 13},
    "window 14": {"window": 14},
    "window 99": {"window": 99},
    "softcap": {"softcap": 0.8},
    "softcap window": {"softcap": 0.8, "window": 4, "scale": 0.5},
    "sinks": {"sinks": True},
    "sinks window": {"sinks": True, "window": 4},
    "sinks softcap window": {"sinks": True, "softcap": 1.5, "window": 7},
}
HEADS = {"multi head": (3, 3), "grouped": (6, 2), "multi query": (4, 1)}
DIM, DIM_V = 8, 8


def segments(total, gaps):
    """Where rows of `total` keys lie, `gaps` apart: starts and the length of it all."""
    starts, end = [], gaps[0]
    for length, gap in zip(total, gaps[1:], strict=True):
        starts.append(end)
        end += length + gap
    return starts, end


def inputs(new, total, heads, *, dtype=torch.float32, gap=2, layout="heads first", seed=0, dim_v=DIM_V):
    """query, keys, values, starts. What lies between the rows' keys is NaN, so that reading it cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    starts, size = segments(total, [1] + [gap] * len(total))
    query = torch.randn(1, heads[0], sum(new), DIM, generator=generator)
    keys, values = (torch.randn(1, heads[1], size, d, generator=generator) for d in (DIM, dim_v))
    outside = torch.ones(size, dtype=torch.bool)
    for start, length in zip(starts, total, strict=True):
        outside[start : start + length] = False
    keys[:, :, outside], values[:, :, outside] = torch.nan, torch.nan
    query, keys, values = (t.to(dtype) for t in (query, keys, values))
    if layout == "tokens first":  # as a projection leaves them: [1, N, H, D], seen as [1, H, N, D]
        query, keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, keys, values))
    elif layout == "slices":  # of larger tensors, with an offset, and a stride in the last dimension
        larger = (F.pad(t.repeat_interleave(2, -1), (2, 2, 1, 3)) for t in (query, keys, values))
        query, keys, values = (t[:, :, 1:-3, 2:-2:2] for t in larger)
        assert not keys.is_contiguous() and keys.storage_offset()
    return query, keys, values, starts


def features(name, heads, dtype=torch.float32):
    given = dict(FEATURES[name])
    if given.get("sinks"):
        given["sinks"] = torch.linspace(-1, 2, heads[0]).to(dtype)
    return given


def oracle(query, keys, values, new, starts, total, *, scale=None, window=None, softcap=None, sinks=None):
    """fp64, one query of one head of one row at a time."""
    query, keys, values = query.double(), keys.double(), values.double()
    heads, groups = query.shape[1], query.shape[1] // keys.shape[1]
    out = torch.zeros(1, query.shape[2], heads, values.shape[3], dtype=torch.float64)
    at = 0
    for n, start, length in zip(new, starts, total, strict=True):
        for i in range(n):
            position = length - n + i
            first = 0 if window is None else max(0, position - window + 1)
            seen = range(start + first, start + position + 1)
            for head in range(heads):
                scores = [
                    float(query[0, head, at + i] @ keys[0, head // groups, j]) * (scale or query.shape[3] ** -0.5)
                    for j in seen
                ]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                weights = [math.exp(s) for s in scores]
                norm = sum(weights) + (0 if sinks is None else math.exp(float(sinks[head])))
                for w, j in zip(weights, seen, strict=True):
                    out[0, at + i, head] += w / norm * values[0, head // groups, j]
        at += n
    return out


def eager(query, keys, values, new, starts, total, *, scale=None, window=None, softcap=None, sinks=None):
    """The textbook form, row by row, in the dtype of its input: softmax in fp32, all else rounded to the dtype."""
    parts, at, groups = [], 0, query.shape[1] // keys.shape[1]
    for n, start, length in zip(new, starts, total, strict=True):
        q = query[:, :, at : at + n]
        k, v = (t[:, :, start : start + length].repeat_interleave(groups, 1) for t in (keys, values))
        scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        position, key = torch.arange(length - n, length)[:, None], torch.arange(length)
        hidden = (key > position) | (key <= position - (window or length))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., :length]
        parts.append((weights @ v).transpose(1, 2))
        at += n
    return torch.cat(parts, 1)


def rounding_bound(query, keys, values, *, scale=None, softcap=None, **_):
    """First-order bound on the error in fp32, u = 2^-24.

    A score is a dot product of D terms, scaled: off by at most d = (D + 2) u scale max |q| |k|, and 6 u softcap more
    for the division, tanh (1-Lipschitz, 2 ulp) and product of a soft cap. The softmax turns d into a relative error of
    2 d; its exponentials (2 ulp each), its sum over m keys and the weighted sum of m values add (2 m + 6) u. Flash
    kernels rescale their running sums once a block, for which everything is counted twice.
    """
    u, real = 2.0**-24, ~keys.isnan()
    products = query.abs().amax(2).amax(1) @ torch.where(real, keys, 0).abs().amax(2).amax(1).T
    score = (DIM + 2) * u * (scale or DIM**-0.5) * float(products) + 6 * u * (softcap or 0)
    return 2 * (2 * score + (2 * keys.shape[2] + 6) * u) * float(torch.where(~values.isnan(), values, 0).abs().max())


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
