"""The router's specification against one written with nn.Linear, row by row and window by window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drllm_fast.router_reference import pool_windows, router_logits

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 8 * 5 + 7, 0]


def packed(lengths, d=24, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), d, generator=g).to(dtype)
    return hidden, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def modules(d=24, h=10, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(d, h), nn.Linear(h, 3)


def weights(first, second):
    return first.weight, first.bias, second.weight, second.bias


def oracle_windows(hidden, lengths, windows):
    """For each row the list of its window means, token by token, in float64."""
    rows, start = [], 0
    for n in lengths:
        tokens = [hidden[start + i].double() for i in range(n)]
        start += n
        means = []
        if n:
            count = windows if n >= windows else n
            size = n // count
            for w in range(count):
                total = torch.zeros(hidden.shape[1], dtype=torch.float64)
                for i in range(size):
                    total += tokens[w * size + i]
                means.append(total / size)
        rows.append(means)
    return rows


def oracle_logits(hidden, lengths, windows, first, second):
    first, second = first.double(), second.double()
    rows = []
    for means in oracle_windows(hidden, lengths, windows):
        each = []
        for m in means:
            x = first(m)
            x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
            each.append(second(x))
        rows.append(sum(each) / len(each) if each else torch.zeros(3, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)


def check_against_oracle(lengths, windows, dtype=torch.float32, hidden=None):
    made, cu = packed(lengths, dtype=dtype)
    hidden = made if hidden is None else hidden
    first, second = modules()
    pooled, counts = pool_windows(hidden, cu, windows)
    logits = router_logits(pooled, counts, *weights(first, second))
    assert pooled.dtype == logits.dtype == torch.float32
    assert pooled.shape == (len(lengths), windows, hidden.shape[1]) and logits.shape == (len(lengths), 3)
    expected = oracle_windows(hidden, lengths, windows)
    assert counts.tolist() == [len(means) for means in expected]
    for row, means in enumerate(expected):
        if means:
            torch.testing.assert_close(pooled[row, : len(means)].double(), torch.stack(means), atol=1e-6, rtol=1e-6)
        assert not pooled[row, len(means) :].any()
    # fp32 rounding of sums of 24 and 10 terms of size 1; a forgotten token or window moves a logit by 1e-3 or more.
    expected = oracle_logits(hidden, lengths, windows, first, second)
    torch.testing.assert_close(logits.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("windows", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_length(windows, dtype):
    check_against_oracle(LENGTHS, windows, dtype)


@pytest.mark.parametrize("lengths", [[1], [7], [8], [9], [17], [47], [0], [], [0, 0], [0, 9, 0], [3, 0]])
def test_batches(lengths):
    check_against_oracle(lengths, 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 12))
def test_any_batch(lengths, windows):
    check_against_oracle(lengths, windows)


def test_non_contiguous_hidden():
    lengths = [9, 17]
    check_against_oracle(lengths, 8, hidden=torch.randn(26, 48)[:, ::2])
    check_against_oracle(lengths, 8, hidden=torch.randn(24, 26).T)


def test_rows_do_not_see_each_other():
    hidden, cu = packed([9, 20, 5])
    alone, _ = pool_windows(hidden[9:29], torch.tensor([0, 20]), 8)
    assert torch.equal(pool_windows(hidden, cu, 8)[0][1], alone[0])


def test_the_tail_belongs_to_no_window_and_all_else_does():
    hidden, cu = packed([8 * 5 + 7])
    changed = hidden.clone()
    changed[40:] = 1e6
    assert torch.equal(pool_windows(hidden, cu, 8)[0], pool_windows(changed, cu, 8)[0])
    for token in range(40):
        changed = hidden.clone()
        changed[token] += 1
        moved = (pool_windows(changed, cu, 8)[0] - pool_windows(hidden, cu, 8)[0]).abs().amax(-1)[0]
        assert moved.nonzero().flatten().tolist() == [token // 5]


def test_long_windows_accumulate_in_fp32():
    hidden = torch.full((4096, 4), 1.0, dtype=torch.bfloat16)
    hidden[1::2] = 1.0078125  # the next bf16 number
    pooled, _ = pool_windows(hidden, torch.tensor([0, 4096]), 1)
    torch.testing.assert_close(pooled, torch.full((1, 1, 4), 1.00390625), atol=1e-7, rtol=0)


def test_autocast_does_not_lower_the_precision():
    hidden, cu = packed([9, 17])
    router = weights(*modules())
    pooled, counts = pool_windows(hidden, cu, 8)
    expected = router_logits(pooled, counts, *router)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router_logits(*pool_windows(hidden, cu, 8), *router), expected)


def test_gradients():
    hidden, cu = packed([3, 0, 9], d=4)
    pooled, counts = pool_windows(hidden, cu, 2)
    params = [p.detach().requires_grad_() for p in weights(*modules(4, 5))]
    router_logits(pooled, counts, *params).square().sum().backward()
    step = 1e-2
    for p in params:
        flat, grad = p.detach().view(-1), p.grad.view(-1)
        for i in (0, len(flat) - 1):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                values.append(float(router_logits(pooled, counts, *params).square().sum().detach()))
                flat[i] -= sign * step
            assert grad[i].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError),  # not to the end
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError),
        ({"hidden": torch.zeros(1, 5, 4)}, ValueError),
        ({"hidden": torch.zeros(5, 4, dtype=torch.int64)}, ValueError),
        ({"windows": 0}, ValueError),
    ],
)
def test_pooling_refuses(change, error):
    good = {"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0, 5]), "windows": 8}
    pool_windows(**good)
    with pytest.raises(error, match="must"):
        pool_windows(**(good | change))


@pytest.mark.parametrize("part", range(6))
def test_logits_refuse_shapes_that_do_not_belong_together(part):
    hidden, cu = packed([9])
    good = [*pool_windows(hidden, cu, 8), *(p.detach() for p in weights(*modules()))]
    router_logits(*good)
    bad = [t if i != part else torch.cat([t, t], dim=-1) for i, t in enumerate(good)]
    with pytest.raises(ValueError, match="must be"):
        router_logits(*bad)
