"""The pool of keys and values against a naive set of free places."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm_fast.generation.kv_pool import KVPool


def runs(free):
    """[start, end) of each run of neighbours in a set of integers."""
    out = []
    for place in sorted(free):
        if out and out[-1][1] == place:
            out[-1][1] = place + 1
        else:
            out.append([place, place + 1])
    return out


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 24), st.data())
def test_allocate_and_release_agree_with_a_set_of_free_places(size, data):
    """First fit, spans given back whole or in parts, from either end or out of the middle."""
    pool, free, spans, most = KVPool(size), set(range(size)), [], 0
    for _ in range(data.draw(st.integers(1, 40))):
        if not spans or data.draw(st.booleans()):
            tokens = data.draw(st.integers(1, size + 1))
            fits = [start for start, end in runs(free) if end - start >= tokens]
            start = pool.allocate(tokens)
            assert start == (fits[0] if fits else None)
            if start is not None:
                free -= set(range(start, start + tokens))
                spans.append((start, start + tokens))
        else:
            start, end = spans.pop(data.draw(st.integers(0, len(spans) - 1)))
            low = data.draw(st.integers(start, end - 1))
            high = data.draw(st.integers(low + 1, end))
            pool.release(low, high - low)
            free |= set(range(low, high))
            spans += [part for part in ((start, low), (high, end)) if part[0] < part[1]]
        most = max(most, size - len(free))
        assert (pool.used, pool.peak) == (size - len(free), most)
        assert pool.largest == max((end - start for start, end in runs(free)), default=0)
    for start, end in spans:
        pool.release(start, end - start)
    assert pool.used == 0 and pool.largest == size and pool.allocate(size) == 0


def test_places_that_are_free_already_are_not_given_back_again():
    """All patterns of six places, and all spans that could be given back."""
    size = 6
    for pattern in range(2**size):
        free = {place for place in range(size) if pattern >> place & 1}
        for start, end in itertools.product(range(-1, size + 2), repeat=2):
            pool = KVPool(size)
            pool.allocate(size)
            for place in free:
                pool.release(place, 1)
            span = set(range(start, end))
            if span and span <= set(range(size)) - free:
                pool.release(start, end - start)
            else:
                with pytest.raises(ValueError, match="not a span"):
                    pool.release(start, end - start)
                span = set()
            assert pool.used == size - len(free | span)
            assert pool.largest == max((b - a for a, b in runs(free | span)), default=0)


@pytest.mark.parametrize("tokens", [0, -1])
def test_sizes_below_one_are_refused(tokens):
    with pytest.raises(ValueError, match="at least one token"):
        KVPool(tokens)
    pool = KVPool(4)
    with pytest.raises(ValueError, match="at least one token"):
        pool.allocate(tokens)
    pool.allocate(4)
    with pytest.raises(ValueError):
        pool.release(2, tokens)
    assert pool.used == 4 and pool.allocate(1) is None


def heads_first(tokens, heads, dim, dtype, seed):
    """[1, heads, tokens, dim] as a projection leaves it: strided, since tokens come before heads there."""
    x = torch.randn(1, tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_tokens_lie_where_the_index_says(dtype):
    """Keys wider than values, strided and in the model's own dtype; places are overwritten, others are left."""
    pool = KVPool(11)
    assert pool.bytes_per_token() == 0
    lies = {}
    for seed, index in enumerate([[3, 0, 10], [7], [1, 2, 3, 4], []]):
        keys, values = (heads_first(len(index), 2, dim, dtype, seed + dim) for dim in (6, 4))
        if seed == 2:
            keys, values = keys.contiguous(), values.flip(2)
        pool.write(torch.tensor(index, dtype=torch.int64), keys, values)
        lies |= {place: (keys[0, :, i], values[0, :, i]) for i, place in enumerate(index)}
    assert (pool.keys.shape, pool.values.shape) == ((2, 12, 6), (2, 12, 4))
    assert pool.keys.dtype == pool.values.dtype == dtype
    assert pool.bytes_per_token() == 2 * (6 + 4) * (4 if dtype == torch.float32 else 2)
    for place, (key, value) in lies.items():
        assert torch.equal(pool.keys[:, place], key) and torch.equal(pool.values[:, place], value), place


@pytest.mark.parametrize("keys, values", [((3, 4), (3, 4)), ((2, 5), (2, 4)), ((2, 4), (2, 3)), ((2, 4), (3, 4))])
def test_layers_of_other_shapes_are_refused(keys, values):
    pool = KVPool(4)
    pool.write(torch.tensor([0]), torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    with pytest.raises(NotImplementedError, match="different shapes"):
        pool.write(torch.tensor([1]), torch.ones(1, keys[0], 1, keys[1]), torch.ones(1, values[0], 1, values[1]))
