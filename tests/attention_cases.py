"""Rows, features, inputs and oracles for attention over segments, shared by the tests of its implementations.

Tolerances are derived, not tuned. fp32: the first-order bound of `rounding_bound`. bf16, fp16: at most twice the error
that the textbook form ("eager", as Hugging Face writes it) makes in the same dtype, both against fp64.
"""

import math

import torch
import torch.nn.functional as F

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


def inputs(new, total, heads, *, dtype=torch.float32, gap=2, layout="heads first", seed=0, dim=DIM, dim_v=DIM_V):
    """query, keys, values, starts. What lies between the rows' keys is NaN, so that reading it cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    starts, size = segments(total, [1] + [gap] * len(total))
    query = torch.randn(1, heads[0], sum(new), dim, generator=generator)
    keys, values = (torch.randn(1, heads[1], size, d, generator=generator) for d in (dim, dim_v))
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
            seen = slice(start + first, start + position + 1)
            for head in range(heads):
                k, v = keys[0, head // groups, seen], values[0, head // groups, seen]
                scores = k @ query[0, head, at + i] * (scale or query.shape[3] ** -0.5)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                norm = weights.sum() + (0 if sinks is None else math.exp(float(sinks[head])))
                out[0, at + i, head] = weights / norm @ v
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

    A score is a dot product of D terms, scaled: off by at most d = (D + 2) u |scale| max |q| |k|, and 6 u softcap more
    for the division, tanh (1-Lipschitz, 2 ulp) and product of a soft cap. The softmax turns d into a relative error of
    2 d; its exponentials (2 ulp each), its sum over m keys and the weighted sum of m values add (2 m + 6) u. Flash
    kernels rescale their running sums once a block, for which everything is counted twice.
    """
    u, real = 2.0**-24, ~keys.isnan()
    products = query.abs().amax(2).amax(1) @ torch.where(real, keys, 0).abs().amax(2).amax(1).T
    dim = query.shape[3]
    score = (dim + 2) * u * abs(scale or dim**-0.5) * float(products) + 6 * u * (softcap or 0)
    return 2 * (2 * score + (2 * keys.shape[2] + 6) * u) * float(torch.where(~values.isnan(), values, 0).abs().max())
