"""Attention of packed rows over their KV slots, SmolLM2's heads (9 queries, 3 keys, 64 wide), against torch's.

    pytest benchmarks/bench_attention.py

Decode: 16 rows ask with one token each.
  padded   scaled_dot_product_attention over keys padded to the longest row, with a mask where rows differ. The heads of
           a group ask as queries of one head: on the CPU far faster than enable_gqa
  gqa      the same with enable_gqa=True, as transformers calls it
  rows     scaled_dot_product_attention row by row: drllm_fast.attention_reference
  op       the op, C++ on the CPU where it is compiled, Triton on a GPU
Prefill: rows whose keys are their own tokens.
  rows     scaled_dot_product_attention, causal, row by row
  op
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from drllm_fast import attention_reference, ops

HEADS, KV_HEADS, DIM = 9, 3, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECODE = {
    "16..1024": [16 + round(i * 1008 / 15) for i in range(16)],
    "16 x 64": [64] * 16,
    "16 x 512": [512] * 16,
    "1 x 64": [64],
    "1 x 1024": [1024],
}
PREFILL = {
    "1 x 16": [16],
    "1 x 128": [128],
    "1 x 512": [512],
    "1 x 1024": [1024],
    "16..256": [16 * (i + 1) for i in range(16)],
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def case(new, total, dtype):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    query, keys, values = draw(sum(new), HEADS, DIM), draw(KV_HEADS, sum(total), DIM), draw(KV_HEADS, sum(total), DIM)
    starts = [0, *accumulate(total[:-1])]
    layout = int32([0, *accumulate(new)]), int32(starts), int32(total)
    options = {"max_query": max(new), "max_length": max(total)}
    return query, keys, values, layout, options, starts


def oracle(query, keys, values, new, total):
    """fp64, dense, one row and head at a time."""
    out, at, start = [], 0, 0
    for n, m in zip(new, total, strict=True):
        seen = torch.arange(m - n, m)[:, None] >= torch.arange(m)
        heads = []
        for head in range(HEADS):
            k, v = (t[head // (HEADS // KV_HEADS), start : start + m].double().cpu() for t in (keys, values))
            scores = query[at : at + n, head].double().cpu() @ k.T * DIM**-0.5
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
        out.append(torch.stack(heads, 1))
        at, start = at + n, start + m
    return torch.cat(out)


def work(new, total, dtype):
    """Bytes of queries, keys, values and results, and the FLOPs of both products over what is seen."""
    size = 2 if dtype == torch.bfloat16 else 4
    pairs = sum(n * m - n * (n - 1) // 2 for n, m in zip(new, total, strict=True))
    moved = size * DIM * (2 * sum(new) * HEADS + 2 * sum(total) * KV_HEADS)
    return {"moved": moved, "flops": 4 * pairs * HEADS * DIM, "dtype": dtype}


def checked(expected, by_row):
    """At most twice as far from fp64 as torch's own attention in the same dtype, row by row, or as fp32's rounding."""
    allowed = max(2 * float((by_row.double().cpu() - expected).abs().max()), 1e-6)

    def check(out):
        torch.testing.assert_close(out.reshape(expected.shape).double().cpu(), expected, atol=allowed, rtol=0)

    return check


@pytest.mark.parametrize("implementation", ["padded", "gqa", "rows", "op"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", DECODE)
def bench_decode(race, implementation, rows, dtype):
    total, dtype = DECODE[rows], DTYPES[dtype]
    new, longest = [1] * len(total), max(total)
    query, keys, values, layout, options, starts = case(new, total, dtype)
    padded = [torch.zeros(len(total), KV_HEADS, longest, DIM, dtype=dtype, device=DEVICE) for _ in range(2)]
    for row, (start, m) in enumerate(zip(starts, total, strict=True)):
        for to, source in zip(padded, (keys, values), strict=True):
            to[row, :, :m] = source[:, start : start + m]
    real = torch.arange(longest, device=DEVICE) < int32(total)[:, None]
    mask = None if min(total) == longest else real[:, None, None]

    def by_row():
        return attention_reference.ragged_attention(query, keys, values, *layout, *options.values(), DIM**-0.5)

    grouped, heads = query.view(-1, KV_HEADS, HEADS // KV_HEADS, DIM), query.unsqueeze(2)
    with torch.inference_mode():
        race(
            {
                "padded": lambda: F.scaled_dot_product_attention(grouped, *padded, mask),
                "gqa": lambda: F.scaled_dot_product_attention(heads, *padded, mask, enable_gqa=True),
                "rows": by_row,
                "op": lambda: ops.ragged_attention(query, keys, values, *layout, **options),
            },
            checked(oracle(query, keys, values, new, total), by_row()),
            **work(new, total, dtype),
        )


@pytest.mark.parametrize("implementation", ["rows", "op"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", PREFILL)
def bench_prefill(race, implementation, rows, dtype):
    total, dtype = PREFILL[rows], DTYPES[dtype]
    query, keys, values, layout, options, starts = case(total, total, dtype)

    def by_row():
        parts = []
        for start, n in zip(starts, total, strict=True):
            q = query[start : start + n].transpose(0, 1).unsqueeze(0)
            k, v = keys[:, start : start + n].unsqueeze(0), values[:, start : start + n].unsqueeze(0)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    with torch.inference_mode():
        race(
            {"rows": by_row, "op": lambda: ops.ragged_attention(query, keys, values, *layout, **options)},
            checked(oracle(query, keys, values, total, total), by_row()),
            **work(total, total, dtype),
        )
