"""Rows of a packed batch: 16 sequences of equal length, of which 4 skip a block.

    pytest benchmarks/bench_rows.py

eager      as one would write it in torch without these ops
compile    the same under torch.compile
reference  the ops' reference implementation, called directly
op         the op, as the executor calls it: C++ on the CPU where it is compiled
"""

import functools

import numpy as np
import pytest
import torch

from drllm_fast import ops, rows_reference

SEQUENCES = 16
SKIPPED = (1, 6, 7, 12)
SHAPES = [(2048, 576), (2048, 4096), (256, 576)]  # T, d
DTYPE = torch.bfloat16

implementations = pytest.mark.parametrize("implementation", ["eager", "compile", "reference", "op"])
shapes = pytest.mark.parametrize(("T", "d"), SHAPES, ids=lambda n: str(n))


@functools.cache
def batch(tokens):
    """decisions [B], cu_seqlens [B + 1], and the oracle's index [T'] of the tokens that run the block."""
    decisions = torch.ones(SEQUENCES, dtype=torch.int8)
    decisions[list(SKIPPED)] = 0
    each = tokens // SEQUENCES
    cu_seqlens = torch.arange(0, tokens + 1, each, dtype=torch.int32)
    index = np.array([t for t in range(tokens) if t // each not in SKIPPED])
    return decisions, cu_seqlens, index


@functools.cache
def rows(tokens, width, seed):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def moved(d, *rows):
    """Bytes of so many rows of width d, read or written."""
    return sum(rows) * d * DTYPE.itemsize


def bits(x):
    return x.view(torch.int16).numpy()


def equals(expected):
    def check(x):
        np.testing.assert_array_equal(bits(x), expected)

    return check


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)


def eager_gather(x, index):
    return x[index]


@implementations
@shapes
def bench_gather_rows(race, implementation, T, d):
    x, index = rows(T, d, 0), torch.from_numpy(batch(T)[2])
    race(
        {
            "eager": lambda: eager_gather(x, index),
            "compile": lambda: compiled(eager_gather)(x, index),
            "reference": lambda: rows_reference.gather_rows(x, index),
            "op": lambda: ops.gather_rows(x, index),
        },
        equals(bits(x)[batch(T)[2]]),
        moved=moved(d, len(index), len(index)),
    )


def eager_scatter(x, index, y):
    out = x.clone()
    out[index] = y
    return out


@implementations
@shapes
def bench_scatter_rows(race, implementation, T, d):
    x, index = rows(T, d, 0), torch.from_numpy(batch(T)[2])
    y = rows(len(index), d, 1)
    expected = bits(x).copy()
    expected[batch(T)[2]] = bits(y)
    race(
        {
            "eager": lambda: eager_scatter(x, index, y),
            "compile": lambda: compiled(eager_scatter)(x, index, y),
            "reference": lambda: rows_reference.scatter_rows(x, index, y),
            "op": lambda: ops.scatter_rows(x, index, y),
        },
        equals(expected),
        moved=moved(d, T, T),
    )


def eager_active(decisions, cu_seqlens):
    """With the sequences' bounds on the host, as a loop over them."""
    starts = cu_seqlens.tolist()
    kept = [row for row, decision in enumerate(decisions.tolist()) if decision >= 1]
    index = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in kept])
    ends = torch.tensor([0, *(starts[row + 1] - starts[row] for row in kept)]).cumsum(0, dtype=torch.int32)
    return index, ends


@pytest.mark.parametrize("implementation", ["eager", "reference", "op"])
@pytest.mark.parametrize("T", [2048, 256])
def bench_active_tokens(race, implementation, T):
    decisions, cu_seqlens, expected = batch(T)

    def check(result):
        index, ends = result
        np.testing.assert_array_equal(index.numpy(), expected)
        np.testing.assert_array_equal(ends.numpy(), np.arange(0, len(expected) + 1, T // SEQUENCES))

    race(
        {
            "eager": lambda: eager_active(decisions, cu_seqlens),
            "reference": lambda: rows_reference.active_tokens(decisions, cu_seqlens, 1),
            "op": lambda: ops.active_tokens(decisions, cu_seqlens, at_least=1),
        },
        check,
        moved=8 * len(expected),
    )


def eager_add(x, index, y):
    out = x.clone()
    out[index] += y
    return out


def moved_and_added(x, index, y):
    return ops.scatter_rows(x, index, ops.gather_rows(x, index) + y)


@pytest.mark.parametrize("implementation", ["eager", "compile", "reference", "gather, add, scatter", "op"])
@shapes
def bench_scatter_add_rows(race, implementation, T, d):
    x, index = rows(T, d, 0), torch.from_numpy(batch(T)[2])
    y = rows(len(index), d, 1)
    expected = x.float().numpy().copy()
    expected[batch(T)[2]] += y.float().numpy()
    race(
        {
            "eager": lambda: eager_add(x, index, y),
            "compile": lambda: compiled(eager_add)(x, index, y),
            "reference": lambda: rows_reference.scatter_add_rows(x, index, y),
            "gather, add, scatter": lambda: moved_and_added(x, index, y),
            "op": lambda: ops.scatter_add_rows(x, index, y),
        },
        equals(bits(torch.from_numpy(expected).to(DTYPE))),  # one rounding
        moved=moved(d, T, len(index), T),
        flops=len(index) * d,
    )


EPS = 1e-5


def eager_norm(x, index, weight):
    """As Hugging Face's LlamaRMSNorm."""
    gathered = x[index]
    hidden = gathered.float()
    hidden = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + EPS)
    return gathered, weight * hidden.to(x.dtype)


def gathered_and_normed(x, index, weight):
    gathered = ops.gather_rows(x, index)
    return gathered, torch.nn.functional.rms_norm(gathered, gathered.shape[1:], weight, EPS)


@pytest.mark.parametrize("implementation", ["eager", "compile", "reference", "gather, rms_norm", "op"])
@shapes
def bench_gather_rms_norm(race, implementation, T, d):
    x, weight, index = rows(T, d, 0), rows(1, d, 1)[0], torch.from_numpy(batch(T)[2])
    exact = x.double()[index]
    exact = weight.double() * exact * torch.rsqrt(exact.square().mean(1, keepdim=True) + EPS)
    lost = (eager_norm(x, index, weight)[1] - exact).abs().max()

    def check(result):
        gathered, normed = result
        np.testing.assert_array_equal(bits(gathered), bits(x)[batch(T)[2]])
        assert (normed - exact).abs().max() <= 2 * lost

    race(
        {
            "eager": lambda: eager_norm(x, index, weight),
            "compile": lambda: compiled(eager_norm)(x, index, weight),
            "reference": lambda: rows_reference.gather_rms_norm(x, index, weight, EPS),
            "gather, rms_norm": lambda: gathered_and_normed(x, index, weight),
            "op": lambda: ops.gather_rms_norm(x, index, weight, eps=EPS),
        },
        check,
        moved=moved(d, len(index), len(index), len(index)),
        flops=4 * len(index) * d,
    )


def eager_visits(decisions, cu_seqlens, tokens):
    """Both visits as two calls of `eager_active`, brought to a fixed size."""
    active = [eager_active(decisions - shift, cu_seqlens) for shift in (0, 1)]
    return [torch.nn.functional.pad(index, (0, tokens - len(index)), value=-1) for index, _ in active]


@pytest.mark.parametrize("implementation", ["eager", "reference", "op"])
@pytest.mark.parametrize("T", [2048, 256])
def bench_visit_rows(race, implementation, T):
    _, cu_seqlens, _ = batch(T)
    decisions = torch.ones(SEQUENCES, dtype=torch.int8)
    decisions[list(SKIPPED)], decisions[[0, 5]] = 0, 2
    each = T // SEQUENCES
    kept = [[t for t in range(T) if decisions[t // each] >= visit] for visit in (1, 2)]
    expected = np.array([index + [-1] * (T - len(index)) for index in kept])
    race(
        {
            "eager": lambda: eager_visits(decisions, cu_seqlens, T),
            "reference": lambda: rows_reference.visit_rows(decisions, cu_seqlens, T)[0],
            "op": lambda: ops.visit_rows(decisions, cu_seqlens, tokens=T)[0],
        },
        lambda index: np.testing.assert_array_equal(np.stack([np.asarray(visit) for visit in index]), expected),
        moved=8 * 2 * T,
    )
