"""How tokens are chosen, against Python integers, numpy float64 and counted frequencies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm_fast.generation.sampling import Sampling, choose_tokens, uniform

MASK = 2**64 - 1


class SplitMix64:
    """As published: a state that grows by the golden ratio, and is mixed for each output."""

    def __init__(self, seed):
        self.state = seed & MASK

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def draws(seed, count):
    """The first of the stream of `seed`: a generator that is itself seeded by one output."""
    stream = SplitMix64(SplitMix64(seed).next())
    return [(stream.next() >> 11) / 2**53 for _ in range(count)]


def test_splitmix64_is_the_published_one():
    stream = SplitMix64(1234567)  # the vector that Java's and Rosetta Code's versions are checked with
    assert [stream.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63, 2**64 - 1, -1, -(2**70) + 3, 123456789123456789123456789])
def test_uniform_is_a_stream_for_each_seed(seed):
    expected = draws(seed, 50)
    assert uniform([seed] * 50, range(50)).tolist() == expected
    assert uniform([seed, 5, seed], [49, 0, 3]).tolist() == [expected[49], draws(5, 1)[0], expected[3]]


@pytest.mark.parametrize("of", ["one stream", "first draws of neighbouring seeds", "both"])
def test_uniform_is_uniform(of):
    n = 20_000
    seeds, numbers = {
        "one stream": ([7] * n, range(n)),
        "first draws of neighbouring seeds": (range(n), [0] * n),
        "both": ([i // 100 for i in range(n)], [i % 100 for i in range(n)]),
    }[of]
    u = uniform(list(seeds), list(numbers))
    assert u.min() >= 0 and u.max() < 1 and len(set(u.tolist())) == n
    assert chi_square(np.histogram(u, 64, (0, 1))[0], np.full(64, n / 64)) < limit(63)
    pairs = np.histogram2d(u[:-1], u[1:], 12, [(0, 1)] * 2)[0].ravel()  # each draw and the next
    assert chi_square(pairs, np.full(144, (n - 1) / 144)) < limit(143)


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum()


def limit(freedom, sigmas=4.5):
    """What chi square exceeds by chance once in about 300,000 times (Wilson and Hilferty's cube)."""
    return freedom * (1 - 2 / (9 * freedom) + sigmas * math.sqrt(2 / (9 * freedom))) ** 3


def distribution(logits, sampling):
    """The probability of each token in float64, and the order of the tokens; one row, by the book."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    scaled = [(float(logits[token]) - float(logits[order[0]])) / sampling.temperature for token in order]
    weights = [math.exp(max(x, -800.0)) if x > -math.inf else 0.0 for x in scaled]
    if sampling.top_k:
        weights = [w if place < sampling.top_k else 0.0 for place, w in enumerate(weights)]
    p = [w / math.fsum(weights) for w in weights]
    kept, together = [], 0.0
    for x in p:
        kept.append(x if not kept or together < sampling.top_p else 0.0)
        together += x
    out = np.zeros(len(logits))
    out[order] = np.array(kept) / math.fsum(kept)
    return out, order


def expected_token(logits, sampling, number):
    """(the token whose part of [0, 1) holds the draw, how far the draw is from another token's part)"""
    p, order = distribution(logits, sampling)
    ends = np.cumsum(p[order])
    u = draws(sampling.seed, number + 1)[-1]
    at = next((i for i, end in enumerate(ends) if u < end), int((p > 0).sum()) - 1)
    return order[at], np.abs(ends - u).min()


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6, top_k=5),
    Sampling(temperature=1.7, top_p=0.8),
    Sampling(temperature=0.9, top_k=7, top_p=0.6),
    Sampling(temperature=2.5, top_k=1),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, top_k=1000, top_p=0.999),
    Sampling(temperature=100.0),
]


def of(sampling, **changes):
    return Sampling(**{**vars(sampling), **changes})


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_are_those_of_the_softmax(sampling):
    n, vocabulary = 6000, 13
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 2
    many = [of(sampling, seed=seed) for seed in range(n // 20)]
    tokens = [choose_tokens(logits.expand(len(many), -1), many, [number] * len(many)) for number in range(20)]
    counts = np.bincount(torch.cat(tokens).numpy(), minlength=vocabulary)
    p, _ = distribution(logits.tolist(), sampling)
    assert (counts[p == 0] == 0).all()
    likely = p * n >= 5
    rest = counts[~likely].sum(), p[~likely].sum() * n
    seen, expected = np.append(counts[likely], rest[0]), np.append(p[likely] * n, max(rest[1], 1e-9))
    keep = expected > 1
    assert chi_square(seen[keep], expected[keep]) < limit(max(1, keep.sum() - 1))
    assert seen[~keep].sum() < 10


values = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, -0.0, -math.inf]))
samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 20)),
    top_k=st.integers(0, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    seed=st.integers(-(2**65), 2**65),
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 5))
def test_each_row_is_as_by_the_book_whatever_is_beside_it(data, vocabulary, rows):
    logits = torch.tensor(data.draw(st.lists(st.lists(values, min_size=vocabulary, max_size=vocabulary),
                                             min_size=rows, max_size=rows)))  # fmt: skip
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=-3.0)  # some token is possible
    given_each = [data.draw(samplings) for _ in range(rows)]
    numbers = [data.draw(st.integers(0, 30)) for _ in range(rows)]
    tokens = choose_tokens(logits, given_each, numbers).tolist()
    for row in range(rows):
        alone = choose_tokens(logits[row : row + 1], given_each[row : row + 1], numbers[row : row + 1])
        assert alone.tolist() == [tokens[row]]
        scores = logits[row].tolist()
        if given_each[row].temperature == 0:
            assert tokens[row] == scores.index(max(scores))
            continue
        token, distance = expected_token(scores, given_each[row], numbers[row])
        nearest_p = abs(np.cumsum(np.sort(distribution(scores, of(given_each[row], top_p=1.0))[0])[::-1])
                        - given_each[row].top_p).min()  # fmt: skip
        if distance > 1e-5 and nearest_p > 1e-5:  # else fp32 scores may fall on either side
            assert tokens[row] == token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_a_row_takes_the_same_whatever_its_neighbours_look_at(dtype):
    """bf16 logits of a real vocabulary hold many equal ones, at the border of top_k as well."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 5000, generator=generator) * 3).to(dtype).round()
    for k in (1, 3, 40, 900):
        row = [of(SETTINGS[0], top_k=k, seed=seed, temperature=9.0) for seed in range(3)]
        alone = choose_tokens(logits[:3], row, [0, 1, 2]).tolist()
        order = np.argsort(-logits[:3].float().numpy(), axis=1, kind="stable")[:, :k]
        assert all(token in order[r] for r, token in enumerate(alone))
        for neighbour in (of(SETTINGS[0], top_k=1), of(SETTINGS[0], top_k=2000), SETTINGS[0], Sampling()):
            assert choose_tokens(logits, [*row, neighbour], [0, 1, 2, 5]).tolist()[:3] == alone


def test_greedy_rows_take_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [-math.inf, -math.inf, 2.0], [0.0, 0.0, 0.0]])
    assert choose_tokens(logits, [Sampling()] * 3, [0, 0, 0]).tolist() == [1, 2, 0]


def test_a_choice_depends_on_seed_and_number():
    logits = torch.zeros(1, 1000)
    chosen = {
        (seed, number): choose_tokens(logits, [Sampling(temperature=1.0, seed=seed)], [number]).item()
        for seed in range(5)
        for number in range(5)
    }
    assert len(set(chosen.values())) > 20
    for (seed, number), token in chosen.items():
        assert token == int(draws(seed, number + 1)[-1] * 1000)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38, 1e-6])
def test_the_lowest_temperatures_are_greedy(temperature):
    logits = torch.tensor([[0.5, 0.50001, -math.inf, 0.4], [1e30, -1e30, 3e38, -3e38]])
    assert choose_tokens(logits, [Sampling(temperature=temperature, seed=s) for s in (1, 2)], [0, 0]).tolist() == [1, 2]


def test_equal_scores_of_any_size_are_drawn_evenly_at_a_low_temperature():
    """3e38 / 0.1 is more than fp32 holds."""
    many = [Sampling(temperature=0.1, seed=seed) for seed in range(2000)]
    tokens = choose_tokens(torch.tensor([3e38, -3e38, 3e38]).expand(2000, -1), many, [0] * 2000)
    counts = np.bincount(tokens, minlength=3)
    assert counts[1] == 0 and chi_square(counts[[0, 2]], np.full(2, 1000)) < limit(1)


@pytest.mark.parametrize("temperature", [1e6, 1e30, 1e39, 1.7e308])
def test_the_highest_temperatures_draw_evenly_from_what_is_possible(temperature):
    logits = torch.tensor([-math.inf, 3.0, 1.0, -math.inf, -2.0]).expand(3000, -1)
    tokens = choose_tokens(logits, [Sampling(temperature=temperature, seed=s) for s in range(3000)], [0] * 3000)
    counts = np.bincount(tokens, minlength=5)
    assert counts[[0, 3]].sum() == 0
    assert chi_square(counts[[1, 2, 4]], np.full(3, 1000)) < limit(2)


@pytest.mark.parametrize("top_k", [0, 2])
def test_scores_that_are_no_distribution_are_taken_as_greedy_does_and_hurt_no_other_row(top_k):
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1.0, nan, 5.0], [0.0, 1.0, 2.0], [inf, 1.0, 2.0], [-inf, -inf, -inf], [nan, nan, nan]])
    logits.view(torch.int32)[0, 1] = -(2**22)  # a NaN with a sign, as inf - inf gives
    some = [Sampling(temperature=0.8, top_k=top_k, seed=s) for s in range(5)]
    tokens = choose_tokens(logits, some, [0] * 5)
    assert tokens.tolist() == [1, choose_tokens(logits[1:2], some[1:2], [0]).item(), 0, 0, 0]
    assert torch.equal(choose_tokens(logits, [Sampling()] * 5, [0] * 5), logits.argmax(-1))


@pytest.mark.parametrize(
    "top_p, tokens", [(0.5, {2}), (0.500001, {2, 0}), (0.75, {2, 0}), (0.76, {2, 0, 1}), (1, {2, 0, 1, 3})]
)
def test_top_p_takes_the_fewest_tokens(top_p, tokens):
    logits = torch.tensor([0.25, 0.125, 0.5, 0.125]).log()  # of the equal ones the lower token comes first
    many = [Sampling(temperature=1.0, top_p=top_p, seed=seed) for seed in range(400)]
    assert set(choose_tokens(logits.expand(400, -1), many, [3] * 400).tolist()) == tokens


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_top_p_that_is_reached_exactly_takes_no_token_more(kept, top_k):
    many = [Sampling(temperature=1.0, top_p=kept / 4, top_k=top_k, seed=seed) for seed in range(300)]
    tokens = choose_tokens(torch.tensor([1.0, 1.0, 1.0, 1.0]).expand(300, -1), many, [0] * 300)
    assert set(tokens.tolist()) == set(range(kept))


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"max_new_tokens": 0}, ValueError, "at least 1"),
        ({"max_new_tokens": True}, TypeError, "integer"),
        ({"max_new_tokens": 3.0}, TypeError, "integer"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": "1"}, TypeError, "number"),
        ({"temperature": False}, TypeError, "number"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": 1.5}, TypeError, "integer"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"top_p": 1.01}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"top_p": None}, TypeError, "number"),
        ({"seed": 0.5}, TypeError, "integer"),
        ({"seed": None}, TypeError, "integer"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos"),
        ({"stop": ("a", "")}, ValueError, "none of them empty"),
        ({"stop": ""}, ValueError, "none of them empty"),
        ({"stop": ["x"] * 17}, ValueError, "at most 16"),
        ({"stop": ["a", 3]}, TypeError, "texts"),
        ({"stop": 5}, TypeError, "texts"),
        ({"stop": {"a"}}, TypeError, "texts"),
    ],
)
def test_refusals(options, error, said):
    with pytest.raises(error, match=said):
        Sampling(**options)


def test_stop_may_be_one_text_or_a_list():
    assert Sampling(stop="ab").stop == ("ab",) and Sampling(stop=["a", "b"]).stop == ("a", "b")
